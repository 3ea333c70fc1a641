"""Layers are counted for accelerators that are not here, and what comes of it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from deepopt.convert.loss import default_loss
from deepopt.errors import PlanError
from deepopt.pipeline.stage import Layer
from deepopt.planner.hardware import ACCELERATORS
from deepopt.planner.plan_text import read_plan_file
from deepopt.worker.analytic_trial import Rates, count_layer
from deepopt_cli.app import app

MODEL = (
    "model.kwargs={num_blocks: 6, d_model: 32, num_heads: 2, expert_hidden: 16, num_experts: 4}"
)
HUGE = "num_blocks: 2, d_model: 65536, num_heads: 64"
RATES = Rates(flops=1e9, bytes_per_s=1e18)  # arithmetic alone counts


def linear() -> Layer:
    with torch.device("meta"):
        module = torch.nn.Linear(32, 64, bias=False)
    return Layer(
        index=0, name="linear", module=module, parameters=dict(module.named_parameters())
    )


def inputs(*, requires_grad: bool) -> tuple[torch.Tensor, ...]:
    return (torch.empty(8, 32, device="meta", requires_grad=requires_grad),)


def test_a_matrix_costs_the_same_product_three_times() -> None:
    found = count_layer(linear(), inputs(requires_grad=True), rates=RATES)
    product_s = 2 * 8 * 32 * 64 / 1e9
    assert [found.forward_s, found.input_s, found.weight_s] == pytest.approx([product_s] * 3)
    assert found.activation_bytes == 8 * 32 * 4  # the input; the weight is no activation
    assert [tuple(out.shape) for out in found.outputs] == [(8, 64)]


def test_inputs_without_gradient_cost_none() -> None:
    assert count_layer(linear(), inputs(requires_grad=False), rates=RATES).input_s == 0


class Answers(torch.nn.Module):
    """The last layer of a model that returns its logits by name, as those of `transformers` do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(32, 64, bias=False, device="meta")

    def forward(self, x: torch.Tensor) -> tuple[dict[str, torch.Tensor]]:
        return ({"logits": self.linear(x)},)


def test_the_loss_of_logits_that_have_a_name_is_counted() -> None:
    module = Answers()
    layer = Layer(
        index=0, name="head", module=module, parameters=dict(module.named_parameters())
    )
    targets = torch.empty(8, dtype=torch.long, device="meta")
    trial = count_layer(
        layer, inputs(requires_grad=True), rates=RATES, loss=default_loss, targets=targets
    )
    assert [out.shape for out in trial.outputs] == [torch.Size([])]
    assert trial.weight_s == pytest.approx(linear_trial_s(), rel=0.01)


def linear_trial_s() -> float:
    return count_layer(linear(), inputs(requires_grad=True), rates=RATES).weight_s


def test_traffic_counts_where_it_takes_longer_and_views_move_nothing() -> None:
    slow = Rates(flops=1e18, bytes_per_s=1e6)
    moved_bytes = 4 * (8 * 32 + 32 * 64 + 8 * 64)  # both factors read, the product written
    found = count_layer(linear(), inputs(requires_grad=False), rates=slow)
    assert found.forward_s == pytest.approx(moved_bytes / 1e6)


def test_rates_are_the_vendors_times_the_efficiency() -> None:
    rates = Rates.of(ACCELERATORS["A100"], dtype="bfloat16", efficiency=0.5)
    assert (rates.flops, rates.bytes_per_s) == (156e12, 2.039e12 / 2)
    with pytest.raises(PlanError, match="no part of the peak"):
        Rates.of(ACCELERATORS["A100"], dtype="bfloat16", efficiency=1.5)


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments), "--set", MODEL])


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan of two hosts of A100s; the experts' layers ask for values, the others do not."""
    path = tmp_path / "plan.yaml"
    result = deepopt(
        *("profile", "--devices", "16xa100", "-o", path, "--set", "parallel.data=4"),
        *("--set", "training.groups=4", "--set", "pipeline.placement=line"),
    )
    assert result.exit_code == 0, result.output
    assert "analytic, nothing was measured" in result.output
    return path


def test_a_plan_file_says_that_nothing_was_measured(plan: Path) -> None:
    found = read_plan_file(plan.read_text(), source="plan.yaml")
    assert found.source == "analytic"
    assert "meta device (blocks.1 and their like: on the CPU" in found.basis
    assert "NVIDIA A100 80GB data sheet" in found.basis
    assert [d.name for d in found.hardware.devices] == ["NVIDIA A100-SXM4-80GB"] * 16
    assert found.hardware.devices[8].host == "host-1"
    assert all(times.forward > 0 for times, _ in found.resolved())
    assert found.predicted is not None
    shown = CliRunner().invoke(app, ["plan", "show", str(plan)])
    assert "analytic, nothing was measured" in shown.output


def test_other_hardware_is_refused_with_the_difference(plan: Path) -> None:
    result = deepopt(
        *("launch", "--plan", plan, "--workers", 16, "--dry-run", "--set", "worker.device=cpu"),
        *("--set", "parallel.data=4", "--set", "training.groups=4"),
        *("--set", "pipeline.placement=line"),
    )
    assert result.exit_code == 1
    assert "is a plan for other devices: rank 0 is cpu (" in result.output
    assert "planned cuda (NVIDIA A100-SXM4-80GB)" in result.output


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--devices", "8xA1000"), "there is no table for accelerator 'A1000'"),
        (("--devices", "8xA100", "--workers", 8), "--workers exclude each other"),
        (("--devices", "8xA100", "--efficiency", 0), "no part of the peak"),
        (("--devices", "64xA100"), "64 stages need at least 64 layers"),
        (
            ("--devices", "2xA100", "--set", "worker.device=emulated"),
            "worker.device is emulated",
        ),
        (
            (
                "--devices",
                "2xA100",
                "--set",
                "precision={fp8: blockwise, fp8_include: [blocks]}",
            ),
            "24 linear maps compute in FP8, and --devices counts at the rate of float32",
        ),
    ],
)
def test_what_cannot_be_counted_is_refused(
    tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    path = tmp_path / "plan.yaml"
    result = deepopt("profile", "-o", path, *options)
    assert result.exit_code == 1
    assert words in " ".join(result.output.split())
    assert not path.exists()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (f"{HUGE}, num_dense_layers: 2", "layer 1 alone takes 276.85 GB with one micro-batch"),
        (HUGE, "17,293,770,752 parameters it is not run on this CPU with random values"),
    ],
)
def test_a_layer_larger_than_the_memory_here_is_counted_or_refused(
    tmp_path: Path, kwargs: str, words: str
) -> None:
    options = ["--devices", "2xA100", "--set", f"model.kwargs={{{kwargs}}}"]
    result = CliRunner().invoke(app, ["profile", "-o", str(tmp_path / "plan.yaml"), *options])
    assert result.exit_code == 1
    assert " ".join(result.output.split()).count(words) == 1
