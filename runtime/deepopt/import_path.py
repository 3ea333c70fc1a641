"""Import the object that an import path `package.module:name` names, and say well what failed.

What it does not do: extend `sys.path` (the command line does), or call what it imported.
"""

from __future__ import annotations

import difflib
import importlib
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from deepopt.errors import InputError


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
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise InputError(
            f"{field}: {path!r} is not an import path",
            remedy='write "package.module:name", for example "my_project.model:build"',
        )
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


def _import_module(module_name: str, *, path: str, field: str) -> ModuleType:
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if module_name != missing and not module_name.startswith(f"{missing}."):
            raise _raised_on_import(error, module_name, path=path, field=field) from error
        raise InputError(
            f"{field}: there is no module {missing!r} (from {path})",
            remedy="check the spelling, install it, or add its folder to PYTHONPATH; "
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
    """The place to look at: `, file:line: source`, in the module itself where possible."""
    if isinstance(error, SyntaxError):
        return f", {error.filename}:{error.lineno}: {(error.text or '').strip()}"
    frames = [
        (frame.f_globals.get("__name__"), summary)
        for (frame, _), summary in zip(
            traceback.walk_tb(error.__traceback__),
            traceback.extract_tb(error.__traceback__),
            strict=True,
        )
        if frame.f_globals.get("__name__") != __name__
        and not summary.filename.startswith("<frozen importlib")
        and frame.f_globals.get("__name__") != "importlib"
    ]
    own = [summary for name, summary in frames if name == module_name]
    if not frames:
        return ""
    at = own[-1] if own else frames[-1][1]
    return f", {at.filename}:{at.lineno}: {at.line}"


def _suggest_attribute(owner: object, name: str) -> str:
    public = [known for known in dir(owner) if not known.startswith("_")]
    close = difflib.get_close_matches(name, public, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    own = [
        known
        for known in public
        if getattr(getattr(owner, known, None), "__module__", None)
        == getattr(owner, "__name__", "")
    ]
    return f"it has {', '.join(own[:8])}" if own else "check the spelling"
