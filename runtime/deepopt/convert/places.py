"""Where in the user's code something happens."""

from __future__ import annotations

import sys
import traceback

import torch

from deepopt.errors import InputError

_INTERNAL = (
    "deepopt.convert", "torch._", "torch.autograd", "torch.functional", "torch.nn.functional",
    "torch.nn.modules.module", "torch.nn.modules.container", "torch.overrides", "torch.utils",
    "contextlib", "functools",
)  # fmt: skip


def where() -> str:
    """File and line of the user's code that runs now."""
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_internal(frame.f_globals.get("__name__", "")):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _is_internal(name: str) -> bool:
    return name == "torch" or name.startswith(_INTERNAL)


def failure(model: torch.nn.Module, error: BaseException) -> InputError:
    """The user's mistake, with its place, for what a forward raised.

    Args:
        model: whose forward it was.
        error: what it raised.
    """
    frames = list(traceback.walk_tb(error.__traceback__))
    users = [
        (frame, line)
        for frame, line in frames
        if not _is_internal(frame.f_globals.get("__name__", ""))
    ]
    theirs = [
        (frame, line)
        for frame, line in users
        if not frame.f_globals.get("__name__", "").startswith(("torch.", "deepopt."))
    ]
    frame, line = (theirs or users or frames)[-1]
    return InputError(
        f"the forward of {type(model).__name__} raised {type(error).__name__}: {error} "
        f"({frame.f_code.co_filename}:{line})",
        remedy="check the example inputs: names, shapes and dtypes must be those of a micro-batch",
    )
