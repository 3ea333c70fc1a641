"""Which installed distributions provide a package `deepopt`; another one's is found and said.

A Bayesian optimiser is distributed as `deepopt` and brings a package of the same name. This module
imports neither.
"""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec

OWN = "deepopt-cuda"
PACKAGE = "deepopt"


def own_version() -> str:
    """The installed version of deepopt."""
    try:
        return metadata.version(OWN)
    except metadata.PackageNotFoundError:  # a source tree that was never installed
        return "0+unknown"


def namesake() -> str | None:
    """The distribution named `deepopt`, with its version; None when it is not installed.

    Looks up one name: quick enough for every launch.
    """
    try:
        return f"{PACKAGE} {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return None


def other_providers() -> list[str]:
    """All other distributions with a top-level package `deepopt`, by name and version.

    Reads the records of all that is installed: tenths of a second.
    """
    names = set(metadata.packages_distributions().get(PACKAGE, ())) - {OWN}
    return sorted(f"{name} {metadata.version(name)}" for name in names)


def explain_namesake(other: str) -> str:
    """What a namesake means for the user.

    Args:
        other: its name and version.
    """
    return (
        f"the distribution {other!r} also provides the package {PACKAGE!r}: files of the two "
        "overwrite each other"
    )


def explain_shadow() -> str:
    """Why the package `deepopt` that Python finds is not this one, and what to do."""
    spec = find_spec(PACKAGE)
    where = "nowhere" if spec is None else spec.origin or str(spec.submodule_search_locations)
    others = other_providers()
    if others:
        return (
            f"{', '.join(others)} also provides the package {PACKAGE!r} (found at {where}); use "
            f"an environment of its own, or: pip uninstall {others[0].split()[0]} && "
            f"pip install --force-reinstall --no-deps {OWN}"
        )
    return f"Python finds {PACKAGE!r} at {where}; install {OWN} again"
