"""The built-in model: a chain that can be cut anywhere, with the same bits on every run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from deepopt.errors import InputError
from deepopt.models.attention import CausalSelfAttention, rotate_by_position
from deepopt.models.feed_forward import MoeFeedForward, SwiGLU
from deepopt.models.moe_transformer import Block, MoeTransformer, build
from deepopt_kernels.weight_grad import WeightGradHolder, WeightGradQueue, defer_linears

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 32,
    "num_blocks": 3,
    "num_heads": 2,
    "num_experts": 4,
    "expert_hidden": 24,
}


class FirstExperts(torch.nn.Module):
    """A router of a user's own: always the first k experts, equal weights."""

    def __init__(self, d_model: int, *, num_experts: int, top_k: int, **_: object) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def reset_parameters(self) -> None:
        pass

    def forward(
        self, x_TD: torch.Tensor, padding_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        ids_TK = torch.arange(self.top_k).expand(len(x_TD), -1)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.num_experts)
        return torch.full(ids_TK.shape, 1 / self.top_k), ids_TK, counts_E


def no_router(*_: object, **__: object) -> str:
    return "router"


def small(**kwargs: Any) -> MoeTransformer:
    torch.manual_seed(0)
    return build(**{**SMALL, **kwargs})


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients(model: MoeTransformer, *, seed: int = 3) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(seed)
    data = tokens()
    model.loss(model(data[:, :-1]), data[:, 1:]).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_layers_are_module_paths_in_the_order_of_the_forward() -> None:
    model = small()
    layers = model.deepopt_layers()
    assert [name for name, _ in layers] == ["embed", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert all(model.get_submodule(name) is module for name, module in layers)
    held = {id(p) for _, module in layers for p in module.parameters()}
    assert held == {id(p) for p in model.parameters()}
    data = tokens()
    x = data
    for _, module in layers:
        x = module(x)
    assert x.shape == (2, 17, 50)
    assert torch.equal(x, model(data))


def test_it_can_be_built_without_memory() -> None:
    with torch.device("meta"):
        model = small()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {b.device.type for b in model.buffers()} == {"meta"}  # of the routers
    assert [n for n, _ in model.named_parameters()] == [
        n for n, _ in small().named_parameters()
    ]


def test_the_first_blocks_are_dense_and_as_wide_as_the_experts_of_a_token() -> None:
    model = small(num_dense_layers=2)
    kinds = [type(block.feed_forward) for block in model.blocks]
    assert kinds == [SwiGLU, SwiGLU, MoeFeedForward]
    assert model.blocks[0].feed_forward.down.in_features == 3 * 24
    assert small(dense_hidden=40).blocks[0].feed_forward.down.in_features == 40


def test_tied_weights_are_one_parameter() -> None:
    tied, untied = small(), small(tie_embeddings=False)
    assert tied.head.projection.weight is tied.embed.weight
    assert untied.head.projection.weight is not untied.embed.weight
    names = [n for n, _ in tied.head.named_parameters()]
    assert names == ["norm.weight", "projection.weight"]


@pytest.mark.parametrize("tie_embeddings", [True, False])
def test_each_layer_initialises_all_of_itself_from_the_seed(tie_embeddings: bool) -> None:
    model = small(tie_embeddings=tie_embeddings)
    values = []
    for _ in range(2):
        for parameter in model.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        for i, (_, layer) in enumerate(model.deepopt_layers()):
            torch.manual_seed(i)
            layer.reset_parameters()  # type: ignore[operator]
        values.append({n: p.detach().clone() for n, p in model.named_parameters()})
    for name, value in values[0].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, values[1][name]), name
    torch.manual_seed(0)
    model.embed.reset_parameters()
    want = model.embed.weight.detach().clone()
    model.head.reset_parameters()  # leaves a tied weight to the embedding
    assert torch.equal(model.embed.weight, want)


def test_projections_into_the_residual_stream_start_smaller() -> None:
    model = build(d_model=128, num_blocks=2, init_std=0.1)
    block = model.blocks[1]
    for weight in (
        block.attention.out.weight,
        block.feed_forward.shared.down.weight,
        block.feed_forward.experts.down_weight,
    ):
        assert weight.std().item() == pytest.approx(0.1 / 2, rel=0.05)  # sqrt(2 x 2)
    assert block.attention.qkv.weight.std().item() == pytest.approx(0.1, rel=0.05)


def test_no_position_sees_a_later_token() -> None:
    model = small().double().eval()
    data = tokens()
    changed = data.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    before, after = model(data), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_attention_depends_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    turned = rotate_by_position(torch.stack([query, key]).expand(1, 40, 2, 8), base=100.0)
    products = torch.einsum("sh,th->st", turned[0, :, 0].double(), turned[0, :, 1].double())
    for distance in range(5):
        diagonal = products.diagonal(-distance)
        torch.testing.assert_close(
            diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-5
        )
    assert not torch.allclose(products[5, 5], products[5, 4], atol=1e-3)


def test_attention_is_softmax_over_the_past() -> None:
    torch.manual_seed(0)
    attention = CausalSelfAttention(16, num_heads=2, rope_base=10000.0)
    x_BSD = torch.randn(3, 10, 16)
    query, key, value = attention.qkv(x_BSD).view(3, 10, 3, 2, 8).unbind(2)
    query, key = (rotate_by_position(part, base=10000.0) for part in (query, key))
    scores = torch.einsum("bsnh,btnh->bnst", query, key) / 8**0.5
    scores = scores.masked_fill(torch.ones(10, 10, dtype=torch.bool).triu(1), float("-inf"))
    mixed = torch.einsum("bnst,btnh->bsnh", scores.softmax(-1), value)
    torch.testing.assert_close(attention(x_BSD), attention.out(mixed.flatten(2)))


def test_experts_are_shared_ones_plus_the_routed_ones_weighted() -> None:
    torch.manual_seed(0)
    block = small(init_std=0.3).blocks[2].feed_forward
    x_BSD = torch.randn(2, 5, 32)
    x_TD = x_BSD.flatten(0, 1)
    weights_TK, ids_TK, _ = block.router(x_TD)
    want_TD = block.shared(x_TD).detach().clone()
    for token, (weights, ids) in enumerate(zip(weights_TK, ids_TK, strict=True)):
        for weight, expert in zip(weights, ids, strict=True):
            gate, up = (block.experts.gate_up_weight[expert] @ x_TD[token]).chunk(2)
            want_TD[token] += weight * (block.experts.down_weight[expert] @ (F.silu(gate) * up))
    torch.testing.assert_close(block(x_BSD).flatten(0, 1), want_TD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("noisy", [False, True])
def test_two_runs_give_the_same_bits(noisy: bool) -> None:
    model = small(**({"dropout": 0.2, "router_noise": 1.0} if noisy else {}))
    first, second = gradients(model), gradients(model)
    assert all(torch.equal(first[n], second[n]) for n in first)
    other = gradients(model, seed=4)
    assert noisy != all(torch.equal(first[n], other[n]) for n in first)


def test_deferred_weight_gradients_have_the_same_bits() -> None:
    # Tied weights are summed use by use, which is the pipeline's work.
    model = small(tie_embeddings=False)
    want = gradients(model)
    holder = WeightGradHolder()
    defer_linears(model, holder)
    now = gradients(model)
    queue = WeightGradQueue(holder)
    with queue.capture():
        soon = gradients(model)
    # Per block: qkv, out, and two each for a dense or shared part and the routed experts; the head.
    assert len(queue) == 3 * 4 + 2 * 2 + 1
    assert set(want) - set(soon) == {
        n for n in want if not n.endswith(("norm.weight", "router.weight", "embed.weight"))
    }
    queue.flush()
    later = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in want.items():
        assert torch.equal(gradient, now[name]), name
        assert torch.equal(gradient, later[name]), name  # type: ignore[arg-type]


def test_bfloat16_runs_with_routing_in_fp32() -> None:
    model = small().bfloat16()
    seen = []
    model.blocks[2].feed_forward.router.register_forward_hook(
        lambda _module, _args, out: seen.append(out[0].dtype)
    )
    found = gradients(model)
    assert seen == [torch.float32]
    assert model(tokens()).dtype == torch.bfloat16
    assert all(torch.isfinite(g).all() for g in found.values())
    assert model.loss(model(tokens()), tokens()).dtype == torch.float32


def test_the_loss_is_mean_cross_entropy_in_nats() -> None:
    logits = torch.zeros(2, 3, 50, dtype=torch.bfloat16)
    loss = MoeTransformer.loss(logits, torch.zeros(2, 3, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(50.0).log())


def test_flops_count_what_one_token_costs() -> None:
    model = small()
    flops = [layer.forward_flops_per_token(16) for _, layer in model.deepopt_layers()]  # type: ignore[operator]
    block = model.blocks[2]
    routed = block.feed_forward.experts
    active = sum(p.numel() for p in block.parameters() if p.dim() == 2) + (
        2 * (routed.gate_up_weight[0].numel() + routed.down_weight[0].numel())
    )
    assert flops[0] == 0
    assert flops[3] == 2 * active + 4 * 32 * 8.5  # attends to (16 + 1) / 2 tokens on average
    assert flops[4] == 2 * 32 * 50


def test_a_router_can_be_replaced() -> None:
    model = small(router=f"{__name__}:FirstExperts")
    found = gradients(model)
    experts = found["blocks.2.feed_forward.experts.down_weight"]
    assert [bool(part.any()) for part in experts] == [True, True, False, False]


def test_router_arguments_reach_the_router() -> None:
    model = small(router_noise=0.5, router_kwargs={"score": "sigmoid", "alpha": 0.2})
    router = model.blocks[1].feed_forward.router
    assert (router.noise, router.elb.alpha, router.gate.score) == (0.5, 0.2, "sigmoid")


def test_a_router_with_a_loss_gets_its_coefficient() -> None:
    model = small(router="deepopt.moe.router:TopKRouter", auxiliary_coefficient=0.2)
    assert model.blocks[1].feed_forward.router.auxiliary_coefficient == 0.2
    with pytest.raises(InputError, match="no key 'auxiliary_coefficient'") as caught:
        small(auxiliary_coefficient=0.2)
    assert "aux_coefficient" in caught.value.remedy


def test_it_learns() -> None:
    torch.manual_seed(0)
    model = build(**{**SMALL, "num_blocks": 2, "init_std": 0.05})
    data = torch.arange(33).remainder(7).expand(4, -1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model.loss(model(data[:, :-1]), data[:, 1:])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"d_model": 30}, "d_model 30.*2 heads"),
        ({"d_model": 34}, "d_model 34.*2 heads"),
        ({"top_k": 5}, "top_k 5.*num_experts 4"),
        ({"num_dense_layers": 4}, "num_dense_layers 4.*num_blocks 3"),
        ({"num_blocks": 0}, "num_blocks is 0"),
        ({"num_blocks": "6"}, "num_blocks is '6'"),
        ({"num_heads": True}, "num_heads is True"),
        ({"dropout": 1.0}, "dropout 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"router_noise": float("nan")}, "router_noise is nan"),
        ({"init_std": 0}, "init_std is 0"),
        ({"tie_embeddings": "yes"}, "tie_embeddings is 'yes'"),
        ({"router_kwargs": []}, "router_kwargs is"),
        ({"widht": 3}, "no argument 'widht'"),
        ({"router": "deepopt.moe.router:Nope"}, "Nope"),
        ({"router": f"{__name__}:no_router"}, "not a torch.nn.Module"),
        ({"router_kwargs": {"colour": 1}}, "colour"),
        ({"router_kwargs": {"score": "tanh"}}, "tanh"),
    ],
)
def test_bad_arguments_are_refused_by_name(kwargs: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        small(**kwargs)


def test_a_misspelt_argument_is_guessed() -> None:
    with pytest.raises(InputError) as caught:
        build(num_expert=4)
    assert caught.value.remedy == "did you mean 'num_experts'?"


def test_blocks_keep_the_shape() -> None:
    block = small().blocks[1]
    assert isinstance(block, Block)
    assert block(torch.randn(3, 5, 32)).shape == (3, 5, 32)
