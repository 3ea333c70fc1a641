"""The default router: choices, weights, ties, noise, and the balance loss that only gradients
see."""

from __future__ import annotations

import pytest
import torch

from deepopt.errors import InputError
from deepopt.moe.router import TopKRouter


def make_router(*, num_experts: int = 5, top_k: int = 2, **kwargs: object) -> TopKRouter:
    torch.manual_seed(0)
    return TopKRouter(
        8,
        num_experts=num_experts,
        top_k=top_k,
        init_std=1.0,
        **kwargs,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_the_best_experts_get_normalised_fp32_weights(
    score: str, dtype: torch.dtype, top_k: int
) -> None:
    router = make_router(top_k=top_k, score=score).to(dtype)
    x_TD = torch.randn(17, 8).to(dtype)
    weights_TK, ids_TK, tokens_per_expert_E = router(x_TD)
    scores_TE = x_TD.float() @ router.weight.float().t()
    scores_TE = scores_TE.softmax(-1) if score == "softmax" else scores_TE.sigmoid()
    best_TK, best_ids_TK = scores_TE.topk(top_k)
    assert (weights_TK.dtype, ids_TK.dtype) == (torch.float32, torch.int64)
    assert torch.equal(ids_TK, best_ids_TK)
    torch.testing.assert_close(weights_TK, best_TK / best_TK.sum(-1, keepdim=True))
    assert torch.equal(tokens_per_expert_E, torch.bincount(ids_TK.flatten(), minlength=5))


def test_of_equal_scores_the_lower_expert_wins() -> None:
    router = make_router(num_experts=64, top_k=3)
    with torch.no_grad():
        router.weight.copy_(torch.ones(64, 8))
        router.weight[40] = 2.0
    _, ids_TK, _ = router(torch.ones(4, 8))
    assert ids_TK.tolist() == [[40, 0, 1]] * 4


def test_weights_stay_finite_when_every_score_underflows() -> None:
    router = make_router(score="sigmoid")
    with torch.no_grad():
        router.weight.fill_(-100.0)
    weights_TK, _, _ = router(torch.ones(3, 8))
    assert torch.isfinite(weights_TK).all()


def test_padding_is_neither_counted_nor_balanced() -> None:
    router = make_router(auxiliary_coefficient=1.0)
    x_TD = torch.randn(6, 8)
    padding = torch.tensor([False, True, False, False, True, True])
    weights_TK, ids_TK, tokens_per_expert_E = router(x_TD, padding)
    assert ids_TK.shape == (6, 2)
    assert torch.equal(
        tokens_per_expert_E, torch.bincount(ids_TK[~padding].flatten(), minlength=5)
    )
    (with_padding,) = torch.autograd.grad((weights_TK * 0).sum(), router.weight)
    weights_TK, _, _ = router(x_TD[~padding])
    (without,) = torch.autograd.grad((weights_TK * 0).sum(), router.weight)
    torch.testing.assert_close(with_padding, without)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_balance_loss_adds_its_gradient_and_leaves_the_value(score: str) -> None:
    x_TD = torch.randn(32, 8)
    plain = make_router(score=score, auxiliary_coefficient=0.0)
    balanced = make_router(score=score, auxiliary_coefficient=0.3)
    balanced.loss_scale = 0.25
    plain_TK, ids_TK, counts_E = plain(x_TD)
    balanced_TK, _, _ = balanced(x_TD)
    assert torch.equal(plain_TK, balanced_TK)
    logits_TE = x_TD @ plain.weight.t()
    shares_TE = logits_TE.softmax(-1) if score == "softmax" else logits_TE.sigmoid()
    shares_TE = shares_TE / shares_TE.sum(-1, keepdim=True)
    balance = 5 * (counts_E / 64 * shares_TE.mean(0)).sum()
    main = (plain_TK[:, 0] * ids_TK[:, 0]).sum()
    (want,) = torch.autograd.grad(0.25 * (main + 0.3 * balance), plain.weight)
    (got,) = torch.autograd.grad(
        0.25 * (balanced_TK[:, 0] * ids_TK[:, 0]).sum(), balanced.weight
    )
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, torch.zeros_like(got))


def test_the_balance_loss_is_smallest_when_routing_is_even() -> None:
    """Gradient descent on it alone evens out a router that prefers one expert."""
    router = make_router(auxiliary_coefficient=1.0)
    with torch.no_grad():
        router.weight[3] += 0.6
    x_TD = torch.randn(256, 8) + 1.0
    first = router(x_TD)[2].max().item()
    for _ in range(200):
        router.zero_grad()
        weights_TK, _, _ = router(x_TD)
        (weights_TK * 0).sum().backward()
        with torch.no_grad():
            router.weight -= 0.3 * router.weight.grad  # type: ignore[operator]
    assert router(x_TD)[2].max().item() < 0.8 * first


def test_no_balance_loss_outside_training() -> None:
    router = make_router(auxiliary_coefficient=1.0).eval()
    weights_TK, _, _ = router(torch.randn(32, 8))
    (gradient,) = torch.autograd.grad((weights_TK * 0).sum(), router.weight)
    assert not gradient.any()


def test_noise_is_a_function_of_the_seed_and_only_in_training() -> None:
    router = make_router(noise=1.0)
    x_TD = torch.randn(64, 8)
    ids = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        ids.append(router(x_TD)[1])
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    router.eval()
    assert torch.equal(router(x_TD)[1], router(x_TD)[1])


@pytest.mark.parametrize(
    ("kwargs", "word"),
    [
        ({"top_k": 6}, "cannot choose 6 of 5"),
        ({"top_k": 0}, "cannot choose 0 of 5"),
        ({"score": "tanh"}, "tanh"),
        ({"noise": -1.0}, "negative"),
    ],
)
def test_arguments_out_of_range_are_refused(kwargs: dict[str, object], word: str) -> None:
    with pytest.raises(InputError, match=word) as caught:
        make_router(**kwargs)  # type: ignore[arg-type]
    assert caught.value.remedy
