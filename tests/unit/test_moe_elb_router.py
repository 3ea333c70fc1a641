"""The router as a module: weights, counts, updates, and what does not change it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from deepopt.errors import CheckpointError, InputError, TrainingError
from deepopt.moe import ElbRouter, balancer, in_step
from deepopt.moe.elb_router import LOGITS_SHARE
from deepopt.moe.step_totals import gate_masses
from deepopt.pipeline.stage_experts import RouterFigures, summarise

MODES = ["elb", "formula", "sign", "quantile", "aux", "none"]


def make(**kwargs: Any) -> ElbRouter:
    torch.manual_seed(0)
    return ElbRouter(16, **{"num_experts": 8, "top_k": 2, "init_std": 0.4, **kwargs})


def tokens(number: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, 16, generator=generator) + 1.5


def train(router: ElbRouter, steps: int, *, first: int = 0, size: int = 2000) -> list[float]:
    """MaxVio of each step."""
    found = []
    for step in range(first, first + steps):
        _, _, load = router(tokens(size, seed=step))
        found.append(balancer.max_violation(load.numpy()))
        router.update()
    return found


def state_of(router: ElbRouter) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in router.named_buffers()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_experts_are_equally_busy_from_the_first_step_on() -> None:
    plain = train(make(mode="none"), 5)
    balanced = train(make(), 20)
    assert min(plain) > 0.8
    assert max(balanced) < 0.25
    assert sum(balanced[5:]) / 15 < 0.1


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", ["sign", "quantile", "formula"])
def test_other_modes_balance_too(mode: str, score: str) -> None:
    router = make(mode=mode, score=score, sign_rate=0.02, monitor_freq=1, alpha=0.2)
    assert max(train(router, 60)[-10:]) < 0.5


def test_feedback_inside_the_step_evens_out_sequences_that_differ() -> None:
    """Tokens of a micro-batch are alike, so that no bias from earlier steps can fit them."""

    def spread(**kwargs: Any) -> float:
        router = make(num_experts=32, top_k=4, alpha=1.0, **kwargs)
        found = []
        for step in range(12):
            generator = torch.Generator().manual_seed(step)
            topic = 0.5 * torch.randn(16, generator=generator)
            x = torch.randn(1024, 16, generator=generator) + topic
            _, _, load = router(x, sequence_length=256)
            found.append(balancer.straggler_factor(load.numpy(), devices=8))
            router.update()
        return sum(found[4:]) / 8

    without = spread(devices=1, warmup=False)
    assert without > 1.3
    assert spread(devices=8) < 1 + (without - 1) / 3
    assert spread(level="expert") < 1 + (without - 1) / 3


def test_the_warm_up_balances_scores_that_move_by_more_than_their_spread() -> None:
    """As those of a new model do while its learning rate warms up."""

    def worst(**kwargs: Any) -> float:
        router = make(num_experts=8, top_k=2, **kwargs)
        direction = torch.linspace(-1, 1, 8)
        found = []
        for step in range(10):
            logits = 0.3 * torch.randn(1024, 8, generator=torch.Generator().manual_seed(step))
            _, _, load = router.route(logits + step * direction, sequence_length=128)
            found.append(balancer.max_violation(load.numpy()))
            router.update()
        return max(found[2:])

    assert worst(warmup=False) > 1.5
    assert worst() < 0.5


def test_no_token_sees_a_later_one_after_the_first_step() -> None:
    router = make(devices=4, chunks=4)
    train(router, 2)
    x = tokens(64)
    _, ids, _ = router(x, sequence_length=32)
    changed = x.clone()
    changed.view(2, 32, 16)[:, 16:] += 3.0
    _, other, _ = router(changed, sequence_length=32)
    assert torch.equal(ids.view(2, 32, 2)[:, :16], other.view(2, 32, 2)[:, :16])
    assert not torch.equal(ids, other)


def test_weights_are_the_unbiased_scores_of_the_chosen() -> None:
    router = make()
    train(router, 5)
    x = tokens(50)
    weights, ids, _ = router.eval()(x)
    assert router.expert_bias.abs().max() > 0.1
    chosen = (x @ router.weight.t()).softmax(-1).gather(1, ids)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mode", ["elb", "quantile", "sign", "formula"])
def test_the_bias_is_added_to_what_the_mode_says(mode: str, score: str) -> None:
    router = make(mode=mode, score=score, sign_rate=0.02, monitor_freq=1)
    train(router, 5)
    x = tokens(50)
    logits = x @ router.weight.t()
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    if mode == "elb":
        scores = scores + LOGITS_SHARE * (1 / 8 if score == "softmax" else 1 / 4) * logits
    if mode == "formula":
        scores = scores.log()
    expected = (scores + router.expert_bias).topk(2).indices
    assert torch.equal(router.eval()(x)[1], expected)
    assert not torch.equal(logits.topk(2).indices, expected)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_even_loads_give_up_less_gate_mass_than_with_a_bias_on_log_scores(score: str) -> None:
    """Of all choices with given loads, those by score + bias have the highest sum of scores."""

    def last(**kwargs: Any) -> tuple[float, float]:
        router = make(num_experts=32, top_k=4, score=score, **kwargs)
        train(router, 20)
        lost, vio = [], []
        for step in range(20, 30):
            _, _, load = router(tokens(2000, seed=step))
            best, chosen = gate_masses(router._own_counts().numpy())
            lost.append(1 - chosen / best)
            vio.append(balancer.max_violation(load.numpy()))
            router.update()
        return sum(lost) / 10, sum(vio) / 10

    lost, vio = last()
    lost_on_logs, vio_on_logs = last(mode="formula", monitor_freq=1, alpha=0.2)
    assert vio < vio_on_logs + 0.02
    assert lost < 0.95 * lost_on_logs


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_loads_are_even_where_scores_saturate(score: str) -> None:
    """A few experts take all the score, what is left for others differs by less than fp32 can tell."""
    router = make(num_experts=32, top_k=4, score=score, init_std=2.0)
    assert sum(train(router, 30)[-10:]) / 10 < 0.25  # the noise of 250 tokens is 0.13


def test_mode_none_is_plain_top_k() -> None:
    router = make(mode="none")
    train(router, 3)
    x = tokens(50)
    assert torch.equal(router(x)[1], (x @ router.weight.t()).topk(2).indices)


def test_evaluation_neither_counts_nor_changes_anything() -> None:
    router = make()
    train(router, 2)
    before = state_of(router)
    first = router.eval()(tokens(300))
    second = router(tokens(300))
    assert torch.equal(first[1], second[1])
    router.update()
    after = state_of(router)
    assert after["elb_step"] == before["elb_step"] + 1  # a step without tokens
    for name in ("expert_bias", "elb_histogram", "elb_load"):
        assert torch.equal(before[name], after[name])


def test_micro_batches_of_a_step_make_the_update_of_the_whole() -> None:
    whole, parts = make(warmup=False), make(warmup=False)
    x = tokens(512)
    whole(x)
    for part in x.split(128):
        parts(part)
    whole.update()
    parts.update()
    names = [
        n for n, _ in whole.named_buffers() if n != "elb_natural"
    ]  # sampled by micro-batch
    assert all(torch.equal(state_of(whole)[n], state_of(parts)[n]) for n in names)


def test_checkpointed_forwards_count_once() -> None:
    plain = make()
    x = tokens(256).requires_grad_()
    plain(x)[0].sum().backward()
    for reentrant in (True, False):
        other = make()
        weights, _, _ = checkpoint(other, x, use_reentrant=reentrant)
        weights.sum().backward()
        assert torch.equal(other._counts, plain._counts)


def test_a_repeated_pass_takes_the_choices_of_the_first_and_counts_once() -> None:
    router = make()
    router.keeps_routes = True
    router.begin_pass("micro-batch 0")
    _, ids, load = router(tokens(64))
    counted = router._counts.clone()
    router.begin_pass("micro-batch 0")
    _, again, load_again = router(tokens(64) + 1e-3)
    assert torch.equal(ids, again)
    assert torch.equal(load, load_again)
    assert torch.equal(router._counts, counted)


def test_padding_is_not_counted() -> None:
    router = make()
    x = tokens(100)
    mask = torch.zeros(100, dtype=torch.bool)
    mask[60:] = True
    _, _, load = router(x, mask)
    assert load.sum() == 120
    alone = make()
    alone(x[:60])
    router.update()
    alone.update()
    names = [n for n, _ in router.named_buffers() if n != "elb_natural"]
    assert all(torch.equal(state_of(router)[n], state_of(alone)[n]) for n in names)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("experts", "top_k", "size"), [(1, 1, 5), (3, 3, 5), (4, 2, 0)])
def test_edges(mode: str, experts: int, top_k: int, size: int) -> None:
    router = make(num_experts=experts, top_k=top_k, mode=mode, monitor_freq=1, devices=experts)
    for _ in range(2):
        weights, ids, load = router(tokens(size).requires_grad_(), sequence_length=max(size, 1))
        weights.sum().backward()
        router.update()
    assert ids.shape == (size, top_k)
    assert load.sum() == size * top_k
    assert router.expert_bias.isfinite().all()


def test_state_survives_a_state_dict_bit_for_bit() -> None:
    router = make()
    train(router, 4)
    other = make()
    other.load_state_dict(router.state_dict())
    assert train(router, 3, first=4) == train(other, 3, first=4)
    assert same(state_of(router), state_of(other))


def test_state_of_another_number_of_experts_is_one_error() -> None:
    router = make()
    with pytest.raises(CheckpointError, match="state of 4 experts, this router has 8"):
        router.load_state_dict(make(num_experts=4).state_dict())


def test_a_bias_learned_for_log_scores_is_forgotten_with_a_word(
    caplog: pytest.LogCaptureFixture,
) -> None:
    older, router = make(mode="formula", monitor_freq=1), make()
    train(older, 4)
    router.load_state_dict(older.state_dict())
    assert "learned for log scores, mode elb adds to scores" in caplog.text
    assert router.elb_step == 0
    assert not router.expert_bias.any()
    assert max(train(router, 5)) < 0.25


def test_a_bias_of_another_mode_on_the_same_scores_is_kept() -> None:
    older, router = make(mode="sign"), make()
    train(older, 4)
    router.load_state_dict(older.state_dict())
    assert torch.equal(router.expert_bias, older.expert_bias)


def test_a_state_that_does_not_say_what_it_was_learned_for_is_one_error() -> None:
    state = make().state_dict()
    del state["elb_scale"]
    with pytest.raises(CheckpointError, match="elb_scale is missing"):
        make().load_state_dict(state)


def test_a_job_that_goes_on_in_another_mode_forgets_the_bias_at_its_next_step() -> None:
    """Resumed layers get their buffers one by one, without `load_state_dict`."""
    older, router = make(), make(mode="none")
    train(older, 4)
    with torch.no_grad():
        for name, buffer in router.named_buffers():
            buffer.copy_(older.get_buffer(name))
    router.begin_step()
    assert not router.expert_bias.any()


def test_scores_that_are_not_finite_are_an_error_and_change_nothing() -> None:
    router = make()
    train(router, 1)
    before = state_of(router)
    x = tokens(20)
    x[3] = float("nan")
    router(x)
    with pytest.raises(TrainingError, match="not finite for 1 tokens"):
        router.update()
    assert same(before, state_of(router))


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"top_k": 9}, "cannot choose 9 of 8"),
        ({"score": "tanh"}, "tanh"),
        ({"noise": -1.0}, "noise"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"monitor_freq": 0}, "monitor_freq is 0"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"num_groups": 3}, "3 groups"),
        ({"num_groups": 8, "top_groups": 1}, "cannot give 2 choices"),
    ],
)
def test_bad_arguments_are_named(kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        make(**kwargs)


def test_losses_reach_the_weight_and_none_is_attached_by_default() -> None:
    def gradient(**kwargs: Any) -> torch.Tensor:
        router = make(warmup=False, **kwargs)
        weights, _, _ = router(tokens(64), sequence_length=16)
        (weights * torch.arange(2.0)).sum().backward()
        return router.weight.grad

    plain = gradient()
    for kwargs in (
        {"mode": "aux", "aux_coefficient": 0.5},
        {"sequence_coefficient": 0.5},
        {"z_coefficient": 0.5},
    ):
        assert not torch.allclose(gradient(**kwargs), plain), kwargs


def test_a_formula_that_overshoots_warns_once() -> None:
    router = make(mode="formula", alpha=1.0, monitor_freq=1, init_std=0.02)
    router(tokens(2000))
    router.update()
    warning = router.gain_warning()
    assert warning is not None
    assert "loop gain of" in warning
    assert router.gain_warning() is None


def test_target_share_leaves_popular_experts_more() -> None:
    def last(**kwargs: Any) -> float:
        return sum(train(make(**kwargs), 30)[-5:]) / 5

    assert last() < 0.2 < last(target_share=0.5) < last(mode="none")


def test_group_limited_routing_balances_within_its_groups() -> None:
    found = train(make(num_groups=4, top_groups=2), 40)
    assert (
        sum(found[-5:]) / 5 < 0.5 * train(make(num_groups=4, top_groups=2, mode="none"), 1)[0]
    )


def test_it_compiles_as_one_graph() -> None:
    router = make().eval()
    compiled = torch.compile(router, backend="eager", fullgraph=True)
    x = tokens(32)
    for found, expected in zip(compiled(x), router(x), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("kwargs", "padded"), [({}, True), ({"devices": 4, "chunks": 2}, False)]
)
def test_training_compiles_as_one_graph_with_equal_bits(
    kwargs: dict[str, Any], padded: bool
) -> None:
    plain, other = (make(monitor_freq=4, **kwargs) for _ in range(2))
    mask = torch.arange(64) % 32 >= 24 if padded else None
    for router in (plain, other):  # the first window warms up
        train(router, 4, size=256)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for step in range(2):
        x = tokens(64, seed=step)
        expected = plain(x, mask, sequence_length=32)
        for a, b in zip(compiled(x, mask, sequence_length=32), expected, strict=True):
            assert torch.equal(a, b)
        plain.update()
        other.update()
        assert same(state_of(plain), state_of(other))


def test_a_router_warms_up_in_step_1_and_until_its_bias_fits_and_can_be_told_to() -> None:
    router = make()
    assert router.warms_up()
    train(router, 6)
    assert not router.warms_up()
    assert router.hold_warm_up()
    assert router.warms_up()
    router.update()
    assert not router.warms_up()
    settled = make(warmup=False)
    assert not settled.warms_up()
    assert not settled.hold_warm_up()


def test_the_share_of_routers_that_warm_up_is_a_figure_of_the_step() -> None:
    names = RouterFigures.__slots__
    rows = [[float(name == "warm_up") * on for name in names] for on in (1.0, 0.0, 1.0, 1.0)]
    assert summarise(rows)["warm_up_share"] == 0.75


@pytest.mark.parametrize(
    ("options", "chunks"), [({}, 5), ({"devices": 4}, 16), ({"level": "expert"}, 16)]
)
def test_the_warm_up_alone_cuts_a_sequence_only_where_it_sets_the_bias_anew(
    options: dict[str, Any], chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    router = make(**options)
    router.train()
    x_TD = torch.randn(64, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    router(x_TD, sequence_length=64)
    router.update()
    router.elb_drift.fill_(1.0)  # scores have moved away since
    router.begin_step()
    choices: list[int] = []

    def counted(u_TE: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        choices.append(len(u_TE))
        return select(u_TE, *args, **kwargs)

    select = in_step.elb_select
    monkeypatch.setattr(in_step, "elb_select", counted)
    router(x_TD, sequence_length=64)
    assert len(choices) == chunks
