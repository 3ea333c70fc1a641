"""What others found out of weight gradients, as far as it holds for the layers of this process.

A trial's outcome depends on the layer's code, on the inputs, and on the device and torch that it ran on.
The head keeps outcomes by these, over launches too, and knows nothing of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import sysconfig
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import FunctionType, ModuleType

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.weight_ways import Verdict, WaysByConditions

# Sections of the job that decide on layers and their inputs.
_SECTIONS = ("model", "data", "elb", "precision")
_DIGITS = 16
_INSTALLED = ("site-packages", "dist-packages")
_VERSIONED = ("torch", "deepopt", "deepopt_kernels")  # the conditions name their versions


class LayerWays:
    """The conditions of a trial in this process, and the code of its layers.

    Args:
        job: the resolved job.
        product: of the device.
        layers: as they were built.

    Attributes:
        conditions: all that a trial depends on but the layer's code; equal where it would come out the same.
    """

    def __init__(self, job: JobConfig, *, product: str, layers: Iterable[Layer]) -> None:
        sections = {name: getattr(job, name).model_dump(mode="json") for name in _SECTIONS}
        inputs = [sections, job.training.microbatch_size, job.worker.threads]
        factory = _code_behind({job.model.factory.partition(":")[0]})
        digest = _digest(json.dumps(inputs, sort_keys=True).encode() + factory.encode())
        deepopt = version("deepopt-cuda")
        self.conditions = f"{product}, torch {torch.__version__}, deepopt {deepopt}, {digest}"
        self._codes = {layer.name: code_of(layer.module) for layer in layers}

    def fitting(self, known: WaysByConditions) -> dict[str, Verdict]:
        """Of what is known, what holds here, by the layer's name."""
        return {
            name: verdict
            for name, verdict in known.get(self.conditions, {}).items()
            if verdict.code and verdict.code == self._codes.get(name)
        }

    def signed(self, ways: Mapping[str, Verdict]) -> dict[str, Verdict]:
        """What was found out here, with the code that it was found out of."""
        return {
            name: replace(verdict, code=self._codes.get(name, ""))
            for name, verdict in ways.items()
        }


def code_of(module: torch.nn.Module) -> str:
    """A hash of the source files of the classes that a layer is made of, and of what these use, as far as it
    is the user's own; of installed packages the version counts, torch is left out.

    What a function imports when it is called is not seen.

    Args:
        module: the layer.

    Returns:
        Empty where a class is in no file.
    """
    names = {type(part).__module__ for part in module.modules()}
    names = {name for name in names if _package(name) != "torch"}
    if None in map(_code_of_module, names):
        return ""
    return _code_behind(names)


def _code_behind(names: Collection[str]) -> str:
    """A hash of some modules and of the user's modules that they use, directly or through others."""
    todo, seen = set(names), set[str]()
    while todo:
        seen.add(name := todo.pop())
        todo |= {other for other in _used_by(name) if _is_users(other)} - seen
    words = [f"{name} {_code_of_module(name)} {_version(name)}" for name in sorted(seen)]
    return _digest("\n".join(words).encode())


def _used_by(name: str) -> set[str]:
    """Modules that what stands in a module comes from."""
    module = sys.modules.get(name)
    used = set()
    for value in [] if module is None else list(vars(module).values()):
        if isinstance(value, ModuleType):
            other = vars(value).get("__name__")
        elif isinstance(value, (type, FunctionType)):
            other = value.__module__
        else:
            other = type(value).__module__
        if isinstance(other, str):
            used.add(other)
    return used


@functools.cache
def _is_users(name: str) -> bool:
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None or _package(name) in _VERSIONED:
        return False
    path = Path(file)
    is_installed = any(folder in path.parts for folder in _INSTALLED)
    return not is_installed and not path.is_relative_to(sysconfig.get_path("stdlib"))


def _version(name: str) -> str:
    """Of the package that a module belongs to; empty where it says none."""
    package = sys.modules.get(_package(name))
    return "" if package is None else str(vars(package).get("__version__", ""))


def _package(name: str) -> str:
    return name.partition(".")[0]


@functools.cache
def _code_of_module(name: str) -> str | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        return None if file is None else _digest(Path(file).read_bytes())
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest()
