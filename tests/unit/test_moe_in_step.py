"""Feedback inside the step: where chunks end, and how even it makes loads that no earlier step foretold."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deepopt.moe import balancer, in_step
from deepopt.moe.in_step import Feedback, chunk_edges, doubling_edges, select_in_chunks

EXPERTS, TOP_K, LENGTH, SEQUENCES = 64, 4, 256, 4


@given(length=st.integers(1, 4096), chunks=st.integers(1, 64))
def test_chunks_cover_the_sequence_and_never_grow_much(length: int, chunks: int) -> None:
    edges = chunk_edges(length, chunks=chunks)
    sizes = [b - a for a, b in itertools.pairwise(edges)]
    assert (edges[0], edges[-1]) == (0, length)
    assert min(sizes) >= 1
    assert len(sizes) <= min(chunks, length)
    assert all(b <= a + 1 for a, b in itertools.pairwise(sizes))  # 1: rounding


def test_the_last_chunks_are_short() -> None:
    sizes = [b - a for a, b in itertools.pairwise(chunk_edges(512, chunks=16))]
    assert len(sizes) == 16
    assert sizes[-1] < sizes[0] / 5


@given(length=st.integers(1, 4096), chunks=st.integers(1, 64))
def test_chunks_that_double_cover_the_sequence(length: int, chunks: int) -> None:
    edges = doubling_edges(length, chunks=chunks)
    assert (edges[0], edges[-1]) == (0, length)
    assert edges == sorted(set(edges))
    assert len(edges) <= math.ceil(math.log2(chunks)) + 2


def test_chunks_double_where_a_bias_is_set_anew() -> None:
    assert doubling_edges(128, chunks=16) == [0, 8, 16, 32, 64, 128]


def loads(
    *,
    devices: int,
    alpha: float = 0.3,
    padding: int = 0,
    share_E: torch.Tensor | None = None,
    solves: bool = False,
    doubles: bool = False,
) -> torch.Tensor:
    """Of a micro-batch whose tokens prefer some experts by more than any bias knows."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SEQUENCES, LENGTH, EXPERTS, generator=generator)
    wanted = 0.4 * torch.randn(EXPERTS, generator=generator)
    wanted += 0.4 * torch.linspace(-1, 1, EXPERTS)  # whole devices, too
    counted_T = None
    if padding:
        counted_T = torch.ones(SEQUENCES, LENGTH, dtype=torch.bool)
        counted_T[:, LENGTH - padding :] = False
        counted_T = counted_T.flatten()
    _, stats = select_in_chunks(
        (noise + wanted).view(-1, EXPERTS),
        torch.zeros(EXPERTS),
        torch.zeros(EXPERTS),
        torch.full((EXPERTS,), 0.05),
        top_k=TOP_K,
        num_bins=0,
        counted_T=counted_T,
        sequence_length=LENGTH,
        feedback=Feedback(
            alpha=alpha,
            chunks=16,
            blocks=balancer.device_blocks(EXPERTS, devices),
            slope_E=torch.full((EXPERTS,), 0.5),
            share_E=torch.full((EXPERTS,), 1 / EXPERTS) if share_E is None else share_E,
            solves=solves,
            doubles=doubles,
        ),
    )
    return stats[-(EXPERTS + 2) : -2].double()


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_devices_are_even_although_demand_is_not(alpha: float) -> None:
    without = balancer.straggler_factor(loads(devices=1).numpy(), devices=8)
    assert without > 1.5
    found = loads(devices=8, alpha=alpha)
    assert balancer.straggler_factor(found.numpy(), devices=8) < 1.03


def test_experts_are_even_to_less_than_the_noise_of_one_chunk() -> None:
    found = loads(devices=EXPERTS, alpha=1.0)
    assert found.mean() == 64
    assert found.std() < 2.0  # an even chunk sends 4 choices to an expert, give or take 2


def test_padding_at_the_end_leaves_loads_even() -> None:
    found = loads(devices=8, padding=LENGTH // 3)
    assert found.sum() == SEQUENCES * (LENGTH - LENGTH // 3) * TOP_K
    assert balancer.straggler_factor(found.numpy(), devices=8) < 1.1


def test_shares_that_are_not_equal_are_met() -> None:
    share_E = torch.linspace(1.0, 3.0, EXPERTS)
    share_E /= share_E.sum()
    found = loads(devices=EXPERTS, share_E=share_E)
    assert ((found / found.sum()) / share_E - 1).abs().max() < 0.2


def test_a_warm_up_that_nobody_asked_more_of_takes_few_choices_and_leaves_loads_nearly_even(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def counted(u_TE: torch.Tensor, *args: object, **kwargs: object) -> object:
        calls.append(len(u_TE))
        return select(u_TE, *args, **kwargs)  # type: ignore[arg-type]

    select = in_step.elb_select
    monkeypatch.setattr(in_step, "elb_select", counted)
    without = balancer.max_violation(loads(devices=1).numpy())
    calls.clear()
    found = loads(devices=EXPERTS, solves=True, doubles=True)
    assert calls == [64, 64, 128, 256, 512]
    assert balancer.max_violation(found.numpy()) < 0.5 < without - 1.0
