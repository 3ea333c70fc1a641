"""`grouped_linear` against one plain matrix product an expert."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from deepopt_kernels.grouped_linear import grouped_linear
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue

# Even, uneven, with empty experts at each end, a single row, everything on one expert.
COUNTS = [(4, 4, 4), (1, 2, 9), (0, 12, 0), (5, 0, 7), (12, 0, 0), (1, 0, 0)]
SIZES = [(8, 16), (17, 5), (64, 48)]


def layouts(rows: int, features: int, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    yield torch.randn(rows, features).to(dtype)
    yield torch.randn(features, rows).to(dtype).t()
    yield torch.randn(rows, features + 3).to(dtype)[:, :features]


def reference(
    x_TD: torch.Tensor, weight_EHD: torch.Tensor, counts: tuple[int, ...]
) -> torch.Tensor:
    parts = zip(x_TD.split(list(counts)), weight_EHD.unbind(), strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in parts])


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    scale = want.double().norm().item()
    return (got.double() - want.double()).norm().item() / (scale or 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_each_expert_is_a_linear_map_of_its_rows(
    dtype: torch.dtype, counts: tuple[int, ...], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    features, out_features = size
    weight = torch.randn(len(counts), out_features, features).to(dtype).requires_grad_()
    # Same products in the same dtype; only the order of sums inside a product may differ.
    bound = 1e-6 if dtype is torch.float32 else 4e-3
    for layout in layouts(sum(counts), features, dtype):
        results = []
        for op in (reference, grouped_linear):
            weight.grad = None
            x = layout.detach().requires_grad_()
            out = op(x, weight, counts)
            torch.manual_seed(1)
            out.backward(torch.randn(out.shape).to(dtype))
            results.append((out.detach(), x.grad, weight.grad))
        for want, got in zip(*results, strict=True):
            assert got.dtype == want.dtype
            assert got.shape == want.shape
            assert relative_error(got, want) <= bound
        for expert, count in enumerate(counts):
            if count == 0:
                assert not weight.grad[expert].any()  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deferred_weight_gradient_has_the_bits_of_an_immediate_one(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    holder = WeightGradHolder()
    weight = torch.randn(3, 24, 16).to(dtype).requires_grad_()
    start = torch.randn(3, 24, 16).to(dtype)
    gradients = []
    for deferred in (False, True):
        torch.manual_seed(1)
        weight.grad = start.clone()
        for counts in ((3, 0, 5), (8, 1, 0)):
            x = torch.randn(sum(counts), 16).to(dtype).requires_grad_()
            loss = grouped_linear(x, weight, counts, holder=holder).float().square().sum()
            queue = WeightGradQueue(holder)
            if deferred:
                with queue.capture():
                    loss.backward()
                assert len(queue) == 1
                assert x.grad is not None
            else:
                loss.backward()
            queue.flush()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_two_runs_give_the_same_bits() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 32, requires_grad=True)
    weight = torch.randn(4, 48, 32, requires_grad=True)
    runs = []
    for _ in range(2):
        out = grouped_linear(x, weight, (100, 3, 0, 197))
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autograd_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: grouped_linear(x, w, (2, 0, 3)), (x, weight))


@pytest.mark.parametrize(
    ("x_shape", "counts", "word"),
    [((4, 7), (2, 2), "does not fit"), ((4, 3), (2, 1), "counts"), ((4, 3), (5, -1), "counts")],
)
def test_what_does_not_fit_is_refused(
    x_shape: tuple[int, int], counts: tuple[int, int], word: str
) -> None:
    with pytest.raises(ValueError, match=word):
        grouped_linear(torch.zeros(x_shape), torch.zeros(2, 5, 3), counts)
