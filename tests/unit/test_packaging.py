"""What is in the tree is in the distribution."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_package_of_the_tree_is_listed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = set()
    for source, name in (
        (ROOT / "runtime" / "deepopt", "deepopt"),
        (ROOT / "kernels" / "deepopt_kernels", "deepopt_kernels"),
        (ROOT / "deepopt_cli", "deepopt_cli"),
        (ROOT / "cluster_templates", "deepopt.cluster_templates"),
    ):
        for init in source.rglob("__init__.py"):
            parts = init.parent.relative_to(source).parts
            found.add(".".join((name, *parts)))
    assert set(settings["packages"]) == found


def test_source_roots_are_no_packages() -> None:
    for root in ("runtime", "kernels"):
        assert not (ROOT / root / "__init__.py").exists()


def test_importing_the_package_loads_neither_torch_nor_ray() -> None:
    program = (
        "import sys, deepopt, deepopt_cli.app\n"
        "print(deepopt.__version__, sorted({'torch', 'ray', 'pydantic'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == "[]"
