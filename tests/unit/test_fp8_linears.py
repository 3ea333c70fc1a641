"""Which linear maps of a model compute in FP8, and that nothing else of it changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from deepopt import BiStreamPipeline, convert_to_deepopt
from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.convert.fp8_linears import (
    LinearMap,
    check_device,
    choose,
    linear_maps,
    set_fp8_linears,
)
from deepopt.errors import ClusterError, InputError
from deepopt.launch.fp8_words import fp8_words
from deepopt.pipeline.weight_probe import probe
from deepopt.pipeline.weight_trial import Way
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker.calibrate import layer_kinds
from deepopt_kernels.fp8_linear import Fp8Linear
from support.converted import in_stages, of_original

CPU = torch.device("cpu")
SOURCE = "support.transformers_models"
DENSE = {"num_blocks": 2, "num_dense_layers": 2, "d_model": 32, "expert_hidden": 16}


def linear(path: str, outputs: int = 256, inputs: int = 128, **more: Any) -> LinearMap:
    return LinearMap(path=path, outputs=outputs, inputs=inputs, **more)


def make_job(precision: Mapping[str, Any], **sections: Any) -> JobConfig:
    return JobConfig.model_validate({"precision": precision, **sections})


def of_transformers(name: str, kind: str, **precision: Any) -> JobConfig:
    return make_job(
        precision,
        model={"factory": f"{SOURCE}:{name}"},
        data={"dataset": f"{SOURCE}:Batches", "kwargs": {"kind": kind}},
        training={"microbatches": 1, "microbatch_size": 2},
    )


def test_by_default_the_linear_maps_of_repeated_blocks_are_taken() -> None:
    choice = choose(
        [
            linear("patch_projection"),
            linear("layers.0.attention.q"),
            linear("layers.0.mlp.gate_proj"),
            linear("layers.0.mlp.4"),
            linear("layers.0.mlp.gate"),
            linear("layers.0.router.classifier"),
            linear("layers.0.shared_expert_gate"),
            linear("layers.0.lora_A", outputs=16),
            linear("layers.0.odd", outputs=1000),
            linear("layers.0.weird", obstacle="a Weird may compute something else"),
            linear("layers.0.tied", shares_weight=True),
            linear("lm_head"),
        ]
    )
    assert choice.taken == (
        "layers.0.attention.q",
        "layers.0.mlp.gate_proj",
        "layers.0.mlp.4",
    )
    assert choice.left == {
        "patch_projection": "outside of repeated blocks",
        "layers.0.mlp.gate": "it routes",
        "layers.0.router.classifier": "it routes",
        "layers.0.shared_expert_gate": "it routes",
        "layers.0.lora_A": "a side is shorter than 128, a tile",
        "layers.0.odd": "a side is no multiple of 16",
        "layers.0.weird": "a Weird may compute something else",
        "layers.0.tied": "its weight is an embedding's, too",
        "lm_head": "outside of repeated blocks",
    }


def test_of_a_plain_sequence_all_but_the_last_are_taken() -> None:
    choice = choose([linear("0"), linear("2"), linear("4")])
    assert choice.taken == ("0", "2")
    assert choice.left == {"4": "the output projection"}


def test_patterns_name_linear_maps_or_what_holds_them() -> None:
    linears = [
        linear(f"layers.{i}.mlp.{n}", inputs=16) for i in range(2) for n in ("up", "down")
    ]
    linears += [linear("layers.1.odd", outputs=20), linear("lm_head", shares_weight=True)]
    assert choose(linears, include=["lm_head", "*.up"]).taken == (
        "layers.0.mlp.up",
        "layers.1.mlp.up",
        "lm_head",
    )
    some = choose(linears, include=["layers.1"], exclude=["*.mlp.down"])
    assert some.taken == ("layers.1.mlp.up",)
    assert some.left["layers.1.odd"] == "a side is no multiple of 16"
    assert some.left["layers.1.mlp.down"] == "excluded"
    assert some.left["lm_head"] == "not included"


def test_a_pattern_that_names_nothing_is_refused_with_the_nearest_name() -> None:
    linears = [linear("layers.0.mlp.up"), linear("lm_head")]
    with pytest.raises(InputError, match="'lm_heat' names no linear map") as caught:
        choose(linears, exclude=["lm_heat"], section="precision.")
    assert caught.value.message.startswith("precision.fp8_exclude: ")
    assert caught.value.remedy == "did you mean 'lm_head'?"
    with pytest.raises(InputError) as caught:
        choose(linears, include=["layer.0"])
    assert caught.value.remedy == "did you mean 'layers.0'?"
    with pytest.raises(InputError, match="fp8_include: 'conv' names") as caught:
        choose(linears, include=["conv"])
    assert caught.value.remedy == "linear maps here: layers.0.mlp.up, lm_head"


def test_a_model_in_which_nothing_would_be_taken_is_refused_with_the_reasons() -> None:
    linears = [linear(f"layers.{i}.up", inputs=64) for i in range(5)] + [linear("lm_head")]
    with pytest.raises(InputError, match="no linear map would compute in FP8") as caught:
        choose(linears, section="precision.")
    assert caught.value.message.endswith(
        "a side is shorter than 128, a tile (layers.0.up, layers.1.up, layers.2.up and 2 more); "
        "outside of repeated blocks (lm_head)"
    )
    with pytest.raises(InputError, match=r"the model has no nn\.Linear"):
        choose([])


class TwoHeads(torch.nn.Module):
    """An embedding whose matrix is also that of the output, and an attention of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(256, 128)
        self.blocks = torch.nn.ModuleList(
            torch.nn.TransformerEncoderLayer(128, 2, 128, dropout=0.0, batch_first=True)
            for _ in range(2)
        )
        self.head = torch.nn.Linear(128, 256, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def test_names_parameters_and_ties_stay_and_another_choice_undoes_the_first() -> None:
    model = TwoHeads()
    before = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    names = list(model.state_dict())
    choice = set_fp8_linears(model)
    assert choice.taken == tuple(f"blocks.{i}.linear{j}" for i in (0, 1) for j in (1, 2))
    assert choice.left["head"] == "its weight is an embedding's, too"
    assert "NonDynamicallyQuantizableLinear" in choice.left["blocks.0.self_attn.out_proj"]
    assert {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)} == before
    assert list(model.state_dict()) == names
    set_fp8_linears(model, include=["head"])
    found = [n for n, m in model.named_modules() if isinstance(m, Fp8Linear)]
    assert found == ["head"]
    assert type(model.blocks[0].linear1) is torch.nn.Linear


def test_weights_in_float64_stay() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(128, 128).double())
    assert [m.obstacle for m in linear_maps(model)] == ["its weight is float64"]


def test_a_converted_model_computes_in_fp8_itself_and_layer_by_layer() -> None:
    torch.manual_seed(0)
    model, tokens = TwoHeads(), torch.arange(24).view(2, 12)
    plain = copy.deepcopy(model)
    converted = convert_to_deepopt(model, example_inputs=tokens, fp8="blockwise")
    assert converted.fp8 is not None
    assert len(converted.fp8.taken) == 4
    found, exact = model(tokens), plain(tokens)
    assert torch.equal(converted(tokens), found)
    error = (found - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.06  # 0.038 a product; norms and residuals keep it from adding up


def test_a_loop_of_ones_own_has_the_bits_of_the_converted_model() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(128, 128) for _ in range(3)))
    x, grad = torch.randn(16, 128), torch.randn(16, 128)
    converted = convert_to_deepopt(model, fp8="blockwise")
    plain = copy.deepcopy(model)
    assert [isinstance(m, Fp8Linear) for m in plain] == [True, True, False]
    expected = [plain(part) for part in x.chunk(2)]
    for output, part in zip(expected, grad.chunk(2), strict=True):
        output.backward(part)
    pipeline = BiStreamPipeline(converted, 1, microbatches=2)
    found = pipeline.forward_pass(x)
    assert torch.equal(found, torch.cat(expected))
    pipeline.backward_pass(grad)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor"
)  # both of torch's compiler
def test_compiled_layers_stay_compiled_and_keep_the_bits() -> None:
    torch.manual_seed(0)
    model, x = (
        torch.nn.Sequential(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128)),
        torch.randn(40, 128),
    )
    plain = copy.deepcopy(model)
    set_fp8_linears(plain, include=["*"])
    expected = plain(x)
    expected.square().mean().backward()
    graphs: list[int] = []

    def counting(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    model[1].compile(backend=counting)
    found = convert_to_deepopt(model, fp8="blockwise", fp8_include=["*"])(x)
    found.square().mean().backward()
    assert len(graphs) == 1
    assert torch.equal(found, expected)
    for (name, one), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fp8": "rowwise"}, "'rowwise' is unknown"),
        ({"fp8": "blockwise", "fp8_include": "head"}, "fp8_include is a string"),
        ({"fp8_exclude": ["head"]}, "fp8_exclude names linear maps for FP8, and fp8 is none"),
        ({"fp8": "blockwise", "fp8_include": ["tail"]}, "'tail' names no linear map"),
    ],
)
def test_wrong_arguments_of_a_conversion_leave_the_model_as_it_was(
    arguments: dict[str, Any], message: str
) -> None:
    model = TwoHeads()
    with pytest.raises(InputError, match=message):
        convert_to_deepopt(
            model, example_inputs=torch.zeros(1, 4, dtype=torch.long), **arguments
        )
    assert not any(isinstance(m, Fp8Linear) for m in model.modules())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "ids"),
        ("t5", "pairs"),
        ("llama_adapted_recomputed", "ids"),
    ],
)
def test_models_of_transformers_in_stages_have_the_bits_of_their_own_forward(
    name: str, kind: str
) -> None:
    job = of_transformers(
        name, kind, fp8="blockwise", fp8_include=["*"], fp8_exclude=["*lm_head"]
    )
    skeleton = describe(job)
    assert skeleton.num_fp8 >= 8
    loss, gradients = of_original(job)
    found, others, _ = in_stages(job, [0, 2], recompute=True)
    assert torch.equal(loss, found)
    assert gradients.keys() >= others.keys()
    assert all(torch.equal(gradients[n], others[n]) for n in others)


def test_a_layer_that_keeps_its_precision_is_measured_for_itself() -> None:
    job = make_job(
        {"fp8": "blockwise", "fp8_include": ["blocks"], "fp8_exclude": ["blocks.1"]},
        model={"kwargs": {**DENSE, "num_blocks": 3, "num_dense_layers": 3}},
    )
    first, second, third = layer_kinds(describe(job).layers)[1:4]
    assert first == third
    assert first != second


@pytest.mark.parametrize("factory", ["deepopt.models.moe_transformer:build", f"{SOURCE}:llama"])
def test_checkpoints_are_those_of_the_model_without_fp8(factory: str) -> None:
    sections: dict[str, Any] = {"model": {"factory": factory}}
    plain = describe(make_job({}, **sections))
    inside = describe(make_job({"fp8": "blockwise", "fp8_include": ["*"]}, **sections))
    assert inside.num_fp8 > plain.num_fp8 == 0
    assert inside.fingerprint() == plain.fingerprint()
    assert ModelSkeleton.from_json(json.loads(json.dumps(inside.to_json()))) == inside


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weight_gradients_of_blocks_in_fp8_wait(dtype: str) -> None:
    job = make_job(
        {"dtype": dtype, "fp8": "blockwise", "fp8_include": ["blocks"]}, model={"kwargs": DENSE}
    )
    (layer,), _ = build_layers(job, [1], device=CPU)
    kind = torch.bfloat16 if dtype == "bfloat16" else torch.float32
    x = torch.randn(2, 8, 32, dtype=kind, requires_grad=True)
    verdict = probe(layer.module, inputs=(x,), seed=lambda: None)
    assert (verdict.way, verdict.reason) == (Way.DEFERRED, "")


def test_the_launch_says_what_computes_in_fp8_and_what_does_not() -> None:
    job = make_job(
        {
            "dtype": "bfloat16",
            "fp8": "blockwise",
            "fp8_include": ["*"],
            "fp8_exclude": ["head"],
        },
        model={"kwargs": {**DENSE, "num_dense_layers": 1, "expert_hidden": 8}},
        worker={"device": "cpu"},
    )
    words = fp8_words(job, describe(job))
    assert words == (
        "6 linear maps with 39 % of the parameters, a scale each 128 values or 128 x 128 block; "
        "3 stay in bfloat16: "
        "a side is no multiple of 16 (blocks.0.feed_forward.down, blocks.1.feed_forward.shared.down), "
        "excluded (head.projection); "
        "on CPUs computed by the PyTorch reference: right, but slower than without"
    )
    assert fp8_words(make_job({}), describe(make_job({}))) is None


def test_a_gpu_without_the_products_is_refused_with_the_next_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(
        ClusterError, match=r"A100-SXM4-80GB \(compute capability 8\.0"
    ) as caught:
        check_device(gpu)
    assert caught.value.remedy == "set precision.fp8 to none, or use such GPUs"
    job = make_job({"fp8": "blockwise"})
    with pytest.raises(ClusterError, match=r"precision\.fp8 is blockwise"):
        build_layers(job, [1], device=gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    check_device(gpu)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    with pytest.raises(ClusterError, match=r"torch for CUDA 12\.8"):
        check_device(gpu)
