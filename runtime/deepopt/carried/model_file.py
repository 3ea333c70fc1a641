"""A script's model in two files: its structure as a pickle, its tensors beside it.

Each worker maps the tensors' file and reads of it only what its layers hold; the structure alone
makes the model on the meta device.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch

from deepopt.carried.object_file import from_bytes, read_bytes, to_bytes
from deepopt.checkpoint.durable import write_file
from deepopt.errors import InputError

_ID = "id"  # ties the two files to each other
_ID_BYTES = 16  # of a uuid, in front of the pickle
_CARRIED = (torch.Tensor, torch.nn.Parameter)  # exactly these: others pickle in their own way


def dump_model(model: torch.nn.Module, path: Path) -> dict[str, str]:
    """Write a model into `path` and, beside it, `path` with the suffix `.pt`.

    Args:
        model: with values; left as it is.
        path: of the structure's file.

    Returns:
        `file` and `sha256`: arguments of `carried.model`.

    Raises:
        InputError: it cannot be pickled, or has no values.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise InputError(
                f"the model's {name} is on the meta device and has no values",
                remedy="give the model values: model.to_empty(device='cpu'), then initialise it",
            )
    content = to_bytes(
        model,
        what="the model",
        make_pickler=partial(_make_pickler, tensors=tensors),
    )
    identity = uuid.uuid4().bytes
    content = identity + content
    write_file(path, pieces=[content])
    torch.save({_ID: identity.hex(), "tensors": tensors}, _tensors_path(path))
    return {"file": str(path), "sha256": hashlib.sha256(content).hexdigest()}


def load_model(file: str, *, sha256: str) -> torch.nn.Module:
    """Read a model back: on the meta device where that is torch's default device, else with values.

    Args:
        file: written by `dump_model`.
        sha256: that it returned.

    Raises:
        InputError: a file is gone or another one, or what it needs is not importable here.
    """
    path = Path(file)
    content = read_bytes(file, sha256=sha256)
    identity, content = content[:_ID_BYTES], content[_ID_BYTES:]
    stored: dict[str, Any] = {}
    if torch.get_default_device().type != "meta":
        stored = _read_tensors(_tensors_path(path))
        if stored[_ID] != identity.hex():
            raise InputError(
                f"{_tensors_path(path)} holds the weights of another model than {file}",
                remedy="restore both from one copy, or start the script again",
            )
    with torch.device("cpu"):  # constants have values, also where parameters have none
        model: torch.nn.Module = from_bytes(
            content,
            source=file,
            load=lambda buffer: _Unpickler(buffer, stored.get("tensors")).load(),
        )
    return model


def _tensors_path(path: Path) -> Path:
    return path.with_suffix(".pt")


def _read_tensors(path: Path) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=True
        )
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise InputError(
            f"cannot read the weights in {path}: {error}",
            remedy="restore the file from a copy, or start the script again",
        ) from error
    return stored


def _make_pickler(buffer: io.BytesIO, *, tensors: dict[str, torch.Tensor]) -> Any:
    from ray import cloudpickle

    keys: dict[int, str] = {}
    kept: list[torch.Tensor] = []  # so that an id stays that of one tensor

    class ModelPickler(cloudpickle.CloudPickler):
        """Leaves tensors to the file beside."""

        def persistent_id(self, value: Any) -> Any:
            if type(value) not in _CARRIED or value.layout is not torch.strided:
                return None
            if id(value) not in keys:
                keys[id(value)] = str(len(keys))
                kept.append(value)
                tensors[keys[id(value)]] = value.detach().cpu().contiguous().clone()
            return (
                keys[id(value)],
                isinstance(value, torch.nn.Parameter),
                tuple(value.shape),
                value.dtype,
                value.requires_grad and value.is_leaf,
                dict(vars(value)) or None,
            )

    make: Any = ModelPickler  # has no types
    return make(buffer)


class _Unpickler(pickle.Unpickler):
    def __init__(self, buffer: io.BytesIO, tensors: dict[str, torch.Tensor] | None) -> None:
        super().__init__(buffer)
        self._tensors = tensors
        self._made: dict[str, torch.Tensor] = {}  # a tensor that is held twice is one tensor

    def persistent_load(self, pid: Any) -> torch.Tensor:
        key, is_parameter, shape, dtype, requires_grad, attributes = pid
        if key not in self._made:
            tensor = (
                torch.empty(shape, dtype=dtype, device="meta")
                if self._tensors is None
                else self._tensors[key]
            )
            if is_parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad)
            else:
                tensor.requires_grad_(requires_grad)
            tensor.__dict__.update(attributes or {})
            self._made[key] = tensor
        return self._made[key]
