"""One safetensors file: readable by everyone, aligned when read, errors that name the file."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch

from deepopt.checkpoint.durable import WrittenFile, hash_file
from deepopt.checkpoint.shard_file import read_tensors, write_tensors
from deepopt.errors import CheckpointError
from support.checkpoints import bits

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint64,
    torch.uint32,
    torch.uint16,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def every_kind() -> dict[str, torch.Tensor]:
    tensors = {str(dtype): torch.arange(5).to(dtype) for dtype in DTYPES}
    return {
        **tensors,
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "one byte": torch.tensor([True]),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
        "läyer/ü": torch.ones(3, requires_grad=True),
    }


def read_all(path: Path, written: WrittenFile) -> dict[str, torch.Tensor]:
    return read_tensors(path, wanted=lambda _: True, expected=written)


def test_every_dtype_and_shape_comes_back_bit_for_bit_and_aligned(tmp_path: Path):
    tensors = every_kind()
    written = write_tensors(tmp_path / "x", tensors=tensors, metadata={"format": "pt"})
    found = read_all(tmp_path / "x", written)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(found[name]) == bits(tensor.detach()), name
        assert found[name].is_contiguous()
        assert found[name].data_ptr() % 64 == 0, name
        assert not found[name].requires_grad


def test_the_safetensors_package_reads_the_same(tmp_path: Path):
    tensors = every_kind()
    write_tensors(tmp_path / "x", tensors=tensors, metadata={"format": "pt", "step": "5"})
    found = safetensors.torch.load_file(tmp_path / "x")
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor.detach()) for name, tensor in tensors.items()
    }
    with safetensors.safe_open(tmp_path / "x", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "step": "5"}


def test_what_the_safetensors_package_writes_is_read(tmp_path: Path):
    tensors = {"a": torch.randn(3, 5), "b": torch.ones(7, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, tmp_path / "x")
    found = read_all(tmp_path / "x", hash_file(tmp_path / "x"))
    assert {name: bits(tensor) for name, tensor in found.items()} == {
        name: bits(tensor) for name, tensor in tensors.items()
    }


def test_tensors_larger_than_a_block_are_whole(tmp_path: Path):
    tensors = {"big": torch.arange(3_000_000), "small": torch.ones(1)}
    written = write_tensors(tmp_path / "x", tensors=tensors, metadata={})
    assert written == hash_file(tmp_path / "x")
    assert torch.equal(read_all(tmp_path / "x", written)["big"], tensors["big"])
    only = read_tensors(tmp_path / "x", wanted=lambda name: name == "small", expected=written)
    assert only.keys() == {"small"}


def test_damage_in_a_tensor_that_is_not_wanted_is_detected_too(tmp_path: Path):
    path = tmp_path / "x"
    written = write_tensors(path, tensors={"a": torch.ones(9), "b": torch.ones(9)}, metadata={})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_tensors(path, wanted=lambda name: name == "a", expected=written)


def test_a_bad_header_is_damage_and_not_a_crash(tmp_path: Path):
    path = tmp_path / "x"
    written = write_tensors(path, tensors={"a": torch.ones(9)}, metadata={})
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (0, 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(CheckpointError, match="damaged"):
                read_all(path, written)


def test_tensors_lie_at_multiples_of_their_element_size(tmp_path: Path):
    write_tensors(tmp_path / "x", tensors=every_kind(), metadata={"odd": "length"})
    content = (tmp_path / "x").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    for name, tensor in every_kind().items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name


def test_a_hole_between_tensors_is_refused_even_when_the_hash_is_right(tmp_path: Path):
    path = tmp_path / "x"
    tensors = {"a": torch.ones(2), "b": torch.zeros(2)}
    write_tensors(path, tensors=tensors, metadata={})
    path.write_bytes(path.read_bytes().replace(b"[8,16]", b"[9,17]"))
    with pytest.raises(CheckpointError, match=r"b lies at \[9, 17\], want \[8, 16\]"):
        read_all(path, hash_file(path))


def test_a_dtype_outside_the_format_is_named(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"a has dtype torch\.complex128"):
        write_tensors(
            tmp_path / "x", tensors={"a": torch.ones(1, dtype=torch.complex128)}, metadata={}
        )
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("call", ["open", "write", "fsync", "close"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_that_refuses_is_named_and_leaves_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    real_close = os.close

    def refuse(*arguments: object, **_: object) -> None:
        if call == "close":
            real_close(arguments[0])  # type: ignore[arg-type]
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError) as caught:
        write_tensors(tmp_path / "x", tensors={"a": torch.ones(9)}, metadata={})
    monkeypatch.undo()
    assert str(tmp_path / "x") in caught.value.message
    assert errno.errorcode[number] in caught.value.message
    assert os.strerror(number) in caught.value.message
    assert caught.value.remedy
    assert not (tmp_path / "x").exists()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda fd, block: real_write(fd, bytes(block)[:7]))
    written = write_tensors(tmp_path / "x", tensors={"a": torch.arange(99)}, metadata={})
    monkeypatch.undo()
    assert torch.equal(read_all(tmp_path / "x", written)["a"], torch.arange(99))
