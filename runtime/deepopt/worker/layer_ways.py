"""What others found out of weight gradients, as far as it holds for the layers of this process.

A trial's outcome depends on the layer's code, on the inputs, and on the device and torch that it ran on.
The head keeps outcomes by these, over launches too, and knows nothing of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.weight_ways import Verdict, WaysByConditions

# Sections of the job that decide on layers and their inputs.
_SECTIONS = ("model", "data", "elb", "precision")
_DIGITS = 16


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
        factory = _code_of_module(job.model.factory.partition(":")[0]) or ""
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
    """A hash of the source files of the classes that a layer is made of, torch's own left out.

    Args:
        module: the layer.

    Returns:
        Empty where a class is in no file.
    """
    names = {type(part).__module__ for part in module.modules()}
    codes = [_code_of_module(name) for name in sorted(names) if name.split(".")[0] != "torch"]
    if None in codes:
        return ""
    return _digest("".join(code or "" for code in codes).encode())


@functools.cache
def _code_of_module(name: str) -> str | None:
    file = getattr(sys.modules.get(name), "__file__", None)
    try:
        return None if file is None else _digest(Path(file).read_bytes())
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=_DIGITS // 2).hexdigest()
