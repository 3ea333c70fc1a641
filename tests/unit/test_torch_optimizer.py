"""Any optimizer of torch updates layer by layer with the bits of one over the whole model, and its state
belongs to the layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepopt.carried.like_instance import LikeInstance
from deepopt.config import OptimizerConfig
from deepopt.errors import InputError
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.update_rule import UpdateRule, make_rule

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {"momentum": 0.5, "centered": True},
    "Rprop": {},
    "ASGD": {"t0": 1.0},
    "Adafactor": {"lr": 0.02},
}


def rule(name: str, **fields: Any) -> UpdateRule:
    return make_rule(
        OptimizerConfig(
            factory=f"torch.optim:{name}",
            kwargs=fields.pop("kwargs", OPTIMIZERS[name]),
            **fields,
        )
    )


def make_layers(dtype: torch.dtype = torch.float32) -> list[Layer]:
    torch.manual_seed(0)
    layers = []
    for index, width in enumerate((5, 4)):
        module = torch.nn.Linear(width, 3).to(dtype)
        parameters = {f"{index}.{name}": p for name, p in module.named_parameters()}
        layers.append(Layer(index=index, name=str(index), module=module, parameters=parameters))
    return layers


def grads_of(layer: Layer, step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step * 10 + layer.index)
    return {n: torch.randn(p.shape, generator=generator) for n, p in layer.trainable.items()}


def advance(optimizers: list[LayerOptimizer], own: UpdateRule, steps: range) -> list[float]:
    rates = []
    for step in steps:
        rates.append(own.rate(step))
        for optimizer in optimizers:
            optimizer.step(grads_of(optimizer.layer, step), rates[-1])
    return rates


def by_hand(
    make: Callable[..., torch.optim.Optimizer],
    steps: range,
    scheduler: Callable[..., Any] | None = None,
) -> tuple[list[Layer], list[float]]:
    layers = make_layers()
    optimizer = make([p for layer in layers for p in layer.parameters.values()])
    schedule = scheduler(optimizer) if scheduler else None
    rates = []
    for step in steps:
        rates.append(optimizer.param_groups[0]["lr"])
        for layer in layers:
            for name, grad in grads_of(layer, step).items():
                layer.parameters[name].grad = grad
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return layers, rates


def assert_equal(layers: list[Layer], others: list[Layer]) -> None:
    for layer, other in zip(layers, others, strict=True):
        for name, parameter in layer.parameters.items():
            assert torch.equal(parameter, other.parameters[name]), name


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_layers_have_the_bits_of_the_whole_model(name: str) -> None:
    layers, own = make_layers(), rule(name)
    advance([own.optimizer(layer) for layer in layers], own, range(1, 6))
    expected, _ = by_hand(
        lambda p: getattr(torch.optim, name)(p, **OPTIMIZERS[name]), range(1, 6)
    )
    assert_equal(layers, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("saved_after", [0, 3])
def test_a_state_travels_and_an_update_is_taken_back(name: str, saved_after: int) -> None:
    layers, own = make_layers(torch.bfloat16), rule(name)
    optimizers = [own.optimizer(layer) for layer in layers]
    keys = [set(optimizer.export_state()) for optimizer in optimizers]
    advance(optimizers, own, range(1, saved_after + 1))
    states = [{k: v.clone() for k, v in o.export_state().items()} for o in optimizers]
    assert [set(state) for state in states] == keys  # before any update, too
    for optimizer in optimizers:
        optimizer.save()
    rate = own.rate(saved_after + 1)
    for optimizer in optimizers:
        optimizer.step({n: 2 * g for n, g in grads_of(optimizer.layer, 9).items()}, rate)
        optimizer.restore()
    advance(optimizers, own, range(saved_after + 1, saved_after + 4))

    others, fresh = make_layers(torch.bfloat16), rule(name)
    travelled = [fresh.optimizer(layer) for layer in others]
    for optimizer, state in zip(travelled, states, strict=True):
        optimizer.load_state(state)
    advance(travelled, fresh, range(saved_after + 1, saved_after + 4))
    for mine, theirs in zip(optimizers, travelled, strict=True):
        for key, tensor in mine.export_state().items():
            assert torch.equal(tensor, theirs.export_state()[key]), key


@pytest.mark.parametrize(
    ("scheduler", "kwargs", "optimizer"),
    [
        ("CosineAnnealingLR", {"T_max": 6}, "SGD"),
        ("StepLR", {"step_size": 2, "gamma": 0.5}, "Adam"),
        # It moves momentum, too.
        ("OneCycleLR", {"max_lr": 0.1, "total_steps": 9}, "SGD"),
    ],
)
def test_rates_are_those_of_a_loop_also_after_a_resume(
    scheduler: str, kwargs: dict[str, Any], optimizer: str
) -> None:
    path = f"torch.optim.lr_scheduler:{scheduler}"
    layers, own = make_layers(), rule(optimizer, scheduler=path, scheduler_kwargs=kwargs)
    optimizers = [own.optimizer(layer) for layer in layers]
    rates = advance(optimizers, own, range(1, 5))
    states = [o.export_state() for o in optimizers]
    resumed = rule(optimizer, scheduler=path, scheduler_kwargs=kwargs)
    others = make_layers()
    optimizers = [resumed.optimizer(layer) for layer in others]
    for one, state in zip(optimizers, states, strict=True):
        one.load_state(state)
    assert resumed.rate(7) != rates[2]
    assert resumed.rate(3) == rates[2]  # a worker group that begins again at an earlier step
    rates += advance(optimizers, resumed, range(5, 8))
    expected, wanted = by_hand(
        lambda p: getattr(torch.optim, optimizer)(p, **OPTIMIZERS[optimizer]),
        range(1, 8),
        lambda o: getattr(torch.optim.lr_scheduler, scheduler)(o, **kwargs),
    )
    assert rates == wanted
    assert_equal(others, expected)


def test_an_instance_is_taken_with_its_groups() -> None:
    layers = make_layers()
    model = torch.nn.ModuleList(layer.module for layer in layers)

    def grouped(parameters: list[Any]) -> torch.optim.Optimizer:
        biases = [p for p in parameters if p.dim() == 1]
        weights = [p for p in parameters if p.dim() > 1]
        groups = [{"params": weights}, {"params": biases, "weight_decay": 0.5, "lr": 0.2}]
        return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    factory = LikeInstance(grouped(list(model.parameters())), model)
    optimizers = [factory(list(layer.parameters.items())) for layer in layers]
    for step in range(1, 4):
        for layer, optimizer in zip(layers, optimizers, strict=True):
            for name, grad in grads_of(layer, step).items():
                layer.parameters[name].grad = grad
            optimizer.step()
    assert_equal(layers, by_hand(grouped, range(1, 4))[0])


def test_an_instance_that_does_not_know_a_parameter_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"the SGD does not know parameter 1\.weight"):
        LikeInstance(optimizer, model)
    model[1].requires_grad_(False)
    LikeInstance(optimizer, model)
    model(torch.ones(2)).sum().backward()
    momentum = torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9)
    momentum.step()
    with pytest.raises(InputError, match="has trained already"):
        LikeInstance(momentum, model)


class Words(torch.optim.SGD):
    """Its state holds what no checkpoint can."""

    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["note"] = "text"


def leaves_out(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters[:1], lr=0.1)


def no_optimizer(parameters: Any) -> int:
    return 3


@pytest.mark.parametrize(
    ("factory", "kwargs", "message"),
    [
        (f"{__name__}:leaves_out", {}, r"leaves_out does not know parameter 0\.bias"),
        (f"{__name__}:no_optimizer", {}, "returned a int, not an optimizer"),
        (f"{__name__}:Words", {}, r"state 'note' of 0\.weight is a str"),
        ("torch.optim:SGD", {"speed": 1}, r"SGD raised TypeError: .*speed.* \(for 0\.weight"),
        ("torch.optim:LBFGS", {}, "LBFGS cannot train a pipeline"),
        ("torch.optim:Nothing", {}, "has no 'Nothing'"),
    ],
)
def test_an_optimizer_that_does_not_fit_is_one_clear_error(
    factory: str, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        make_rule(OptimizerConfig(factory=factory, kwargs=kwargs)).optimizer(make_layers()[0])
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("ReduceLROnPlateau", {}, "waits for a metric"),
        ("StepLR", {}, "StepLR raised TypeError"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_one_clear_error(
    name: str, kwargs: dict[str, Any], message: str
) -> None:
    own = rule("SGD", scheduler=f"torch.optim.lr_scheduler:{name}", scheduler_kwargs=kwargs)
    with pytest.raises(InputError, match=message):
        own.optimizer(make_layers()[0])


def test_a_layer_without_trainable_parameters_has_nothing_to_do() -> None:
    layer = make_layers()[0]
    layer.module.requires_grad_(False)
    own = rule("SGD")
    optimizer = own.optimizer(layer)
    before = layer.parameters["0.weight"].clone()
    optimizer.step({}, own.rate(1))
    assert torch.equal(layer.parameters["0.weight"], before)
