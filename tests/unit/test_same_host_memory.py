"""Memory that two workers share is used again only when nobody refers to what lies in it."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from deepopt.pipeline.same_host_memory import (
    ALIGNMENT_BYTES,
    IncomingSlots,
    Layout,
    OutgoingSlots,
    Slot,
    layout_of,
    new_slot,
    size_of,
    tensors_in,
)

MIXED = (
    torch.arange(7, dtype=torch.int64),
    torch.randn(3, 5).bfloat16(),
    torch.tensor(2.5, dtype=torch.float64),  # no dimension
    torch.empty(0, 4),
    torch.randn(4, 6).t(),  # not contiguous
)


class Ends:
    """Both ends in one process: what is sent is found at once."""

    def __init__(self) -> None:
        self.outgoing, self.incoming = OutgoingSlots(), IncomingSlots()

    def send(self, *tensors: torch.Tensor) -> tuple[Slot, Layout]:
        layout = layout_of(tensors)
        slot, descriptor = self.outgoing.take(size_of(layout))
        if descriptor is not None:
            self.incoming.add(slot.number, descriptor)
            os.close(descriptor)
        for view, tensor in zip(slot.views(layout).tensors, tensors, strict=True):
            view.copy_(tensor)
        return slot, layout

    def pass_on(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        slot, layout = self.send(*tensors)
        return self.incoming.hand_out(slot.number, layout)


def num_mappings() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:deepopt-tensors")


def num_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_tensors_arrive_bit_by_bit_each_in_a_storage_of_its_own() -> None:
    arrived = Ends().pass_on(*MIXED)
    for one, sent in zip(arrived, MIXED, strict=True):
        assert (one.shape, one.dtype) == (sent.shape, sent.dtype)
        assert torch.equal(one, sent)
        assert one.is_contiguous()
        assert one.untyped_storage().nbytes() == sent.numel() * sent.element_size()
        assert one._version == 0
        assert one.numel() == 0 or one.data_ptr() % ALIGNMENT_BYTES == 0


def test_a_slot_is_used_again_only_when_its_tensors_are_gone() -> None:
    ends = Ends()
    (first,) = ends.pass_on(torch.full((4,), 1.0))
    part = first[1:].view(3)  # a view keeps the memory as well
    del first
    ends.incoming.free_unused()
    (second,) = ends.pass_on(torch.full((4,), 2.0))
    assert ends.outgoing.num_slots == 2
    assert part.tolist() == [1.0] * 3
    del part
    ends.incoming.free_unused()
    (third,) = ends.pass_on(torch.full((4,), 3.0))
    assert ends.outgoing.num_slots == 2
    assert (second.tolist(), third.tolist()) == ([2.0] * 4, [3.0] * 4)
    assert third._version == 0


def test_what_autograd_saved_keeps_its_slot() -> None:
    ends = Ends()
    weight = torch.ones(4, requires_grad=True)
    (arrived,) = ends.pass_on(torch.full((4,), 5.0))
    product = (weight * arrived).sum()
    del arrived
    ends.incoming.free_unused()
    ends.pass_on(torch.zeros(4))
    product.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [5.0] * 4


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 7), st.sampled_from([1, 40, 3000])), max_size=40))
def test_what_is_kept_never_changes_and_slots_are_as_few_as_messages_kept(
    steps: list[tuple[int, int]],
) -> None:
    ends = Ends()
    kept: dict[int, tuple[torch.Tensor, int]] = {}
    most: dict[int, int] = {}
    for number, (place, length) in enumerate(steps):
        kept.pop(place, None)
        ends.incoming.free_unused()
        (arrived,) = ends.pass_on(torch.full((length,), number))
        kept[place] = arrived, number
        del arrived
        for size in (1, 40, 3000):
            count = sum(len(tensor) == size for tensor, _ in kept.values())
            most[size] = max(most.get(size, 0), count)
        assert all(tensor.unique().tolist() == [value] for tensor, value in kept.values())
    assert ends.outgoing.num_slots <= sum(most.values())


def test_memory_goes_with_its_last_tensor_and_leaves_no_descriptor_open() -> None:
    before = num_mappings(), num_descriptors()
    ends = Ends()
    (kept,) = ends.pass_on(torch.full((4,), 7.0))
    assert num_descriptors() == before[1]
    del ends
    assert num_mappings() == before[0] + 1
    assert kept.tolist() == [7.0] * 4
    del kept
    assert num_mappings() == before[0]


def test_memory_of_one_message_goes_with_its_tensors() -> None:
    before = num_mappings()
    layout = layout_of(MIXED)
    slot, descriptor = new_slot(size_of(layout), number=0)
    os.close(descriptor)
    *_, last = tensors_in(slot.memory, layout)
    del slot, _
    assert num_mappings() == before + 1
    last.fill_(1.0)
    del last
    assert num_mappings() == before


def test_where_no_memory_is_left_the_system_says_so() -> None:
    with pytest.raises(OSError, match=r"Cannot allocate|too large|Invalid|No space"):
        new_slot(1 << 60, number=0)
