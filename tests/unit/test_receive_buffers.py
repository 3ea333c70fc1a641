"""Buffers of received tensors are used again exactly when nobody refers to them any more."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from deepopt.pipeline.receive_buffers import ReceiveBuffers
from deepopt.pipeline.transport import TensorSpec

SPEC = TensorSpec((3, 2), torch.float32, False)


def make_buffers() -> ReceiveBuffers[int]:
    moments = itertools.count(1)
    return ReceiveBuffers(
        allocate=lambda spec: torch.empty(spec.shape, dtype=spec.dtype),
        mark=lambda: next(moments),
    )


def test_a_tensor_that_is_gone_leaves_its_buffer_to_the_next() -> None:
    buffers = make_buffers()
    first, at_once = buffers.take(SPEC)
    place = first.data_ptr()
    assert at_once is None
    del first
    second, free_from = buffers.take(SPEC)
    assert second.data_ptr() == place
    assert free_from == 1
    assert buffers.num_buffers == 1


def test_a_view_keeps_the_buffer() -> None:
    buffers = make_buffers()
    first, _ = buffers.take(SPEC)
    view = first[1]
    del first
    second, _ = buffers.take(SPEC)
    second.fill_(7.0)
    assert view.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_what_a_graph_needs_for_its_backward_keeps_the_buffer_until_then() -> None:
    buffers = make_buffers()
    leaf, _ = buffers.take(SPEC)
    leaf.fill_(3.0)
    output = (leaf.requires_grad_() ** 2).sum()
    gradient_of = [leaf]
    del leaf
    buffers.take(SPEC)[0].fill_(5.0)
    output.backward()
    assert gradient_of[0].grad is not None
    assert gradient_of[0].grad.eq(6.0).all()
    del output
    gradient_of.clear()
    assert buffers.num_buffers == 2
    held = [buffers.take(SPEC)[0] for _ in range(2)]
    assert buffers.num_buffers == len(held)


def test_a_tensor_begins_with_its_own_version() -> None:
    buffers = make_buffers()
    first, _ = buffers.take(SPEC)
    first.add_(1.0)
    del first
    assert buffers.take(SPEC)[0]._version == 0


def test_shapes_and_dtypes_have_buffers_of_their_own() -> None:
    buffers = make_buffers()
    for spec in (
        SPEC,
        TensorSpec((2, 3), torch.float32, False),
        TensorSpec((3, 2), torch.bfloat16, False),
    ):
        tensor, _ = buffers.take(spec)
        assert (tuple(tensor.shape), tensor.dtype) == (spec.shape, spec.dtype)
    assert buffers.num_buffers == 3


def test_forgotten_buffers_are_never_given_out_again() -> None:
    buffers = make_buffers()
    first, _ = buffers.take(SPEC)
    buffers.forget()
    assert buffers.take(SPEC)[0].data_ptr() != first.data_ptr()


@given(st.lists(st.integers(0, 5), max_size=40))
def test_no_two_tensors_share_a_buffer_and_no_more_are_made_than_were_held_at_once(
    let_go: list[int],
) -> None:
    buffers = make_buffers()
    held: list[torch.Tensor] = []
    most = 0
    for index in let_go:
        held.append(buffers.take(SPEC)[0])
        most = max(most, len(held))
        assert len({tensor.data_ptr() for tensor in held}) == len(held)
        if index < len(held):
            del held[index]
    assert buffers.num_buffers == most
