"""Mixture of experts: routing, dispatch, balance."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepopt.moe.configure import configure_routers
    from deepopt.moe.elb_config import ElbMapping, map_elb_config
    from deepopt.moe.elb_router import ElbRouter

__all__ = ["ElbMapping", "ElbRouter", "configure_routers", "map_elb_config"]

_LAZY = {
    "ElbMapping": "deepopt.moe.elb_config",
    "ElbRouter": "deepopt.moe.elb_router",
    "configure_routers": "deepopt.moe.configure",
    "map_elb_config": "deepopt.moe.elb_config",
}


def __getattr__(name: str) -> Any:
    """Public names, loaded when they are first asked for: the decisions here need no torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'deepopt.moe' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
