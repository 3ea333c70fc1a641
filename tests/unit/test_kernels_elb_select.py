"""The choice of experts, its ties, and the counts that come with it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from deepopt_kernels.elb_select import NEAR, elb_select, num_stats

TRITON = """
import torch
from deepopt_kernels.elb_select import elb_select_reference
from deepopt_kernels.elb_select_triton import elb_select_triton
torch.manual_seed(0)
cases = [(37, 12, 3, 64), (5, 8, 8, 64), (33, 64, 8, 64), (9, 3, 2, 0), (1, 1, 1, 64), (0, 4, 2, 64)]
for T, E, K, B in cases:
    logits = torch.randn(T, E) * 4
    ties = logits.round() / 2
    saturated = (3 * logits).softmax(1) + 0.5 / E * logits  # as the router makes them
    for u, unit in ((ties, 1.0), (saturated, 0.01)):
        bias, origin = unit * torch.randn(E), unit * torch.randn(E) * 0.2
        width = unit * (torch.rand(E) * 0.1 + 0.01)
        counted = torch.rand(T) > 0.2
        if T > 20:
            u[3, 2], u[7, 1] = float("nan"), float("inf")
        ids, stats = elb_select_reference(u, bias, origin, width, counted, K, B, 1, 1)
        found_ids, found_stats = elb_select_triton(u, bias, origin, width, counted, top_k=K, num_bins=B)
        fine = torch.isfinite(u).all(1)
        assert torch.equal(ids[fine], found_ids[fine]), (T, E)
        assert torch.equal(stats, found_stats), (T, E)
"""


def select(
    u: torch.Tensor, *, bias: torch.Tensor | None = None, top_k: int = 2, **kwargs: object
):
    e = u.shape[1]
    bias = torch.zeros(e) if bias is None else bias
    return elb_select(
        u, bias, torch.zeros(e), torch.full((e,), 0.1), top_k=top_k, **{"num_bins": 8, **kwargs}
    )


def parts(stats: torch.Tensor, experts: int, bins: int = 8):
    return (
        stats[: experts * bins].view(experts, bins),
        stats[experts * bins :][:experts],
        stats[-2:],
    )


def test_the_bias_chooses_and_equal_scores_go_to_the_lower_index() -> None:
    u = torch.tensor([[1.0, 1.0, 1.0, 1.0], [0.0, 3.0, 2.0, 1.0]])
    ids, _ = select(u)
    assert ids.tolist() == [[0, 1], [1, 2]]
    ids, _ = select(u, bias=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert ids.tolist() == [[3, 0], [3, 1]]


def test_many_equal_scores_are_ordered_as_by_a_stable_sort() -> None:
    u = torch.randint(0, 4, (500, 32), generator=torch.Generator().manual_seed(0)).float()
    expected = u.sort(dim=-1, descending=True, stable=True).indices[:, :5]
    assert torch.equal(select(u, top_k=5)[0], expected)


def test_the_histogram_says_how_much_bias_each_token_would_have_needed() -> None:
    torch.manual_seed(0)
    u, bias = torch.randn(4000, 6), torch.randn(6) * 0.3
    e = torch.zeros(6)
    _, stats = elb_select(u, bias, e, e + 0.02, top_k=2, num_bins=64)
    histogram, load, (tokens, bad) = parts(stats, 6, 64)
    assert (tokens, bad) == (4000, 0)
    assert histogram.sum(1).tolist() == [4000] * 6
    # Tokens that needed less than the present bias are those that the expert got.
    y = bias / 0.02
    position = ((y / (NEAR + y.abs()) + 1) / 2 * 64).long()
    for expert in range(6):
        below = histogram[expert, : position[expert]].sum()
        inside = histogram[expert, position[expert]]
        assert below <= load[expert] <= below + inside


def test_padding_and_bad_scores_are_routed_but_not_counted() -> None:
    u = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))
    u[0, 1] = float("nan")
    u[1, 1] = float("nan")
    counted = torch.tensor([True, False, True, True, False, True])
    ids, stats = select(u, counted_T=counted)
    histogram, load, (tokens, bad) = parts(stats, 4)
    assert ids.shape == (6, 2)
    assert (tokens, bad, int(load.sum())) == (3, 1, 6)
    assert histogram.sum(1).tolist() == [3] * 4


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(0, 4, 2), (5, 1, 1), (5, 3, 3)])
def test_edges(tokens: int, experts: int, top_k: int) -> None:
    ids, stats = select(torch.randn(tokens, experts), top_k=top_k)
    histogram, load, _ = parts(stats, experts)
    assert ids.shape == (tokens, top_k)
    assert load.tolist() == [tokens * top_k // experts] * experts if top_k == experts else True
    assert not histogram.any()  # without a cutoff there is nothing to learn


def test_groups_limit_where_experts_come_from() -> None:
    u = torch.tensor([[9.0, 0.0, 5.0, 5.0, 1.0, 1.0]])
    ids, _ = select(u, num_groups=3, top_groups=1)
    assert ids.tolist() == [[2, 3]]
    ids, _ = select(u, num_groups=3, top_groups=2)
    assert ids.tolist() == [[0, 2]]


def test_it_can_be_traced_without_memory() -> None:
    ids, stats = select(torch.empty(7, 4, device="meta"))
    assert ids.shape == (7, 2)
    assert stats.shape == (num_stats(4, 8),)


def test_the_triton_kernel_agrees_in_the_interpreter() -> None:
    """Not run on a GPU: the interpreter shows the logic, not the code."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", TRITON],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
