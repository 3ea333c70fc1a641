"""Any cut of any tensor merges back to the same bits, also through files of several writers."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.checkpoint.layer_files import read_layer, write_layer
from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import TensorSlice
from deepopt.checkpoint.reshard import cut, merge
from deepopt.errors import CheckpointError
from support.checkpoints import assert_same_state, bits, make_manifest

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool])


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> list[TensorSlice]:
    """Slices that tile a shape, made by cutting some slice in two a few times."""
    slices = [TensorSlice.whole(shape)]
    for _ in range(draw(st.integers(0, 5)) if shape else 0):
        index = draw(st.integers(0, len(slices) - 1))
        dim = draw(st.integers(0, len(shape) - 1))
        old = slices.pop(index)
        at = draw(st.integers(0, old.extent[dim]))
        low, high = list(old.extent), list(old.extent)
        low[dim], high[dim] = at, old.extent[dim] - at
        offset = list(old.offset)
        offset[dim] += at
        slices += [
            TensorSlice(global_shape=shape, offset=old.offset, extent=tuple(low)),
            TensorSlice(global_shape=shape, offset=tuple(offset), extent=tuple(high)),
        ]
    return draw(st.permutations(slices))


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * 3).to(dtype)


@settings(deadline=None, derandomize=True)
@given(st.data(), shapes, dtypes)
def test_slices_merge_back_to_the_same_bits(
    data: st.DataObject, shape: tuple[int, ...], dtype: torch.dtype
):
    tensor = random_tensor(shape, dtype)
    parts = [(part, cut(tensor, part=part)) for part in data.draw(cuts(shape))]
    merged = merge("x", parts=parts)
    assert (merged.dtype, merged.shape) == (dtype, tensor.shape)
    assert bits(merged) == bits(tensor)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.data(), st.lists(st.tuples(shapes, dtypes), min_size=1, max_size=3))
def test_slices_of_many_writers_are_read_as_whole_tensors(
    data: st.DataObject, kinds: list[tuple[tuple[int, ...], torch.dtype]]
):
    tensors = {f"parameter/{i}": random_tensor(*kind) for i, kind in enumerate(kinds)}
    held: dict[int, dict[str, TensorSlice]] = {}
    for key, tensor in tensors.items():
        for writer, part in enumerate(data.draw(cuts(tuple(tensor.shape)))):
            held.setdefault(writer, {})[key] = part
    with TemporaryDirectory() as name:
        folder = Path(name)
        shards = [
            write_layer(
                folder,
                state=LayerState(
                    layer="blocks.0",
                    tensors={key: cut(tensors[key], part=part) for key, part in slices.items()},
                    slices=slices,
                ),
                writer=writer,
                step=1,
                generation=1,
            )
            for writer, slices in held.items()
        ]
        manifest = make_manifest(1, shards=shards)
        found = read_layer(folder, manifest=manifest, layer="blocks.0")
    assert_same_state(found, LayerState(layer="blocks.0", tensors=tensors))
    assert not found.slices


def test_a_hole_never_becomes_uninitialised_memory():
    tensor = torch.ones(4)
    first = TensorSlice(global_shape=(4,), offset=(0,), extent=(2,))
    with pytest.raises(CheckpointError, match="hold 2 of 4 elements"):
        merge("x", parts=[(first, cut(tensor, part=first))])
