"""A backward in two parts: what each part computes, keeps and lets go."""

from __future__ import annotations

import weakref

import torch
from torch import nn

from deepopt.pipeline.graph_split import SplitBackward, has_leaf
from support.weight_layers import WIDTH, ConvBlock, CustomFunction


def test_the_first_part_adds_all_but_the_chosen_weights_and_the_second_adds_those() -> None:
    torch.manual_seed(0)
    block = ConvBlock()
    x, grad = torch.randn(2, 6, WIDTH, requires_grad=True), torch.randn(2, 6, WIDTH)
    block(x).backward(grad)
    want_x, x.grad = x.grad, None
    want = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()

    chosen = [block.first.weight, block.second.weight]
    backward = SplitBackward([block(x)], inputs=[x], weights=chosen)
    assert {id(w) for w in backward.later} == {id(w) for w in chosen}
    backward.run_inputs([grad])
    assert torch.equal(x.grad, want_x)  # type: ignore[arg-type]
    for name, parameter in block.named_parameters():
        assert (parameter.grad is None) == name.endswith(("first.weight", "second.weight"))
    backward.run_weights()
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter.grad, want[name]), name  # type: ignore[arg-type]


def test_without_inputs_that_take_gradients_all_waits() -> None:
    block, grad = ConvBlock(), torch.randn(2, 6, WIDTH)
    block(torch.ones(2, 6, WIDTH)).backward(grad)
    want = [p.grad for p in block.parameters()]
    block.zero_grad()
    out = block(torch.ones(2, 6, WIDTH))
    backward = SplitBackward([out], inputs=[], weights=[block.first.weight])
    backward.run_inputs([grad])
    assert all(p.grad is None for p in block.parameters())
    backward.run_weights()
    for parameter, expected in zip(block.parameters(), want, strict=True):
        assert torch.equal(parameter.grad, expected)  # type: ignore[arg-type]


def test_a_weight_of_two_branches_side_by_side_waits_for_both() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 4))
    x = torch.randn(3, 4, requires_grad=True)

    def run() -> torch.Tensor:
        return (x @ weight).sin() + (x.tanh() @ weight)

    run().sum().backward()
    want, weight.grad = weight.grad, None
    backward = SplitBackward([run().sum()], inputs=[x], weights=[weight])
    backward.run_inputs([None])
    assert weight.grad is None
    backward.run_weights()
    assert torch.equal(weight.grad, want)  # type: ignore[arg-type]


def test_what_cannot_wait_is_named_and_comes_in_the_first_part() -> None:
    layer = CustomFunction()
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    backward = SplitBackward([layer(x)], inputs=[x], weights=[layer.weight])
    assert backward.refused == {
        layer.weight: "custom autograd Function _Scaled would run twice"
    }
    backward.run_inputs([torch.ones(2, 6, WIDTH)])
    assert layer.weight.grad is not None


def test_what_the_graph_saved_is_free_after_the_second_part() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.clone()
        alive.add(kept)
        return kept

    block = ConvBlock()
    x = torch.randn(2, 6, WIDTH, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
        out = block(x)
    backward = SplitBackward([out], inputs=[x], weights=[block.first.weight])
    del out
    backward.run_inputs([torch.ones(2, 6, WIDTH)])
    assert alive
    backward.run_weights()
    assert not alive


def test_a_leaf_behind_the_stop_does_not_count() -> None:
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    middle = a.sin()
    assert middle.grad_fn is not None
    for end, expected in ((middle * 2, False), (middle * b, True), (middle.exp() * a, True)):
        assert end.grad_fn is not None
        assert has_leaf(end.grad_fn, stop=middle.grad_fn) is expected
    assert not has_leaf(middle.grad_fn, stop=middle.grad_fn)
