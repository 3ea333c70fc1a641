"""Tokens to experts and back, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch

from deepopt.moe.dispatch import gather_from_experts, plan_dispatch, scatter_to_experts

CASES = [(1, 1, 1), (7, 1, 4), (16, 2, 8), (33, 4, 4), (5, 3, 64)]  # tokens, choices, experts


def random_ids(tokens: int, choices: int, experts: int) -> torch.Tensor:
    return torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_sorted_by_expert_and_by_token_within_one(case: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    tokens, _, experts = case
    ids_TK = random_ids(*case)
    dispatch = plan_dispatch(ids_TK, num_experts=experts)
    x_TD = torch.arange(tokens, dtype=torch.float32).unsqueeze(1)
    want = [t for e in range(experts) for t in range(tokens) if e in ids_TK[t]]
    assert scatter_to_experts(x_TD, dispatch).squeeze(1).tolist() == want
    assert list(dispatch.counts) == torch.bincount(ids_TK.flatten(), minlength=experts).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_token_gets_the_weighted_sum_of_its_experts(
    case: tuple[int, int, int], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    tokens, choices, experts = case
    ids_TK = random_ids(*case)
    dispatch = plan_dispatch(ids_TK, num_experts=experts)
    x_TD = torch.randn(tokens, 6).to(dtype)
    weights_TK = torch.rand(tokens, choices)
    factor_E = 2.0 ** torch.arange(experts).remainder(5)  # exact in bf16
    rows_RD = scatter_to_experts(x_TD, dispatch)
    factor_R = torch.repeat_interleave(factor_E, torch.tensor(dispatch.counts))
    out_TD = gather_from_experts(
        rows_RD * factor_R.unsqueeze(1).to(dtype), weights_TK, dispatch
    )
    want_TD = x_TD.float() * (weights_TK * factor_E[ids_TK]).sum(1, keepdim=True)
    assert out_TD.dtype == dtype
    bound = 1e-6 if dtype is torch.float32 else 2**-8  # one rounding at the end
    torch.testing.assert_close(out_TD.float(), want_TD, rtol=bound, atol=1e-6)


@pytest.mark.parametrize("case", CASES[:4], ids=str)
def test_autograd_agrees_with_finite_differences(case: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    tokens, choices, experts = case
    dispatch = plan_dispatch(random_ids(*case), num_experts=experts)
    x_TD = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    y_RD = torch.randn(tokens * choices, 3, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(tokens, choices, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter_to_experts(x, dispatch), (x_TD,))
    assert torch.autograd.gradcheck(
        lambda y, w: gather_from_experts(y, w, dispatch), (y_RD, weights_TK)
    )


def test_gradients_are_the_same_bits_on_every_run() -> None:
    torch.manual_seed(0)
    dispatch = plan_dispatch(random_ids(512, 4, 16), num_experts=16)
    x_TD = torch.randn(512, 32, requires_grad=True)
    weights_TK = torch.rand(512, 4, requires_grad=True)
    runs = []
    for _ in range(3):
        rows_RD = scatter_to_experts(x_TD, dispatch).square()
        out_TD = gather_from_experts(rows_RD, weights_TK, dispatch)
        runs.append(torch.autograd.grad(out_TD.sin().sum(), (x_TD, weights_TK)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
