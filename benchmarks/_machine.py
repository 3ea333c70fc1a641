"""What a figure must be read with: the machine, its load, versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

_REPOSITORY = Path(__file__).parent.parent
_PACKAGES = ("torch", "ray", "numpy")


def describe() -> list[str]:
    """Lines of `name: value`, the first thing that every benchmark prints."""
    load = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    packages = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return [
        f"date:     {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        f"machine:  {_cpu_name()}, {len(os.sched_getaffinity(0))} cores, {_memory_gib():.0f} GiB, "
        f"{platform.system()} {platform.release()}",
        f"load:     {load} (1, 5, 15 minutes) before the first run",
        f"versions: Python {platform.python_version()}, {packages}",
        f"commit:   {_commit()}",
    ]


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _commit() -> str:
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", "runtime", "kernels"
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown (no git checkout)"
    return f"{head}, with changes in runtime or kernels" if changed else head


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(_REPOSITORY), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
