"""What a script brings along, carried to the workers: its model, loss, optimizer and data.

The script pickles them into the run directory; job.yaml names the functions here by import path, with
file and hash as arguments. So workers, `deepopt resume` and everybody else find them as they find any
other factory, and a run directory holds all that its job needs.
"""

from __future__ import annotations

from typing import Any

import torch

from deepopt.carried.model_file import load_model
from deepopt.carried.object_file import load_object

__all__ = ["dataset", "loss", "model", "optimizer", "scheduler"]


def model(*, file: str, sha256: str) -> torch.nn.Module:
    """The script's model, with the weights that it had; on the meta device without them.

    Args:
        file: written by `model_file.dump_model`.
        sha256: of the file.
    """
    return load_model(file, sha256=sha256)


def dataset(*, file: str, sha256: str) -> Any:
    """A new copy of the script's dataset: each caller has a position of its own.

    Args:
        file: written by `object_file.dump_object`.
        sha256: of the file.
    """
    return load_object(file, sha256=sha256)


def loss(output: Any, targets: torch.Tensor, *, file: str, sha256: str) -> torch.Tensor:
    """The script's loss of (output, targets).

    Args:
        output: of the model.
        targets: as the data gives them.
        file: written by `object_file.dump_object`.
        sha256: of the file.
    """
    result: torch.Tensor = _kept(file, sha256)(output, targets)
    return result


def optimizer(parameters: Any, *, file: str, sha256: str) -> Any:
    """What the script's factory makes of the parameters of a layer.

    Args:
        parameters: (name, parameter) pairs.
        file: written by `object_file.dump_object`.
        sha256: of the file.
    """
    factory, kwargs = _kept(file, sha256)
    return factory(parameters, **kwargs)


def scheduler(of: Any, *, file: str, sha256: str) -> Any:
    """What the script's factory makes of an optimizer.

    Args:
        of: the optimizer.
        file: written by `object_file.dump_object`.
        sha256: of the file.
    """
    factory, kwargs = _kept(file, sha256)
    return factory(of, **kwargs)


_objects: dict[str, Any] = {}


def _kept(file: str, sha256: str) -> Any:
    """An object that is asked for again and again: loaded once a process."""
    if sha256 not in _objects:
        _objects[sha256] = load_object(file, sha256=sha256)
    return _objects[sha256]
