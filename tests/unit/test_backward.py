"""Autograd's engine entered directly: the same bits as through torch's own functions."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import get_gradient_edge

from deepopt.pipeline.backward import add_gradients, gradient_at


def _graph() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, a weight, what is between, and the end; all of 3 numbers."""
    torch.manual_seed(0)
    x, weight = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    between = (x * weight).sin()
    return x, weight, between, between.exp() * weight


@pytest.mark.parametrize("as_edge", [False, True])
def test_leaves_get_the_bits_that_torch_gives_them(as_edge: bool) -> None:
    grad = torch.tensor([0.1, 0.2, 0.3])
    x, weight, _, end = _graph()
    torch.autograd.backward([end], [grad])
    found_x, found_weight, _, end = _graph()
    add_gradients([get_gradient_edge(end)] if as_edge else [end], [grad])
    assert torch.equal(found_x.grad, x.grad)  # type: ignore[arg-type]
    assert torch.equal(found_weight.grad, weight.grad)  # type: ignore[arg-type]


def test_roots_without_gradients_are_scalars_that_count_once() -> None:
    x, _, _, end = _graph()
    torch.autograd.backward(end.sum())
    found_x, _, _, end = _graph()
    add_gradients([end.sum()], [])
    assert torch.equal(found_x.grad, x.grad)  # type: ignore[arg-type]


def test_a_gradient_inside_the_graph_reaches_no_leaf() -> None:
    grad = torch.tensor([0.1, 0.2, 0.3])
    _, _, between, end = _graph()
    (expected,) = torch.autograd.grad(end, between, grad)
    x, weight, between, end = _graph()
    assert torch.equal(gradient_at(end, between, grad=grad), expected)
    assert x.grad is None
    assert weight.grad is None


def test_a_gradient_of_another_shape_is_refused() -> None:
    _, _, _, end = _graph()
    with pytest.raises(RuntimeError, match="invalid gradient"):
        add_gradients([end], [torch.ones(2)])


def test_tensors_of_other_classes_go_through_their_own_backward() -> None:
    class Counting(torch.Tensor):
        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            cls.calls += func is torch.autograd.backward
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(3, requires_grad=True)
    end = (x * 2).as_subclass(Counting)
    before = Counting.calls
    add_gradients([end], [torch.ones(3)])
    assert Counting.calls == before + 1
    assert x.grad is not None
