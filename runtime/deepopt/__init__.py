"""deepopt: pipeline- and expert-parallel PyTorch training that does not let go."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("deepopt-cuda")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

if TYPE_CHECKING:
    from deepopt.convert import DeepModel, convert_to_deepopt
    from deepopt.own_loop import BiStreamPipeline
    from deepopt.trainer import DeepTrainer

__all__ = ["BiStreamPipeline", "DeepModel", "DeepTrainer", "__version__", "convert_to_deepopt"]

_LAZY = {
    "BiStreamPipeline": "deepopt.own_loop",
    "DeepModel": "deepopt.convert",
    "DeepTrainer": "deepopt.trainer",
    "convert_to_deepopt": "deepopt.convert",
}


def __getattr__(name: str) -> Any:
    """Public names, loaded when they are first asked for: importing deepopt loads no torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'deepopt' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
