"""Decisions of the balancer, without tensors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.config import ElbConfig
from deepopt.moe import balancer
from deepopt.moe.balancer import NUM_BINS, StepCounts, first_state, update

NONE = np.zeros((4, NUM_BINS), dtype=np.int64)


def counts_of(load: list[int], histogram: np.ndarray | None = None) -> StepCounts:
    loads = np.array(load, dtype=np.int64)
    shape = np.zeros((len(load), NUM_BINS), dtype=np.int64) if histogram is None else histogram
    return StepCounts(histogram=shape, load=loads, natural=loads)


def simulated(u: np.ndarray, state: balancer.BalancerState, top_k: int) -> StepCounts:
    """What `elb_select` counts, in numpy."""
    v = u + state.bias
    order = np.argsort(-v, axis=1, kind="stable")
    cutoff = np.take_along_axis(v, order[:, top_k : top_k + 1], axis=1)
    z = (cutoff - u - state.origin) / state.width
    bins = np.clip(
        ((z / (balancer.NEAR + abs(z)) + 1) / 2 * NUM_BINS).astype(int), 0, NUM_BINS - 1
    )
    experts = u.shape[1]
    histogram = np.stack([np.bincount(bins[:, e], minlength=NUM_BINS) for e in range(experts)])
    load = np.bincount(order[:, :top_k].ravel(), minlength=experts)
    return StepCounts(histogram=histogram, load=load, natural=load)


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0, 3.0, 50.0])
def test_tracking_settles_whatever_the_scale_of_the_scores(scale: float) -> None:
    rng = np.random.default_rng(0)
    popular = rng.normal(size=16) * 2
    state, elb = first_state(16), ElbConfig()
    for _ in range(20):
        u = scale * (rng.normal(size=(4000, 16)) + popular)
        counts = simulated(u, state, 2)
        state = update(state, counts, elb=elb, top_k=2)
    assert balancer.max_violation(counts.load) < 0.2  # three times the noise of 500 tokens


def test_scores_that_move_by_more_than_their_spread_are_noticed_and_those_that_rest_are_not() -> (
    None
):
    rng = np.random.default_rng(3)
    popular, elb = rng.normal(size=16), ElbConfig()
    for speed, unsettled in ((0.0, False), (4.0, True)):
        state = first_state(16)
        for _ in range(8):
            moved = popular * speed * state.step
            counts = simulated(rng.normal(size=(4000, 16)) + moved, state, 2)
            state = update(state, counts, elb=elb, top_k=2)
        assert balancer.is_unsettled(state.drift, step=state.step, elb=elb) == unsettled
        assert not balancer.is_unsettled(state.drift, step=elb.monitor_freq, elb=elb)
        assert not balancer.is_unsettled(
            state.drift, step=state.step, elb=ElbConfig(warmup=False)
        )


def test_a_sudden_shift_is_followed() -> None:
    rng = np.random.default_rng(1)
    state, elb = first_state(16), ElbConfig()
    popular = rng.normal(size=16) * 2
    for step in range(24):
        popular = popular if step != 14 else rng.permutation(popular)
        counts = simulated(rng.normal(size=(4000, 16)) + popular, state, 2)
        state = update(state, counts, elb=elb, top_k=2)
    assert balancer.max_violation(counts.load) < 0.2


def test_bins_are_fine_enough_for_a_cliff_on_one_side_of_the_quantile() -> None:
    """As where scores saturate: few tokens want an expert, all others would need the same bias."""
    rng = np.random.default_rng(0)
    wanting, others = -10 * rng.exponential(size=1000), 0.05 * rng.random(3000)
    needs = np.concatenate([wanting, others])  # a quarter, k/E, lies below 0
    state, elb = first_state(4), ElbConfig()
    for _ in range(10):
        z = (needs[:, None] - state.origin) / state.width
        bins = ((z / (balancer.NEAR + abs(z)) + 1) / 2 * NUM_BINS).astype(int)
        histogram = np.stack([np.bincount(bins[:, e], minlength=NUM_BINS) for e in range(4)])
        state = update(state, counts_of([1000] * 4, histogram), elb=elb, top_k=1)
    assert (state.width < 0.05 / 16).all()


def test_moving_bins_keeps_every_count() -> None:
    rng = np.random.default_rng(2)
    state, elb = first_state(8), ElbConfig()
    for _ in range(5):
        state = update(
            state, simulated(9 * rng.normal(size=(500, 8)), state, 2), elb=elb, top_k=2
        )
        totals = state.histogram.sum(axis=1)
        np.testing.assert_allclose(totals, totals[0], rtol=1e-12)
    assert (state.width != balancer.FIRST_WIDTH).any()


def test_the_formula_acts_once_a_window_and_its_factor_is_clamped() -> None:
    elb = ElbConfig(mode="formula", alpha=0.3, monitor_freq=2)
    state = update(first_state(4), counts_of([30, 0, 0, 10]), elb=elb, top_k=1)
    assert not state.bias.any()
    state = update(state, counts_of([30, 0, 0, 10]), elb=elb, top_k=1)
    raw = np.log([0.4, 1.3, 1.3, 1.0])
    np.testing.assert_allclose(state.bias, raw - raw.mean())
    # 1 + 0.3 x (1 - 32) is negative: only the clamp keeps the logarithm
    elb = elb.model_copy(update={"monitor_freq": 1})
    state = update(first_state(32), counts_of([320] + [0] * 31), elb=elb, top_k=1)
    np.testing.assert_allclose(state.bias[0] - state.bias[1], np.log(0.2 / 1.3))


def test_sign_moves_every_bias_by_the_same_amount() -> None:
    state = update(
        first_state(3), counts_of([5, 1, 3]), elb=ElbConfig(mode="sign", sign_rate=0.5), top_k=1
    )
    assert state.bias.tolist() == [-0.5, 0.5, 0.0]


@pytest.mark.parametrize("mode", ["elb", "formula", "sign", "quantile", "aux", "none"])
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 4), (4, 2)])
def test_a_step_without_tokens_changes_no_bias(mode: str, experts: int, top_k: int) -> None:
    elb = ElbConfig(mode=mode, monitor_freq=1)
    state = update(first_state(experts), counts_of([0] * experts), elb=elb, top_k=top_k)
    assert (state.step, state.bias.tolist()) == (1, [0.0] * experts)


@pytest.mark.parametrize("mode", ["elb", "formula", "sign", "quantile"])
def test_nothing_is_to_balance_where_every_expert_is_chosen(mode: str) -> None:
    elb = ElbConfig(mode=mode, monitor_freq=1)
    state = update(first_state(3), counts_of([7, 7, 7]), elb=elb, top_k=3)
    assert not state.bias.any()
    assert state.load.tolist() == [7, 7, 7]


def test_targets_are_tempered_natural_shares() -> None:
    state = update(
        first_state(4), counts_of([80, 20, 0, 0]), elb=ElbConfig(mode="none"), top_k=1
    )
    assert balancer.target_shares(state, temper=0.0).tolist() == [0.25] * 4
    shares = balancer.target_shares(state, temper=0.5)
    np.testing.assert_allclose(shares.sum(), 1)
    np.testing.assert_allclose(shares[0] / shares[1], 2)
    assert shares[2] > 0  # what is never chosen still has a target


def test_tracking_reaches_targets_that_are_not_uniform() -> None:
    rng = np.random.default_rng(3)
    popular = np.linspace(0, 1.5, 8)
    state, elb = first_state(8), ElbConfig(target_share=0.5)
    for _ in range(20):
        u = rng.normal(size=(8000, 8)) + popular
        counts = simulated(u, state, 2)
        natural = simulated(u, first_state(8), 2).load
        state = update(
            state,
            StepCounts(histogram=counts.histogram, load=counts.load, natural=natural),
            elb=elb,
            top_k=2,
        )
    shares = balancer.target_shares(state, temper=0.5)
    assert balancer.max_violation(counts.load, shares) < 0.1
    assert balancer.max_violation(counts.load) > 0.3


def test_measures() -> None:
    assert balancer.max_violation(np.array([2, 1, 1])) == 0.5
    assert balancer.max_violation(np.array([0, 0])) == 0.0
    assert balancer.straggler_factor(np.array([3, 1, 1, 1]), devices=2) == pytest.approx(4 / 3)
    assert balancer.straggler_factor(np.array([3, 1]), devices=1) == 1.0
    assert balancer.device_blocks(5, 2) == [(0, 2), (2, 5)]


def test_only_overloaded_experts_with_large_gradients_are_shrunk() -> None:
    load = np.array([10, 10, 10, 30, 30])
    factors = balancer.compensation(load, np.array([1.0, 1.0, 9.0, 8.0, 1.5]))
    assert factors.tolist() == [1, 1, 1, 2 * 1.5 / 8, 1]
    assert balancer.compensation(load, np.zeros(5)).tolist() == [1] * 5
    assert balancer.compensation(np.zeros(5, dtype=int), np.ones(5)).tolist() == [1] * 5


@settings(max_examples=50, deadline=None)
@given(
    loads=st.lists(st.integers(0, 10**6), min_size=2, max_size=9),
    mode=st.sampled_from(["elb", "formula", "sign", "quantile"]),
)
def test_no_load_makes_a_bias_that_is_not_finite(loads: list[int], mode: str) -> None:
    rng = np.random.default_rng(len(loads))
    state, elb = first_state(len(loads)), ElbConfig(mode=mode, monitor_freq=1)
    histogram = (
        rng.integers(0, 3, (len(loads), NUM_BINS)) * (rng.random(len(loads)) > 0.3)[:, None]
    )
    for _ in range(3):
        state = update(state, counts_of(loads, histogram), elb=elb, top_k=1)
        for name in ("bias", "histogram", "origin", "width", "slope"):
            assert np.isfinite(getattr(state, name)).all(), name
        assert (state.width > 0).all()
