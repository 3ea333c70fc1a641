"""Which way the weights of each kind of layer go, and what the layer keeps from being tried."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from deepopt.pipeline.weight_probe import probe
from deepopt.pipeline.weight_ways import Verdict, Way
from support.weight_layers import LAYERS, WIDTH, ConvBlock, linear_block

EXPECTED = {
    "linears": (Way.DEFERRED, set(), ""),
    "convolutions": (Way.SPLIT, {"first.weight", "second.weight"}, ""),
    "attention": (Way.SPLIT, {"self_attn.in_proj_weight", "self_attn.out_proj.weight"}, ""),
    "custom function": (Way.FUSED, set(), "custom autograd Function _Scaled would run twice"),
    "low-rank adapter": (Way.SPLIT, {"down", "up"}, ""),
    "subclass": (Way.SPLIT, {"weight"}, ""),
    "checkpointed linears": (Way.DEFERRED, set(), ""),
    "checkpointed convolutions": (Way.FUSED, set(), "to recompute the forward"),
    "checkpointed attention": (Way.DEFERRED, set(), "to recompute the forward"),
    "normalised weight": (
        Way.SPLIT,
        {"parametrizations.weight.original0", "parametrizations.weight.original1"},
        "",
    ),
    "used twice": (Way.FUSED, set(), "gradient of linear.weight gets other bits"),
    "nested": (Way.FUSED, set(), "one behind the other"),
    "hooked": (Way.FUSED, set(), "tensor hooks fire 2 times instead of 1"),
    "batch norm": (Way.SPLIT, {"1.weight"}, ""),
}


def look_at(
    module: nn.Module,
    x: torch.Tensor | None = None,
    *,
    clock: Callable[[], float] | None = None,
) -> Verdict:
    """Probe; by default every part of every backward takes 1 s, so nothing costs more."""
    if x is None:
        x = torch.randn(2, 6, WIDTH, requires_grad=True)

    def seed() -> None:
        torch.default_generator.manual_seed(7)

    return probe(module, inputs=(x,), seed=seed, clock=clock or itertools.count().__next__)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_kind_of_layer_goes_its_way_and_says_why(kind: str) -> None:
    torch.manual_seed(0)
    way, split, why = EXPECTED[kind]
    verdict = look_at(LAYERS[kind]())
    assert (verdict.way, verdict.split) == (way, split)
    assert why in verdict.reason
    assert bool(verdict.reason) == bool(why)


def test_a_layer_keeps_its_state() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(WIDTH, WIDTH), ConvBlock())
    grads = [torch.randn_like(p) for p in module.parameters()]
    for parameter, grad in zip(module.parameters(), grads, strict=True):
        parameter.grad = grad
    before = {name: value.clone() for name, value in module.state_dict().items()}
    assert look_at(module).way is Way.SPLIT
    assert type(module[1]) is nn.Linear
    assert all(p.grad is g for p, g in zip(module.parameters(), grads, strict=True))
    assert all(torch.equal(before[n], value) for n, value in module.state_dict().items())


def test_a_large_table_waits_where_no_input_takes_a_gradient() -> None:
    verdict = look_at(nn.Embedding(1000, WIDTH), torch.randint(1000, (2, 6)))
    assert (verdict.way, verdict.split) == (Way.SPLIT, {"weight"})


@pytest.mark.parametrize("hook", ["register_hook", "register_post_accumulate_grad_hook"])
def test_a_hook_on_a_weight_sees_its_gradient_as_before(hook: str) -> None:
    module = linear_block()
    seen: list[torch.Tensor] = []
    getattr(module[1].weight, hook)(seen.append)
    verdict = look_at(module)
    assert verdict.way is Way.FUSED
    assert verdict.reason == "1.weight has a hook, which must see its gradient"
    assert not seen


def test_a_compiled_module_is_left_whole() -> None:
    module = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    module[1].compile(backend="eager")
    verdict = look_at(module)
    assert verdict.way is Way.FUSED
    assert verdict.reason.startswith("1 is compiled")


def test_a_layer_that_cannot_be_copied_is_left_whole() -> None:
    module = linear_block()
    module.lock = threading.Lock()  # type: ignore[assignment]
    verdict = look_at(module)
    assert verdict.way is Way.FUSED
    assert "no copy of the layer" in verdict.reason
    assert "lock" in verdict.reason


def test_a_split_that_costs_more_than_it_gives_is_not_taken() -> None:
    ticks = itertools.accumulate(
        itertools.count()
    )  # each part takes longer than the one before
    verdict = look_at(ConvBlock(), clock=lambda: float(next(ticks)))
    assert verdict.way is Way.FUSED
    assert "first.weight, second.weight: a split backward takes" in verdict.reason


def test_small_parameters_alone_are_not_worth_a_split() -> None:
    assert look_at(nn.LayerNorm(WIDTH)) == Verdict(way=Way.FUSED)


def test_an_error_of_the_layer_is_its_own() -> None:
    class Broken(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise KeyError("hidden_size")

    with pytest.raises(KeyError, match="hidden_size"):
        look_at(Broken(WIDTH, WIDTH))


def test_a_layer_that_returns_no_tensor_keeps_its_backward_whole() -> None:
    class Answer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor]]:
            return ({"logits": self.inner(x)},)

    verdict = probe(
        Answer(), inputs=(torch.randn(2, 4, requires_grad=True),), seed=lambda: None
    )
    assert (verdict.way, verdict.reason) == (Way.FUSED, "it returns a dict, not tensors")
