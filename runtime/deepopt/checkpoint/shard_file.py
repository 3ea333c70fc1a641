"""One safetensors file, streamed: tensors to bytes and back, hashed on the way.

The format is written and read here and not by the `safetensors` package because its calls hold
the interpreter lock while they copy (2.8 s for a 512 MB layer, measured), which would stall
training and heartbeats, because they need the file twice in memory, and because its
tensors are unaligned, which changes the bits of small GEMMs. Any safetensors reader opens
these files. Layers and folders are not known here.
Source: the format's description, https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from deepopt.checkpoint.durable import BLOCK_BYTES, WrittenFile, explained, write_file
from deepopt.checkpoint.manifest import new_digest
from deepopt.errors import CheckpointError

_FORMAT_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _FORMAT_NAMES.items()}
_LENGTH_BYTES = 8  # a little-endian unsigned integer in front of the header
_HEADER_LIMIT_BYTES = 100_000_000  # the format's own limit


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as manifests and skeletons write it, for example `float32`."""
    return str(dtype).removeprefix("torch.")


def write_tensors(
    path: Path, *, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> WrittenFile:
    """Write CPU tensors as one safetensors file and fsync it.

    Args:
        path: the file; replaced when it exists, removed when writing fails.
        tensors: by name; a tensor that is not contiguous is copied first.
        metadata: goes into the header.

    Raises:
        CheckpointError: the disk refused, or a dtype is not in the format.
    """
    # Widest elements first, so that each tensor starts at a multiple of its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        tensor = tensors[name]
        if tensor.dtype not in _FORMAT_NAMES:
            raise CheckpointError(f"cannot write {path}: {name} has dtype {tensor.dtype}")
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _FORMAT_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def pieces() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(_LENGTH_BYTES, "little") + text
        for name in names:
            yield _bytes_of(tensors[name].detach().contiguous())

    return write_file(path, pieces=pieces())


def read_tensors(
    path: Path, *, wanted: Callable[[str], bool], expected: WrittenFile
) -> dict[str, torch.Tensor]:
    """Read tensors of a file and check the whole file against its size and hash.

    Args:
        path: the file.
        wanted: whether to keep the tensor of that name.
        expected: size and digest from the manifest.

    Returns:
        The wanted tensors, each in fresh, contiguous, aligned storage.

    Raises:
        CheckpointError: the file cannot be read or is not the one expected.
    """
    with explained("read", path), path.open("rb", buffering=0) as file:
        source = _HashedFile(path, file=file)
        size_bytes = path.stat().st_size
        if size_bytes != expected.size_bytes:
            raise CheckpointError(
                f"{path} has {size_bytes} bytes, the manifest says {expected.size_bytes}"
            )
        header = _read_header(source, size_bytes=size_bytes)
        tensors = {}
        for name, dtype, shape in header:
            if wanted(name):
                tensors[name] = torch.empty(shape, dtype=dtype)
                source.fill(_bytes_of(tensors[name]))
            else:
                source.skip(prod(shape) * dtype.itemsize)
        if source.digest.hexdigest() != expected.digest:
            raise CheckpointError(
                f"{path} is damaged: its hash is {source.digest.hexdigest()}, "
                f"the manifest says {expected.digest}"
            )
    return tensors


class _HashedFile:
    """A file read once from front to end, hashed while it is read."""

    def __init__(self, path: Path, *, file: io.FileIO) -> None:
        self.path = path
        self.digest = new_digest()
        self._file = file

    def fill(self, target: memoryview) -> None:
        """Read as many bytes as `target` has."""
        for start in range(0, len(target), BLOCK_BYTES):
            block = target[start : start + BLOCK_BYTES]
            filled = 0
            while filled < len(block):
                count = self._file.readinto(block[filled:])
                if not count:
                    raise CheckpointError(f"{self.path} ends too early")
                filled += count
            self.digest.update(block)

    def skip(self, size_bytes: int) -> None:
        """Hash that many bytes without keeping them."""
        scratch = memoryview(bytearray(min(size_bytes, BLOCK_BYTES)))
        while size_bytes > 0:
            self.fill(scratch[:size_bytes])
            size_bytes -= len(scratch[:size_bytes])


def _read_header(
    source: _HashedFile, *, size_bytes: int
) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
    length_bytes = bytearray(_LENGTH_BYTES)
    source.fill(memoryview(length_bytes))
    length = int.from_bytes(length_bytes, "little")
    if length > min(_HEADER_LIMIT_BYTES, size_bytes - _LENGTH_BYTES):
        raise CheckpointError(f"{source.path} is damaged: a header of {length} bytes")
    text = bytearray(length)
    source.fill(memoryview(text))
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        layout = sorted(
            (
                (field["data_offsets"], name, _DTYPES[field["dtype"]], tuple(field["shape"]))
                for name, field in header.items()
            ),
            key=lambda row: row[0],
        )
        end = 0
        for offsets, name, dtype, shape in layout:
            start, end = end, end + prod(shape) * dtype.itemsize
            if offsets != [start, end]:
                raise ValueError(f"{name} lies at {offsets}, want {[start, end]}")
        if _LENGTH_BYTES + length + end != size_bytes:
            raise ValueError(f"tensors end at {end}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{source.path} is damaged: bad header: {error}") from error
    return [(name, dtype, shape) for _, name, dtype, shape in layout]


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)
