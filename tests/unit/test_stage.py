"""A stage: B, I and W, R and the loss give the same bits whatever the way, and free what they held."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from deepopt.errors import TrainingError
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.stage import Layer, Loss, Stage, Tensors
from deepopt.pipeline.weight_ways import Verdict, Way
from support.weight_layers import LAYERS, WIDTH, ConvBlock, linear_block

CPU = torch.device("cpu")
MICROBATCHES = 3


def make_stage(
    modules: Sequence[nn.Module],
    *,
    first: int = 0,
    device: torch.device = CPU,
    recompute: bool = False,
    **options: Any,
) -> Stage:
    layers = []
    for index, module in enumerate(modules, start=first):
        parameters = {f"{index}.{name}": p for name, p in module.named_parameters()}
        layers.append(Layer(index=index, name=str(index), module=module, parameters=parameters))
    trainable = {name: p for layer in layers for name, p in layer.trainable.items()}
    stage = Stage(
        0,
        layers,
        gradients=StageGradients(trainable, apart=(), groups=(0,), device=device),
        group_of=dict.fromkeys(range(MICROBATCHES), 0),
        seed=0,
        device=device,
        num_microbatches=MICROBATCHES,
        recompute=[layer.index for layer in layers] if recompute else (),
        **options,
    )
    stage.begin_step(1)
    return stage


def train(stage: Stage, *, apart: bool, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Outputs, input gradients and summed weight gradients of a few micro-batches; with I and W
    apart, every W comes after every I."""
    generator = torch.Generator().manual_seed(5)
    found: list[Any] = []
    for microbatch in range(MICROBATCHES):
        x = torch.randn(2, 6, WIDTH, generator=generator).to(dtype).requires_grad_()
        (out,) = stage.forward(microbatch, (x,))
        grad = torch.randn(out.shape, generator=generator).to(dtype)
        backward = stage.backward_input if apart else stage.backward
        found += [out.detach(), *backward(microbatch, (grad,))]
    if apart:
        for microbatch in range(MICROBATCHES):
            stage.backward_weight(microbatch)
    return [*found, *(total.clone() for total in stage.gradients.totals().values())]


def assert_same_bits(got: Sequence[torch.Tensor], want: Sequence[torch.Tensor]) -> None:
    assert len(got) == len(want)
    for number, (a, b) in enumerate(zip(got, want, strict=True)):
        assert torch.equal(a, b), number


def test_batches_go_to_the_device_of_the_layers() -> None:
    device = torch.device("meta")  # the only second device there is everywhere
    stage = make_stage(
        [nn.Linear(4, 3, device=device)], device=device, loss=nn.functional.mse_loss
    )
    stage.forward(0, (torch.zeros(2, 4),), torch.zeros(2, 3))
    stage.backward(0)
    assert stage.losses[0].device == device


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_i_and_w_give_the_bits_of_b_in_every_kind_of_layer(kind: str, recompute: bool) -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block(), LAYERS[kind](), ConvBlock(), linear_block()]

    want = train(make_stage(build()), apart=False)
    stage = make_stage(build(), defer_weights=True, recompute=recompute)
    assert_same_bits(train(stage, apart=True), want)
    stage = make_stage(build(), defer_weights=True, recompute=recompute)
    assert_same_bits(train(stage, apart=False), want)


def test_bf16_layers_divide_their_backward_too() -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block().bfloat16(), ConvBlock().bfloat16()]

    want = train(make_stage(build()), apart=False, dtype=torch.bfloat16)
    stage = make_stage(build(), defer_weights=True)
    assert_same_bits(train(stage, apart=True, dtype=torch.bfloat16), want)


def test_verdicts_are_there_after_the_first_forward() -> None:
    stage = make_stage([linear_block(), ConvBlock(), nn.ReLU()], defer_weights=True)
    assert stage.verdicts == {}
    stage.forward(0, (torch.randn(2, 6, WIDTH, requires_grad=True),))
    assert list(stage.verdicts) == ["0", "1", "2"]
    assert stage.verdicts["0"].way is Way.DEFERRED
    assert stage.verdicts["2"].way is Way.FUSED


def test_layers_whose_way_is_known_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block(), ConvBlock(), nn.ReLU()]

    probing = make_stage(build(), defer_weights=True)
    want = train(probing, apart=True)
    known = {**probing.verdicts, "elsewhere": Verdict(way=Way.SPLIT)}

    def refuse(*_: object, **__: object) -> Verdict:
        raise AssertionError("a known layer was tried")

    monkeypatch.setattr("deepopt.pipeline.stage.probe", refuse)
    stage = make_stage(build(), defer_weights=True, known_ways=known)
    assert_same_bits(train(stage, apart=True), want)
    assert stage.verdicts == probing.verdicts


def test_of_a_stage_in_part_known_the_other_layers_are_tried() -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block(), ConvBlock(), linear_block()]

    want = train(make_stage(build()), apart=False)
    known = Verdict(way=Way.SPLIT, reason="known", split=frozenset({"first.weight"}))
    stage = make_stage(build(), defer_weights=True, known_ways={"1": known})
    assert_same_bits(train(stage, apart=True), want)
    assert stage.verdicts["1"] == known
    assert [stage.verdicts[name].way for name in "02"] == [Way.DEFERRED, Way.DEFERRED]


class _WritesSometimes(nn.Module):
    """Writes to its input from the second call on."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * 2 if self.calls == 1 else x.mul_(2)


def test_a_layer_may_begin_to_write_to_its_inputs() -> None:
    torch.manual_seed(0)
    stage = make_stage([_WritesSometimes(), nn.Linear(WIDTH, WIDTH)])
    for microbatch in range(MICROBATCHES):
        x = torch.ones(2, 6, WIDTH, requires_grad=True)
        stage.forward(microbatch, (x,))
        (grad,) = stage.backward(microbatch, (torch.ones(2, 6, WIDTH),))
        if microbatch == 0:
            want = grad
        assert torch.equal(grad, want)


class _Turned(nn.Module):
    """Sends back gradients that are not contiguous, and scalars expanded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).sin().transpose(1, 2) + x.sum()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_cuts_do_not_change_bits_where_gradients_are_not_contiguous(cut: int) -> None:
    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block(), _Turned(), _Turned(), linear_block()]

    x = torch.randn(2, 6, WIDTH)
    whole = make_stage(build())
    for microbatch in range(2):  # the second enters without a node of its own
        (out,) = whole.forward(microbatch, (x.clone().requires_grad_(),))
        want = whole.backward(microbatch, (torch.ones(()).expand(2, 6, WIDTH),))
    modules = build()
    first, second = make_stage(modules[:cut]), make_stage(modules[cut:], first=cut)
    for microbatch in range(2):
        (middle,) = first.forward(microbatch, (x.clone().requires_grad_(),))
        (got_out,) = second.forward(microbatch, (middle,))
        grads = second.backward(microbatch, (torch.ones(2, 6, WIDTH),))
        got = first.backward(microbatch, grads)
    assert torch.equal(got_out, out)
    assert torch.equal(got[0], want[0])


# R.


class _Watched(nn.Module):
    """Counts its forwards and keeps weak references to what they saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.forwards = 0
        self.saved: list[weakref.ref[torch.Tensor]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        hidden = self.linear(x)
        kept = hidden.sigmoid()
        if kept.requires_grad:
            self.saved.append(weakref.ref(kept))
        return kept * hidden


def held(layers: Sequence[_Watched]) -> list[int]:
    gc.collect()
    return [sum(ref() is not None for ref in layer.saved) for layer in layers]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("prepared", ["never", "after each F", "after all F", "twice"])
def test_r_anywhere_between_f_and_b_gives_the_same_bits(prepared: str, apart: bool) -> None:
    def run(stage: Stage) -> list[torch.Tensor]:
        grads: list[torch.Tensor] = []
        for microbatch in range(MICROBATCHES):
            x = torch.full((2, 6, WIDTH), 0.1 * (microbatch + 1)).requires_grad_()
            stage.forward(microbatch, (x,))
            if prepared == "after each F":
                stage.prepare(microbatch)
        for microbatch in range(MICROBATCHES if prepared in ("after all F", "twice") else 0):
            stage.prepare(microbatch)
            if prepared == "twice":
                stage.prepare(microbatch)
        for microbatch in range(MICROBATCHES):
            backward = stage.backward_input if apart else stage.backward
            grads += backward(microbatch, (torch.ones(2, 6, WIDTH),))
            if apart:
                stage.backward_weight(microbatch)
        return [*grads, *(t.clone() for t in stage.gradients.totals().values())]

    def build() -> list[nn.Module]:
        torch.manual_seed(0)
        return [linear_block(), linear_block()]

    want = run(make_stage(build()))
    assert_same_bits(run(make_stage(build(), recompute=True, defer_weights=apart)), want)


def test_r_holds_what_f_would_have_held_and_backward_frees_it_layer_by_layer() -> None:
    watched = [_Watched(), _Watched(), _Watched()]
    stage = make_stage(watched, recompute=True)
    for microbatch in range(2):  # the first forward tries out what requires gradients
        stage.forward(microbatch, (torch.randn(2, 6, WIDTH, requires_grad=True),))
    assert held(watched) == [0, 0, 0]
    stage.prepare(1)
    assert held(watched) == [1, 1, 1]
    before = [layer.forwards for layer in watched]
    seen: list[list[int]] = []
    handle = watched[0].linear.weight.register_hook(lambda grad: seen.append(held(watched)))
    stage.backward(1, (torch.ones(2, 6, WIDTH),))
    handle.remove()
    assert [layer.forwards for layer in watched] == before
    assert [counts[1:] for counts in seen] == [[0, 0]]  # when the first layer's turn comes
    assert held(watched) == [0, 0, 0]
    stage.backward(0, (torch.ones(2, 6, WIDTH),))  # without R: each layer just before its turn
    assert [layer.forwards for layer in watched] == [n + 1 for n in before]
    assert held(watched) == [0, 0, 0]


def test_abandoned_micro_batches_hold_nothing() -> None:
    watched = [_Watched(), _Watched()]
    stage = make_stage(watched, recompute=True, defer_weights=True)
    for microbatch in range(MICROBATCHES):
        stage.forward(microbatch, (torch.randn(2, 6, WIDTH, requires_grad=True),))
        stage.prepare(microbatch)
    stage.backward_input(0, (torch.ones(2, 6, WIDTH),))
    stage.abandon()
    assert held(watched) == [0, 0]


# The loss.


def train_loss(modules: Sequence[nn.Module], loss: Loss) -> list[Any]:
    stage = make_stage(modules, loss=loss)
    found: list[Any] = []
    for microbatch in range(MICROBATCHES):
        torch.manual_seed(microbatch)
        x = torch.randn(2, 6, WIDTH, requires_grad=True)
        stage.forward(microbatch, (x,), torch.randint(WIDTH, (2, 6)))
        found += stage.backward(microbatch)
    return [*found, *stage.losses.values(), *stage.gradients.totals().values()]


def plainly(modules: Sequence[nn.Module], loss: Loss) -> list[Any]:
    model = nn.Sequential(*modules)
    found: list[Any] = []
    losses = []
    for microbatch in range(MICROBATCHES):
        torch.manual_seed(microbatch)
        x = torch.randn(2, 6, WIDTH, requires_grad=True)
        value = loss(model(x), torch.randint(WIDTH, (2, 6)))
        (value / MICROBATCHES).backward()
        found.append(x.grad)
        losses.append(value.detach())
    return [*found, *losses, *(p.grad for p in model.parameters())]


def _cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten())


def _in_place(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return _cross_entropy(output.div_(2.0), targets)


def _without_model(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return output.sum() * 0.0


def _linear_layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)]


@pytest.mark.parametrize("loss", [_cross_entropy, _in_place, _without_model])
def test_the_loss_gives_the_bits_of_a_plain_backward(loss: Callable[..., torch.Tensor]) -> None:
    assert_same_bits(train_loss(_linear_layers(), loss), plainly(_linear_layers(), loss))


def test_a_loss_with_weights_of_its_own_gives_them_their_gradients() -> None:
    gains: list[nn.Parameter] = []

    def make() -> Loss:
        gain = nn.Parameter(torch.ones(WIDTH))
        gains.append(gain)
        return lambda output, targets: _cross_entropy(output * gain, targets)

    assert_same_bits(train_loss(_linear_layers(), make()), plainly(_linear_layers(), make()))
    assert torch.equal(gains[0].grad, gains[1].grad)  # type: ignore[arg-type]


class _InPlace(torch.autograd.Function):
    """Doubles; its backward writes to what it gets."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.mul_(2)


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _InPlace.apply(x)  # type: ignore[no-untyped-call]
        return out


def test_a_backward_that_writes_to_the_loss_gradient_leaves_the_next_micro_batch_alone() -> (
    None
):
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return output.view(())  # its backward hands on the tensor that it gets

    def modules() -> list[nn.Module]:
        torch.manual_seed(0)
        return [nn.Flatten(0), nn.Linear(6 * WIDTH * 2, 1), _Doubled()]

    assert_same_bits(train_loss(modules(), loss), plainly(modules(), loss))


def test_a_loss_that_is_not_one_number_is_refused_with_its_shape() -> None:
    stage = make_stage(_linear_layers(), loss=lambda output, targets: output.mean(-1))
    inputs: Tensors = (torch.randn(2, 6, WIDTH, requires_grad=True),)
    with pytest.raises(TrainingError, match=r"\[2, 6\].*one number"):
        stage.forward(0, inputs, torch.zeros(2, 6))


def test_between_f_and_b_only_the_gradient_of_the_loss_is_held() -> None:
    inner: list[weakref.ref[torch.Tensor]] = []

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        scores = output.float().log_softmax(-1)
        inner.extend([weakref.ref(output), weakref.ref(scores)])
        return -scores.mean()

    stage = make_stage(_linear_layers(), loss=loss)
    inputs: Tensors = (torch.randn(2, 6, WIDTH, requires_grad=True),)
    stage.forward(0, inputs, torch.zeros(2, 6))
    gc.collect()
    assert [ref() for ref in inner] == [None, None]
    stage.backward(0)
