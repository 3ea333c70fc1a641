"""`BiStreamPipeline` in one process: any model's outputs and gradients, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from deepopt import BiStreamPipeline, convert_to_deepopt
from deepopt.errors import InputError, TrainingError
from support.own_loops import (
    ExpertBlock,
    make_tied_experts,
    make_tokens,
    plain_tied_loop,
    tied_loop,
    token_loss,
)

X = torch.rand(8, 6, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def pipeline(stages: int = 1) -> BiStreamPipeline:
    return BiStreamPipeline(chain(), stages, microbatches=4)


@dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor
    note: str


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> Pair:
        hidden = self.body(x).tanh()
        return Pair(self.a(hidden), self.b(hidden), "as it was")


class Scalar(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).sum()


def test_one_process_holds_all_stages_with_the_bits_of_the_model() -> None:
    model, own = chain(), pipeline(stages=3)
    output = own.forward_pass(X)
    assert output.is_leaf
    output.square().sum().backward()
    own.backward_pass(output.grad)
    halves = []
    for half in (range(2), range(2, 4)):
        model.zero_grad()
        for number in half:
            model(X.chunk(4)[number]).square().sum().backward()
        halves.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    expected = [a + b for a, b in zip(*halves, strict=True)]
    assert torch.equal(output, torch.cat([model(x) for x in X.chunk(4)]))
    grads = [p.grad for p in own.parameters()]
    assert len(grads) == len(expected) == 4
    assert all(
        grad is not None and torch.equal(grad, e)
        for grad, e in zip(grads, expected, strict=True)
    )
    assert own.state_dict().keys() == model.state_dict().keys()


def test_an_output_of_several_tensors_keeps_its_structure() -> None:
    torch.manual_seed(0)
    model = TwoHeads()
    own = BiStreamPipeline(convert_to_deepopt(model, example_inputs=X[:2]), 1, microbatches=4)
    pair = own.forward_pass(X)
    assert isinstance(pair, Pair)
    assert pair.note == "as it was"
    assert torch.allclose(pair.second, model(X).second)
    own.backward_pass((torch.ones_like(pair.first), None))
    assert torch.equal(model.a.bias.grad, torch.full((3,), 8.0))
    assert not model.b.weight.grad.any()


def test_a_step_makes_the_gradients_of_the_mean_loss() -> None:
    own = pipeline()
    loss = own.step(X, X[:, :3], loss_fn=nn.functional.mse_loss)
    model = chain()
    expected = nn.functional.mse_loss(model(X), X[:, :3])
    expected.backward()
    assert loss == pytest.approx(expected.item())
    for parameter, (name, found) in zip(
        model.parameters(), own.named_parameters(), strict=True
    ):
        assert parameter.grad is not None
        assert found.grad is not None
        assert torch.allclose(parameter.grad, found.grad), name


def _shape_of_one_sample(own: BiStreamPipeline) -> None:
    own.forward_pass(X)
    own.backward_pass(torch.ones(3))


def _used_up(own: BiStreamPipeline) -> None:
    own.backward_pass(torch.ones_like(own.forward_pass(X)))
    own.backward_pass(torch.ones(8, 3))


def _no_gradient(own: BiStreamPipeline) -> None:
    own.forward_pass(X)
    own.backward_pass()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda own: own.backward_pass(X), "backward_pass without a forward_pass before it"),
        (_used_up, "backward_pass without a forward_pass before it"),
        (_shape_of_one_sample, r"grad_outputs\[0\] has shape \[3\], the output \[8, 3\]"),
        (
            _no_gradient,
            "grad_outputs has 0 gradients, forward_pass returned 1 tensors on rank 0",
        ),
        (lambda own: own.forward_pass(X[:6]), "inputs: 6 samples do not divide into 4 micro-"),
        (lambda own: own.forward_pass(), "was given no inputs"),
        (
            lambda own: own.forward_pass("text"),
            "inputs: str 'text' has no dimension of samples",
        ),
        (lambda own: own.forward_pass((X, X[:4])), r"the tensors have \[4, 8\] samples"),
        (lambda own: own.step(X), "was given no targets"),
    ],
)
def test_calls_that_do_not_fit_are_refused(
    act: Callable[[BiStreamPipeline], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        act(pipeline())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiStreamPipeline(chain(), 4), "stages is 4, the model has 3 layers"),
        (lambda: BiStreamPipeline(chain(), (0, 3)), r"stage boundaries \[0, 3\] do not cut 3"),
        (lambda: BiStreamPipeline(chain(), 1, microbatches=1), "microbatches is 1"),
        (
            lambda: BiStreamPipeline(chain(), 1, microbatches=4, groups=3),
            r"groups is 3: 1 replica\(s\) of two streams with 4 micro-batches in all take a multiple of 2",
        ),
    ],
)
def test_models_and_stages_that_do_not_fit_are_refused(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_tied_weights_and_routers_have_the_bits_of_plain_pytorch_in_the_same_order() -> None:
    own, plain = tied_loop(0, 1, stages=(0, 1, 2)), plain_tied_loop()
    assert own["losses"] == pytest.approx(plain["losses"], rel=1e-12)
    assert own["grads"].keys() == plain["grads"].keys()
    assert all(torch.equal(grad, plain["grads"][name]) for name, grad in own["grads"].items())
    assert own["state"].keys() == plain["state"].keys()
    assert all(torch.equal(value, plain["state"][name]) for name, value in own["state"].items())
    biases = [own["state"][f"{n}.experts.router.expert_bias"] for n in (1, 2)]
    assert all(bias.any() for bias in biases), "routers have learned"
    assert own["is_tied"], "the model is as it was given"


def test_tied_weights_that_get_other_memory_stay_tied() -> None:
    def loss(*, late: bool) -> float:
        model = make_tied_experts()
        doubled = 2 * model[0].weight.detach()
        if not late:
            model[0].weight.data = doubled
        own = BiStreamPipeline(model, 1, microbatches=2)
        if late:
            model[0].weight.data = doubled
        inputs, targets = make_tokens(0)
        return own.step(inputs, targets, loss_fn=token_loss)

    assert loss(late=True) == loss(late=False)


def test_gradients_of_overloaded_experts_shrink_once_before_the_optimizer() -> None:
    torch.manual_seed(0)
    block = ExpertBlock(nn.LayerNorm(8), mode="none", compensate=True)
    with torch.no_grad():
        block.norm.bias.fill_(3.0)
        rows = block.experts.router.weight
        rows -= rows.mean(1, keepdim=True)  # the second choice does not see the norm's bias
        rows[0] += 0.2  # every token's first choice
    own = BiStreamPipeline(nn.Sequential(block), 1, microbatches=2)
    x = torch.randn(4, 5, 8)
    own.step(x, torch.zeros_like(x), loss_fn=nn.functional.mse_loss)
    weight = block.experts.experts.down_weight
    before = weight.grad.clone()
    own.update_routers()
    factors = (weight.grad / before).nanmean((1, 2))
    assert factors[0] < 0.99
    assert torch.allclose(factors[1:], torch.ones(3))
    after = weight.grad.clone()
    own.update_routers()
    assert torch.equal(weight.grad, after), "nothing was counted since"


def test_scores_that_are_not_finite_move_no_bias() -> None:
    own = BiStreamPipeline(make_tied_experts(), 1, microbatches=2)
    inputs, targets = make_tokens(0)
    with torch.no_grad():
        dict(own.named_parameters())["1.experts.router.weight"].fill_(math.nan)
    own.step(inputs, targets, loss_fn=token_loss)
    with pytest.raises(TrainingError, match=r"scores that are not finite for \d+ tokens"):
        own.update_routers()
    assert not own.state_dict()["2.experts.router.expert_bias"].any()


def test_a_pass_that_failed_leaves_gradients_and_the_next_pass_alone() -> None:
    own = pipeline()
    output = own.forward_pass(X)
    own.backward_pass(torch.ones_like(output))
    before = [p.grad for p in own.parameters()]
    with pytest.raises(RuntimeError):
        own.step(X, X[:, :2], loss_fn=lambda output, targets: (output - targets).mean())
    assert all(p.grad is g for p, g in zip(own.parameters(), before, strict=True))
    assert torch.equal(own.forward_pass(X), output)


def test_an_output_without_samples_is_refused_with_a_way_out() -> None:
    own = BiStreamPipeline(nn.Sequential(Scalar(6, 2)), 1)
    with pytest.raises(TrainingError, match=r"a tensor of shape \[\] for 4 samples"):
        own.forward_pass(X)
