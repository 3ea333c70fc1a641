"""The update equals torch's own loop, and a layer's state travels whole."""

from __future__ import annotations

import pytest
import torch

from deepopt.config import OptimizerConfig
from deepopt.errors import CheckpointError
from deepopt.pipeline.learning_rate import learning_rate
from deepopt.pipeline.optimizer import AdamWOptimizer, clip_coefficient
from deepopt.pipeline.stage import Layer

CONFIG = OptimizerConfig(learning_rate=1e-2, warmup_steps=2, weight_decay=0.1)


def make_layer(
    dtype: torch.dtype = torch.float32, seed: int = 0, *, size: tuple[int, int] = (5, 3)
) -> Layer:
    torch.manual_seed(seed)
    module = torch.nn.Linear(*size).to(dtype)
    parameters = {f"layer.{name}": p for name, p in module.named_parameters()}
    return Layer(index=0, name="layer", module=module, parameters=parameters)


def make_grads(step: int, *, size: tuple[int, int] = (5, 3)) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "layer.weight": torch.randn(*reversed(size), generator=generator),
        "layer.bias": torch.randn(size[1], generator=generator),
    }


@pytest.mark.parametrize("layout", ["rows", "columns"])
@pytest.mark.parametrize("size", [(5, 3), (64, 129)], ids=str)
def test_updates_have_the_bits_of_torch_adamw(size: tuple[int, int], layout: str) -> None:
    """Of the fused one where memory allows it, whatever the layout of the gradients."""
    layer, twin = make_layer(size=size), make_layer(size=size)
    if layout == "columns":
        for one in (layer, twin):
            weight = one.parameters["layer.weight"]
            weight.data = weight.data.t().contiguous().t()
    ours = AdamWOptimizer(layer, CONFIG)
    weight, bias = twin.parameters["layer.weight"], twin.parameters["layer.bias"]
    theirs = torch.optim.AdamW(
        [
            {"params": [weight], "weight_decay": 0.1, "fused": layout == "rows"},
            {"params": [bias], "weight_decay": 0.0, "fused": True},
        ],
        lr=1.0,
        betas=CONFIG.betas,
        eps=CONFIG.eps,
    )
    for step in range(1, 6):
        grads = make_grads(step, size=size)
        given = {name: grad.t().contiguous().t() for name, grad in grads.items()}
        ours.step(given, learning_rate(step, CONFIG))
        for name, parameter in twin.parameters.items():
            parameter.grad = grads[name].clone()
        for group in theirs.param_groups:
            group["lr"] = learning_rate(step, CONFIG)
        theirs.step()
    for name in layer.parameters:
        assert torch.equal(layer.parameters[name], twin.parameters[name]), name


def test_clipping_has_the_bits_of_torch() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(n, 7)) for n in (3, 50, 1)]
    for seed, parameter in enumerate(parameters):
        parameter.grad = torch.randn(
            parameter.shape, generator=torch.Generator().manual_seed(seed)
        )
    grads = [p.grad.clone() for p in parameters if p.grad is not None]
    norms = [torch.linalg.vector_norm(g).item() for g in grads]
    norm, coefficient = clip_coefficient(norms, max_norm=0.7)
    expected = torch.nn.utils.clip_grad_norm_(parameters, 0.7)
    assert norm == expected.item()
    assert coefficient < 1.0
    for parameter, grad in zip(parameters, grads, strict=True):
        assert parameter.grad is not None
        assert torch.equal(grad * coefficient, parameter.grad)


def test_small_gradients_are_not_scaled() -> None:
    assert clip_coefficient([0.1, 0.2], max_norm=1.0)[1] == 1.0
    assert clip_coefficient([100.0], max_norm=None) == (100.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_continues_with_the_same_bits(dtype: torch.dtype) -> None:
    layer = make_layer(dtype)
    optimizer = AdamWOptimizer(layer, CONFIG)
    for step in range(1, 4):
        optimizer.step(make_grads(step), 1e-2)
    state = {key: tensor.clone() for key, tensor in optimizer.export_state().items()}
    assert {"optimizer/layer.weight/exp_avg", "optimizer/layer.weight/step"} <= set(state)

    other_layer = make_layer(dtype, seed=1)
    other = AdamWOptimizer(other_layer, CONFIG)
    other.load_state(state)
    for step in range(4, 7):
        optimizer.step(make_grads(step), 1e-2)
        other.step(make_grads(step), 1e-2)
    for key, tensor in optimizer.export_state().items():
        assert torch.equal(tensor, other.export_state()[key]), key
    for name, parameter in layer.parameters.items():
        assert torch.equal(parameter, other_layer.parameters[name]), name


def test_masters_keep_updates_too_small_for_bf16() -> None:
    layer = make_layer(torch.bfloat16)
    start = layer.parameters["layer.bias"].detach().clone()
    optimizer = AdamWOptimizer(layer, CONFIG)
    grads = {name: torch.ones_like(g) for name, g in make_grads(1).items()}
    for _ in range(100):
        optimizer.step(grads, 1e-5)
    moved = optimizer.export_state()["parameter/layer.bias"]
    assert moved.dtype == torch.float32
    assert not torch.equal(moved, start.float())


def test_a_state_of_another_shape_is_refused() -> None:
    optimizer = AdamWOptimizer(make_layer(), CONFIG)
    state = optimizer.export_state() | {"parameter/layer.bias": torch.zeros(4)}
    with pytest.raises(CheckpointError, match=r"layer\.bias has shape \[4\].*\[3\]"):
        optimizer.load_state(state)
    del state["parameter/layer.bias"]
    with pytest.raises(CheckpointError, match="is missing"):
        optimizer.load_state(state)


def test_learning_rate_warms_up_then_stays_or_decays() -> None:
    constant = OptimizerConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(s, constant) for s in (1, 2, 4, 5, 1000)] == [0.25, 0.5, 1, 1, 1]
    cosine = OptimizerConfig(learning_rate=1.0, warmup_steps=4, decay_steps=24, min_ratio=0.1)
    rates = [learning_rate(s, cosine) for s in (4, 14, 24, 100)]
    assert rates == pytest.approx([1.0, 0.55, 0.1, 0.1])
