"""Routers of models that nobody wrote for deepopt are found by structure and replaced."""

from __future__ import annotations

import copy

import pytest
import torch

from deepopt import convert_to_deepopt
from deepopt.config import ElbConfig, JobConfig
from deepopt.convert import describe
from deepopt.errors import InputError
from deepopt.moe import ElbRouter, configure_routers
from deepopt.moe.configure import ReplacedGate
from deepopt.pipeline.stage_experts import count_routers
from support.converted import in_stages
from support.transformers_models import VOCABULARY, deepseek_v3, llama, mixtral, qwen3_moe

FAMILIES = pytest.mark.parametrize(
    "make", [mixtral, qwen3_moe, deepseek_v3], ids=["mixtral", "qwen3_moe", "deepseek_v3"]
)
ASKED = ElbConfig(replace_routers=True)


def tokens(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCABULARY, (8, 128), generator=generator)


def built(make):
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):  # zeros choose nothing
            torch.nn.init.normal_(parameter, std=0.3)
    return model.train()


def routers(model: torch.nn.Module) -> list[ElbRouter]:
    return [module for module in model.modules() if isinstance(module, ElbRouter)]


@FAMILIES
def test_with_mode_none_outputs_keep_their_bits(make) -> None:
    model = built(make)
    before = model(tokens()).logits
    configure_routers(model, ElbConfig(mode="none", replace_routers=True))
    assert torch.equal(before, model(tokens()).logits)


@FAMILIES
def test_nothing_is_replaced_unless_asked_for(make) -> None:
    model = built(make)
    assert configure_routers(model, ElbConfig()) == 0


@FAMILIES
def test_without_bias_the_new_router_gives_what_the_old_one_did(make) -> None:
    model = built(make)
    before = model(tokens()).logits
    replaced = copy.deepcopy(model)
    assert configure_routers(replaced, ASKED.model_copy(update={"warmup": False})) > 0
    torch.testing.assert_close(replaced(tokens()).logits, before, rtol=1e-5, atol=1e-5)


@FAMILIES
def test_names_stay_and_state_is_added(make) -> None:
    model = built(make)
    before = model.state_dict()
    gates = {n: p for n, p in model.named_parameters() if n.endswith("gate.weight")}
    configure_routers(model, ASKED)
    after = model.state_dict()
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(model.get_parameter(name) is p for name, p in gates.items())
    added = {name.rpartition(".")[2] for name in after.keys() - before.keys()}
    assert {"expert_bias", "elb_step"} <= added


@FAMILIES
def test_elb_config_alone_balances_the_experts(make) -> None:
    def imbalance(model: torch.nn.Module, steps: int) -> float:
        worst = 0.0
        for step in range(steps):
            model(tokens(step))
            found = [r.read_counts(r._own_counts().numpy()).load for r in routers(model)]
            worst = max(load.max() / load.mean() for load in found)
            for router in routers(model):
                router.update()
        return worst

    model = built(make)
    with torch.no_grad():  # what all tokens have in common makes some experts popular
        model.get_input_embeddings().weight += 0.03
    chain = convert_to_deepopt(
        model,
        "line",
        example_inputs={"input_ids": tokens()},
        elb_config={"alpha": 0.3, "monitor_freq": 100},
    )
    assert len(routers(chain.model)) >= 3
    assert all(int(r._own_counts().sum()) == 0 for r in routers(model))
    unbalanced = copy.deepcopy(model)
    for router in routers(unbalanced):
        router.configure(ElbConfig(mode="aux", aux_coefficient=0.0))
    assert imbalance(model, 5) < 1.3 < 1.8 < imbalance(unbalanced, 1)


def test_gradients_reach_the_gate() -> None:
    model = built(mixtral)
    configure_routers(model, ASKED)
    ids = tokens()
    model(ids, labels=ids).loss.backward()
    assert all(r.weight.grad.abs().sum() > 0 for r in routers(model))


def test_bf16_models_keep_their_type() -> None:
    model = built(qwen3_moe).to(torch.bfloat16)
    configure_routers(model, ASKED)
    assert model(tokens()).logits.dtype == torch.bfloat16


def test_it_works_without_memory() -> None:
    with torch.device("meta"):
        model = mixtral()
    assert configure_routers(model, ASKED) == 4
    assert {b.device.type for r in routers(model) for b in r.buffers()} == {"meta"}


def test_a_gate_that_is_not_understood_is_one_error() -> None:
    class Gate(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.top_k = 2
            self.weight = torch.nn.Parameter(torch.zeros(4, 8))

        def forward(self, x: torch.Tensor):
            logits = x @ self.weight.t()
            ids = logits.topk(2).indices
            return logits, logits.gather(1, ids).tanh(), ids

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Parameter(torch.zeros(4, 8, 8))

    block = torch.nn.Module()
    block.gate, block.experts = Gate(), Experts()
    model = torch.nn.Sequential(block)
    with pytest.raises(InputError, match=r"0\.gate routes to experts in a way"):
        configure_routers(model, ASKED)
    assert not isinstance(block.gate, ReplacedGate)


def test_elb_config_for_a_model_without_experts_is_an_error() -> None:
    with pytest.raises(InputError, match="has no router"):
        convert_to_deepopt(llama(), example_inputs={"input_ids": tokens()}, elb_config={})


def test_a_bad_elb_config_changes_nothing() -> None:
    model = built(mixtral)
    with pytest.raises(InputError, match="alpha is 2"):
        convert_to_deepopt(
            model, example_inputs={"input_ids": tokens()}, elb_config={"alpha": 2}
        )
    assert not routers(model)


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3"])
def test_replaced_routers_give_the_same_bits_in_stages_and_recomputed(name: str) -> None:
    source = "support.transformers_models"
    job = JobConfig.model_validate(
        {
            "model": {"factory": f"{source}:{name}"},
            "data": {"dataset": f"{source}:Batches", "kwargs": {"kind": "padded"}},
            "training": {"microbatches": 1, "microbatch_size": 2},
            "elb": {"replace_routers": True},
        }
    )
    layers = describe(job).layers
    assert sum(count_routers(layer.buffers) for layer in layers) >= 3
    loss, gradients, _ = in_stages(job, [0])
    for boundaries, recompute in (([0, 2, 4], False), ([0, 3], True)):
        other, found, _ = in_stages(job, boundaries, recompute=recompute)
        assert torch.equal(loss, other)
        assert all(torch.equal(gradients[name], found[name]) for name in gradients)
