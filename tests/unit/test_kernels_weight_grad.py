"""`linear` and its queue: bits of nn.Linear, now or later."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from deepopt_kernels.weight_grad import (
    DeferringLinear,
    WeightGradHolder,
    WeightGradQueue,
    defer_linears,
    linear,
)

# (tokens, in, out): one token, odd sizes, vector widths, a real layer
SIZES = [(1, 8, 16), (3, 17, 5), (1, 1, 3), (64, 64, 48), (16, 128, 256)]


def inputs(dtype: torch.dtype, *, tokens: int, features: int) -> Iterator[torch.Tensor]:
    """Every layout that an activation may have: row- and column-major, sliced, expanded."""
    yield torch.randn(tokens, features).to(dtype)
    yield torch.randn(features, tokens).to(dtype).t()
    yield torch.randn(tokens, features + 5).to(dtype)[:, :features]
    yield torch.randn(2 * tokens, features).to(dtype)[::2]
    yield torch.randn(1, features).to(dtype).expand(tokens, features)
    yield torch.randn(4, tokens, features).to(dtype)
    yield torch.randn(tokens, 4, features).to(dtype).transpose(0, 1)
    yield torch.randn(4, features, tokens).to(dtype).transpose(1, 2)
    yield torch.randn(4, tokens, features + 3).to(dtype)[..., :features]
    yield torch.randn(2, tokens, 4, features).to(dtype).transpose(1, 2)


def output_gradients(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[torch.Tensor]:
    yield torch.randn(shape).to(dtype)
    yield torch.ones((), dtype=dtype).expand(shape)  # what sum() sends back
    yield torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)


def run(
    module: torch.nn.Linear,
    x: torch.Tensor,
    grad: torch.Tensor,
    queue: WeightGradQueue | None = None,
) -> list[torch.Tensor | None]:
    """Output, input gradient, weight gradient and bias gradient of one pass."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = module(x)
    if queue is None:
        out.backward(grad)
    else:
        with queue.capture():
            out.backward(grad)
        assert module.weight.grad is None
        queue.flush()
    bias = None if module.bias is None else module.bias.grad
    return [out.detach(), x.grad, module.weight.grad, bias]


def assert_same_bits(
    got: list[torch.Tensor | None], want: list[torch.Tensor | None], case: object
) -> None:
    for name, a, b in zip(("out", "x", "weight", "bias"), got, want, strict=True):
        assert (a is None) == (b is None), (name, case)
        if a is not None and b is not None:
            assert a.dtype == b.dtype, (name, case)
            assert torch.equal(a, b), (name, case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_linear_gives_the_bits_of_nn_linear_now_and_later(
    dtype: torch.dtype, bias: bool, size: tuple[int, int, int]
) -> None:
    torch.manual_seed(0)
    tokens, features, out_features = size
    plain = torch.nn.Linear(features, out_features, bias=bias).to(dtype)
    ours = copy.deepcopy(plain)
    holder = WeightGradHolder()
    defer_linears(ours, holder)
    for x in inputs(dtype, tokens=tokens, features=features):
        for grad in output_gradients((*x.shape[:-1], out_features), dtype):
            want = run(plain, x, grad)
            case = (x.shape, x.stride(), grad.stride())
            assert_same_bits(run(ours, x, grad), want, case)
            assert_same_bits(run(ours, x, grad, WeightGradQueue(holder)), want, case)


@pytest.mark.parametrize("deferred", [False, True])
def test_gradients_of_micro_batches_add_up_as_autograd_adds_them(deferred: bool) -> None:
    torch.manual_seed(0)
    plain = torch.nn.Sequential(
        torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8)
    )
    ours = copy.deepcopy(plain)
    holder = WeightGradHolder()
    defer_linears(ours, holder)
    queues = []
    for _ in range(3):
        x = torch.randn(5, 16)
        plain(x).square().sum().backward()
        queues.append(WeightGradQueue(holder))
        with queues[-1].capture() if deferred else torch.enable_grad():
            ours(x).square().sum().backward()
    for queue in queues:
        queue.flush()
    for (name, want), got in zip(plain.named_parameters(), ours.parameters(), strict=True):
        assert torch.equal(got.grad, want.grad), name  # type: ignore[arg-type]


def test_a_gradient_adds_in_place_where_one_already_lies() -> None:
    module = torch.nn.Linear(4, 4, bias=False)
    holder = WeightGradHolder()
    defer_linears(module, holder)
    row = torch.zeros(4, 4)
    module.weight.grad = row
    queue = WeightGradQueue(holder)
    with queue.capture():
        module(torch.ones(2, 4)).sum().backward()
    assert torch.equal(row, torch.zeros(4, 4))
    queue.flush()
    assert module.weight.grad is row
    assert torch.equal(row, torch.full((4, 4), 2.0))


@pytest.mark.parametrize("uses", [2, 3])
def test_uses_of_one_weight_are_summed_before_they_are_added(uses: int) -> None:
    torch.manual_seed(1)
    start = torch.randn(24, 24)
    x = torch.randn(7, 24)
    weight = torch.nn.Parameter(torch.randn(24, 24))
    holder = WeightGradHolder()
    gradients = []
    for own in (False, True):
        weight.grad = start.clone()
        y = x
        for _ in range(uses):
            y = linear(y, weight, holder=holder) if own else F.linear(y, weight)
        queue = WeightGradQueue(holder)
        with queue.capture():
            y.square().mean().backward()
        assert len(queue) == (uses if own else 0)
        queue.flush()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_gradients_run_in_the_order_in_which_they_were_queued() -> None:
    queue = WeightGradQueue(WeightGradHolder())
    order: list[int] = []
    weights = [torch.zeros(1, requires_grad=True) for _ in range(4)]
    for i, weight in enumerate(weights):
        queue.push(weight, lambda i=i: order.append(i) or torch.ones(1))  # type: ignore[misc]
    queue.flush()
    queue.flush()  # nothing is left
    assert order == [0, 1, 2, 3]
    assert [w.grad for w in weights] == [torch.ones(1)] * 4


def test_two_queues_keep_two_micro_batches_apart() -> None:
    module = torch.nn.Linear(3, 3, bias=False)
    holder = WeightGradHolder()
    defer_linears(module, holder)
    queues = [WeightGradQueue(holder), WeightGradQueue(holder)]
    for i, queue in enumerate(queues):
        with queue.capture():
            module(torch.full((1, 3), float(i + 1))).sum().backward()
    queues[1].flush()
    assert module.weight.grad is not None
    assert torch.equal(module.weight.grad, torch.full((3, 3), 2.0))
    queues[0].flush()
    assert torch.equal(module.weight.grad, torch.full((3, 3), 3.0))


def test_capture_ends_when_backward_raises() -> None:
    holder = WeightGradHolder()
    with pytest.raises(RuntimeError, match="boom"), WeightGradQueue(holder).capture():
        raise RuntimeError("boom")
    assert holder.queue is None


def test_two_captures_at_once_are_a_bug() -> None:
    holder = WeightGradHolder()
    with (
        WeightGradQueue(holder).capture(),
        pytest.raises(AssertionError, match="two queues"),
        WeightGradQueue(holder).capture(),
    ):
        pass


def test_the_gradient_of_a_computed_weight_does_not_wait() -> None:
    source = torch.randn(4, 4, requires_grad=True)
    holder = WeightGradHolder()
    queue = WeightGradQueue(holder)
    with queue.capture():
        linear(torch.ones(2, 4), source * 2, holder=holder).sum().backward()
    assert len(queue) == 0
    assert torch.equal(source.grad, torch.full((4, 4), 4.0))  # type: ignore[arg-type]


def test_frozen_weights_and_vectors_work() -> None:
    module = torch.nn.Linear(4, 2)
    module.weight.requires_grad_(False)
    defer_linears(module, WeightGradHolder())
    x = torch.ones(4, requires_grad=True)
    module(x).sum().backward()
    assert torch.equal(x.grad, module.weight.sum(0))  # type: ignore[arg-type]
    assert module.weight.grad is None


def test_only_exact_linears_are_swapped_and_names_stay() -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    class Grouped(torch.nn.Module):
        weight_grad_holder: WeightGradHolder | None = None

    model = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(2, 3), "b": Scaled(2, 3), "c": Grouped(), "d": torch.nn.ReLU()}
    )
    names, parameters = list(model.state_dict()), list(model.parameters())
    first, second = WeightGradHolder(), WeightGradHolder()
    defer_linears(model, first)
    defer_linears(model, second)  # the last stage that takes the module wins
    assert type(model["a"]) is DeferringLinear
    assert type(model["b"]) is Scaled
    assert model["a"].weight_grad_holder is model["c"].weight_grad_holder is second
    assert not hasattr(model["d"], "weight_grad_holder")
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


def test_autograd_agrees_with_finite_differences() -> None:
    torch.manual_seed(0)
    for shape, bias in itertools.product([(3, 4), (2, 3, 4)], [True, False]):
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        b = torch.randn(5, dtype=torch.float64, requires_grad=True) if bias else None
        assert torch.autograd.gradcheck(linear, (x, weight, b))
