"""Import the object that an import path `package.module:name` names, and say well what failed.

What it does not do: extend `sys.path` (the command line does), or call what it imported; it has words for
what such a call raised.
"""

from __future__ import annotations

import difflib
import gc
import importlib
import pkgutil
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from deepopt.errors import InputError

IMPORT_PATH_REMEDY = 'write "package.module:name", for example "my_project.model:build"'

_MOST_NAMED = 12  # attributes in a hint

_NAME = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
_IMPORT_PATH = re.compile(rf"({_NAME}):({_NAME})")


@contextmanager
def without_collections() -> Iterator[None]:
    """Look for no garbage while large packages are imported: they make little, and it takes a fifth of
    their time. Cycles that are left are found by the next look.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def is_import_path(text: str) -> bool:
    """Whether a text has the form `package.module:name`; nothing is imported."""
    return _IMPORT_PATH.fullmatch(text) is not None


def import_object(path: str, *, field: str) -> Any:
    """Import an object.

    Args:
        path: `package.module:name`; the name may be dotted, for an attribute of a class.
        field: the key of the job that holds the path, for errors.

    Returns:
        The object.

    Raises:
        InputError: the path is malformed, there is no such module or attribute, or the module
            raised while it was imported.
    """
    if not is_import_path(path):
        raise InputError(f"{field}: {path!r} is not an import path", remedy=IMPORT_PATH_REMEDY)
    module_name, _, name = path.partition(":")
    found: Any = _import_module(module_name, path=path, field=field)
    reached = module_name
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise InputError(
                f"{field}: {reached} has no {part!r} (from {path})",
                remedy=_suggest_attribute(found, part),
            ) from error
        reached += f".{part}"
    return found


def describe_raise(error: BaseException) -> str:
    """What a call of an imported object raised, and where, as `RuntimeError: boom (file:line)`.

    Without a place where the call did not get inside: its arguments do not fit, and the only line to
    name would be the caller's.

    Args:
        error: caught in the function that called.
    """
    words = f"{type(error).__name__}: {error}"
    frames = traceback.extract_tb(error.__traceback__)
    if len(frames) < 2:
        return words
    return f"{words} ({frames[-1].filename}:{frames[-1].lineno})"


def _import_module(module_name: str, *, path: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise _raised_on_import(error, module_name, path=path, field=field) from error
        raise InputError(
            f"{field}: there is no module {missing!r} (from {path})",
            remedy=_suggest_module(missing)
            or "check the spelling, install it, or add its folder to PYTHONPATH; "
            f"deepopt looked from {Path.cwd()}",
        ) from error
    except (Exception, SystemExit) as error:  # the edge to the user's own code
        raise _raised_on_import(error, module_name, path=path, field=field) from error


def _raised_on_import(
    error: BaseException, module_name: str, *, path: str, field: str
) -> InputError:
    last_line = traceback.format_exception_only(error)[-1].strip()
    return InputError(
        f"{field}: importing {module_name} (from {path}) raised {last_line}"
        f"{_where(error, module_name)}",
        remedy=f'correct the module until `python -c "import {module_name}"` works',
    )


def _where(error: BaseException, module_name: str) -> str:
    """The place to look at: `, file:line: source`, in the user's own package where possible."""
    if isinstance(error, SyntaxError):
        return f", {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    package = module_name.partition(".")[0]
    summaries = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    own = [
        summary
        for frame, summary in zip(frames, summaries, strict=True)
        if str(frame.f_globals.get("__name__")).partition(".")[0] == package
    ]
    at = (own or summaries)[-1]
    return f", {at.filename}:{at.lineno}: {at.line}"


def _suggest_module(missing: str) -> str:
    package, _, name = missing.rpartition(".")
    folders = getattr(sys.modules.get(package), "__path__", [])
    modules = [module.name for module in pkgutil.iter_modules(folders)]
    close = difflib.get_close_matches(name, modules, n=1)
    return f"did you mean {package}.{close[0]}?" if close else ""


def _suggest_attribute(owner: object, name: str) -> str:
    public = [known for known in dir(owner) if not known.startswith("_")]
    close = difflib.get_close_matches(name, public, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    # What a package offers is defined in its modules: only `__all__` tells it from what it imports.
    offered = getattr(owner, "__all__", None) or [
        known
        for known in public
        if getattr(getattr(owner, known, None), "__module__", None)
        == getattr(owner, "__name__", "")
    ]
    more = ", ..." if len(offered) > _MOST_NAMED else ""
    return (
        f"it has {', '.join(offered[:_MOST_NAMED])}{more}" if offered else "check the spelling"
    )
