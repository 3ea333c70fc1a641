"""Any factory becomes a chain of layers, with the same values on every worker."""

from __future__ import annotations

import pytest
import torch

from deepopt.config import JobConfig, PrecisionConfig
from deepopt.convert import build_chain, build_layers, describe
from deepopt.convert.build import with_empty_memory
from deepopt.errors import InputError

CPU = torch.device("cpu")


def make_job(factory: str | None = None, **kwargs: object) -> JobConfig:
    model = {"kwargs": kwargs} | ({} if factory is None else {"factory": factory})
    return JobConfig.model_validate({"model": model})


def test_a_sequential_is_described_by_its_children() -> None:
    skeleton = describe(make_job("support.models:sequential", width=16))
    assert [layer.name for layer in skeleton.layers] == ["0", "1", "2"]
    assert [p.name for p in skeleton.layers[2].parameters] == ["2.weight", "2.bias"]
    assert skeleton.num_parameters == 4 * 16 + 16 + 16 * 2 + 2
    assert skeleton.layers[0].forward_flops_per_token == 2 * 4 * 16


def test_tied_weights_are_found_and_counted_once() -> None:
    skeleton = describe(make_job("support.models:Tied"))
    (head,) = skeleton.layer("head").parameters
    assert head.tied_to == "embed.weight"
    assert skeleton.num_parameters == 10 * 6 + 6 * 6 + 6


def test_a_worker_builds_the_values_that_the_whole_model_has() -> None:
    job = make_job("support.models:Tied")
    torch.manual_seed(job.training.seed)
    whole = build_chain(job, device="cpu").model.state_dict()
    for index in range(3):
        (layer,), _ = build_layers(job, [index], device=CPU)
        for name, parameter in layer.parameters.items():
            assert torch.equal(parameter, whole[name]), name


def test_layerwise_values_do_not_depend_on_what_else_is_built() -> None:
    job = make_job(num_blocks=3, d_model=32, num_heads=2)
    names = [layer.name for layer in describe(job).layers]
    together, _ = build_layers(job, range(len(names)), device=CPU)
    for index in range(len(names)):
        (alone,), _ = build_layers(job, [index], device=CPU)
        for name, parameter in alone.parameters.items():
            assert torch.equal(parameter, together[index].parameters[name]), name


def test_empty_memory_is_laid_out_as_torch_lays_it_out() -> None:
    def make() -> torch.nn.Module:
        torch.manual_seed(0)
        parts = (
            torch.nn.BatchNorm1d(4),
            torch.nn.Conv2d(2, 2, 3),
            torch.nn.Linear(3, 4).bfloat16(),
        )
        module = torch.nn.Sequential(*parts).to(memory_format=torch.channels_last)
        module.spread = torch.nn.Parameter(torch.ones(1, 3).expand(2, 3), requires_grad=False)
        return module.to("meta")

    ours, torchs = with_empty_memory(make()), make().to_empty(device="cpu")
    for name, expected in torchs.state_dict(keep_vars=True).items():
        found = ours.state_dict(keep_vars=True)[name]
        assert type(found) is type(expected), name
        assert found.device == CPU
        assert (found.dtype, found.shape, found.stride(), found.requires_grad) == (
            expected.dtype,
            expected.shape,
            expected.stride(),
            expected.requires_grad,
        ), name


def test_tied_weights_start_equal_and_are_parameters_of_their_own() -> None:
    job = make_job(num_blocks=1, d_model=32, num_heads=2)
    (embed, _, head), _ = build_layers(job, range(3), device=CPU)
    (tied,) = head.tied
    first, last = embed.parameters[head.tied[tied]], head.parameters[tied]
    assert torch.equal(first, last)
    assert first is not last


def test_a_module_at_two_places_of_a_sequential_is_two_layers() -> None:
    job = make_job("support.models:repeated_modules")
    skeleton = describe(job)
    assert [layer.name for layer in skeleton.layers] == ["0", "1", "2", "3", "4"]
    assert [p.tied_to for p in skeleton.layer("2").parameters] == ["0.weight", "0.bias"]
    layers, _ = build_layers(job, range(5), device=CPU)
    assert layers[2].parameters["2.weight"] is not layers[0].parameters["0.weight"]
    assert torch.equal(layers[2].parameters["2.weight"], layers[0].parameters["0.weight"])


def test_layers_that_hold_one_module_get_parameters_of_their_own() -> None:
    layers, _ = build_layers(make_job("support.models:shared_norm"), range(2), device=CPU)
    first, second = (layer.parameters for layer in layers)
    assert second["1.norm.weight"] is not first["0.norm.weight"]
    assert layers[0].module.get_parameter("norm.weight") is first["0.norm.weight"]
    assert layers[1].tied == {"1.norm.weight": "0.norm.weight", "1.norm.bias": "0.norm.bias"}


def test_a_layer_that_cannot_be_initialised_alone_is_named() -> None:
    with pytest.raises(InputError, match=r"layer 1 \(ReLU\) has no reset_parameters\(\)"):
        build_layers(make_job("support.models:Uninitialised"), range(2), device=CPU)


def test_the_seed_changes_the_values() -> None:
    job = make_job(num_blocks=1, d_model=32, num_heads=2)
    other = job.model_copy(
        update={"training": job.training.model_copy(update={"seed": job.training.seed + 1})}
    )
    (a,), _ = build_layers(job, [0], device=CPU)
    (b,), _ = build_layers(other, [0], device=CPU)
    assert not torch.equal(*(next(iter(x.parameters.values())) for x in (a, b)))


@pytest.mark.parametrize(
    "job",
    [
        make_job(num_blocks=1, d_model=2**16, num_heads=64),  # 275 GB
        make_job("support.models:Tied"),
        make_job("support.models:half_frozen").model_copy(
            update={"precision": PrecisionConfig(dtype="bfloat16")}
        ),
    ],
    ids=["initialises layer by layer", "recorded, tied", "frozen, bfloat16"],
)
def test_layers_without_memory_are_built_without_any(job: JobConfig) -> None:
    indices = range(len(describe(job).layers))
    layers, _ = build_layers(job, indices, device=torch.device("meta"))
    for layer in layers:
        assert all(p.is_meta for p in [*layer.parameters.values(), *layer.frozen.values()])


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "support.models:frozen",
            "nothing to train: all 4 parameters of support.models:frozen",
        ),
        ("support.models:Stray", "parameter gain belongs to none of the 1 layers"),
        ("support.models:without_layers", r"the forward of Linear raised .* same dtype"),
        ("support.models:broken", r"raised KeyError: 'hidden_size' \(.*models\.py:\d+\)"),
        ("support.models:not_a_module", "returned int, not a torch.nn.Module"),
    ],
)
def test_what_is_no_chain_is_refused_by_name(factory: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        describe(make_job(factory))
