"""From the counts of a step to the routing biases of the next: pure decisions, no tensors.

All counts are integers and all sums here run in one fixed order in double precision, so whoever
holds a layer finds the same bias, bit for bit. Reading and summing the counts is not done here.

Shapes: E experts, B bins, D devices.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from deepopt.config import ElbConfig

Array = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]

NUM_BINS = 64
NEAR = 32.0  # of the bins' warp, see deepopt_kernels.elb_select
FIRST_WIDTH = 0.05  # of a bin of log scores before anything is known; right within a few steps
SPREAD_BINS = 16.0  # bins that a change of the load by a factor of 4 shall span
WANDERING = 8.0  # bins that a quantile may lie from the origin before bins move
SHIFT = 0.4  # error of a load, of its target, that twice running is no noise
UNSETTLED = math.log(1.5)  # drift above which the last step's biases are too old in the warm-up
LOW, HIGH = 0.2, 3.0  # clamp of the load formula's factor
OVERLOADED = 1.25  # loads above so many times the mean take part in gradient compensation
NATURAL_DECAY = 0.95  # of the natural shares behind tempered targets
NATURAL_FLOOR = 0.1  # smallest natural share, of the mean one: a dead expert keeps a target


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BalancerState:
    """What the balancer of one layer remembers between steps.

    Args:
        step: updates done.
        bias: [E] added to the scores for selection only.
        histogram: [E, B] decayed counts of the bias each token would have needed.
        origin: [E] centre of each expert's bins.
        width: [E] width of its bins at the centre.
        slope: [E] change of the bias that multiplies the load by e.
        window: [E] tokens since the window began; a window has `monitor_freq` steps.
        load: [E] tokens of the last step.
        natural: [E] decayed tokens that top-k without bias would have sent.
        drift: [E] how much too high the last step's bias was, in logs of the load: what feedback
            inside the step had to make good.
    """

    step: int
    bias: Array
    histogram: Array
    origin: Array
    width: Array
    slope: Array
    window: Array
    load: Array
    natural: Array
    drift: Array


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StepCounts:
    """What all micro-batches of a step counted together.

    Args:
        histogram: [E, B]; [E, 0] where the mode needs none.
        load: [E] choices of each expert.
        natural: [E] choices of top-k without bias, among sampled tokens.
    """

    histogram: Counts
    load: Counts
    natural: Counts


def first_state(num_experts: int, *, unit: float = 1.0) -> BalancerState:
    """Nothing learned yet: no bias.

    Args:
        num_experts: E.
        unit: size of the scores to choose by, where they are no log scores.
    """
    zeros = np.zeros(num_experts)
    return BalancerState(
        step=0,
        bias=zeros,
        histogram=np.zeros((num_experts, NUM_BINS)),
        origin=zeros,
        width=np.full(num_experts, FIRST_WIDTH * unit),
        slope=np.full(num_experts, unit),
        window=zeros,
        load=zeros,
        natural=zeros,
        drift=zeros,
    )


def is_unsettled(drift: Array, *, step: int, elb: ElbConfig) -> bool:
    """Whether the warm-up goes on: scores move so much from step to step that no bias of the step before
    fits, as they do while the learning rate of a new model warms up.

    Args:
        drift: [E] of the last step.
        step: updates done.
        elb: says how long a warm-up is at most: `monitor_freq` steps, or none.
    """
    in_time = elb.warmup and elb.mode == "elb" and step < elb.monitor_freq
    return in_time and bool((np.abs(drift) > UNSETTLED).any())


def needs_histogram(elb: ElbConfig) -> bool:
    """Whether a mode learns from the distribution of scores, not from loads alone."""
    return elb.mode in ("elb", "quantile", "formula")


def update(
    state: BalancerState, counts: StepCounts, *, elb: ElbConfig, top_k: int
) -> BalancerState:
    """The state after one step.

    Args:
        state: before.
        counts: of the step. A step without tokens changes the step number alone.
        elb: mode and its figures.
        top_k: choices a token.
    """
    num_experts = len(state.bias)
    step = state.step + 1
    begins = state.step % elb.monitor_freq == 0
    load, before = counts.load.astype(np.float64), state.load
    if not counts.load.any():
        return replace(
            state, step=step, window=np.zeros(num_experts) if begins else state.window
        )
    state = replace(
        state,
        step=step,
        window=load if begins else state.window + load,
        load=load,
        natural=NATURAL_DECAY * state.natural + counts.natural,
    )
    if top_k >= num_experts or elb.mode in ("none", "aux"):
        return state
    if elb.mode == "sign":
        return _sign(state, rate=elb.sign_rate)
    if elb.mode == "formula":
        tracked = _track(state, counts, before=before, elb=elb, top_k=top_k, follow=False)
        return _formula(tracked, alpha=elb.alpha) if step % elb.monitor_freq == 0 else tracked
    return _track(state, counts, before=before, elb=elb, top_k=top_k)


def target_shares(state: BalancerState, *, temper: float) -> Array:
    """The share of the choices that each expert shall get; sums to 1.

    Args:
        state: knows the natural loads.
        temper: power of the natural share: 0 is uniform.
    """
    num_experts = len(state.bias)
    if temper == 0 or not state.natural.any():
        return np.full(num_experts, 1.0 / num_experts)
    floor = NATURAL_FLOOR * _sum(state.natural) / num_experts
    shares = np.maximum(state.natural, floor) ** temper
    return shares / _sum(shares)


def loop_gain(state: BalancerState, *, alpha: float) -> float:
    """How much of a load error one update of the seed's formula takes away; above 1 it overshoots,
    from 2 on it diverges.

    Args:
        state: knows how loads follow the bias (`slope`).
        alpha: of the formula.
    """
    return alpha * _sum(1.0 / np.maximum(state.slope, 1e-12)) / len(state.slope)


def max_violation(load: Array | Counts, shares: Array | None = None) -> float:
    """MaxVio: how far the busiest expert is above its target, 0 when none is. 0 without load.

    Args:
        load: [E] tokens.
        shares: [E] target shares; None: uniform.

    Source: arXiv:2408.15664, section 4.1.
    """
    total = float(load.sum())
    if total == 0:
        return 0.0
    expected = total / len(load) if shares is None else total * shares
    return float((load / expected).max() - 1.0)


def straggler_factor(load: Array | Counts, *, devices: int) -> float:
    """Load of the busiest device over the mean; experts lie on devices in equal blocks.

    Args:
        load: [E] tokens.
        devices: D; experts need not divide evenly.
    """
    total = float(load.sum())
    if total == 0 or devices <= 1:
        return 1.0
    return (
        max(float(load[a:b].sum()) for a, b in device_blocks(len(load), devices))
        * devices
        / total
    )


def device_blocks(num_experts: int, devices: int) -> list[tuple[int, int]]:
    """(first, end) expert of each device; blocks differ by at most one expert."""
    devices = min(devices, num_experts)
    edges = [d * num_experts // devices for d in range(devices + 1)]
    return list(itertools.pairwise(edges))


def compensation(load: Counts, norms: Array) -> Array:
    """Factors in (0, 1] for the gradients of each expert.

    Only experts with more than 1.25 times the mean load are touched: their gradient's norm is
    brought to twice the median of all experts'.

    Args:
        load: [E] tokens of the step.
        norms: [E] L2 norm of each expert's gradient.
    """
    factors = np.ones(len(load))
    if not load.any() or len(load) < 2:
        return factors
    most = 2.0 * float(np.sort(norms)[(len(norms) - 1) // 2])
    overloaded = load > OVERLOADED * float(load.sum()) / len(load)
    clipped = overloaded & (norms > most) & (most > 0)
    factors[clipped] = most / norms[clipped]
    return factors


# The modes. ------------------------------------------------------------------------------------


def _sign(state: BalancerState, *, rate: float) -> BalancerState:
    """Source: arXiv:2408.15664, algorithm 1."""
    mean = _sum(state.load) / len(state.load)
    return replace(state, bias=state.bias + rate * np.sign(mean - state.load))


def _formula(state: BalancerState, *, alpha: float) -> BalancerState:
    """p' = p (1 + alpha (mean - load) / mean) as a log bias that accumulates, factor clamped."""
    mean = _sum(state.window) / len(state.window)
    factor = np.clip(1.0 + alpha * (mean - state.window) / mean, LOW, HIGH)
    bias = state.bias + np.log(factor)
    mean = _sum(bias) / len(bias)
    return replace(state, bias=bias - mean, origin=state.origin - mean)


def _track(
    state: BalancerState,
    counts: StepCounts,
    *,
    before: Array,
    elb: ElbConfig,
    top_k: int,
    follow: bool = True,
) -> BalancerState:
    """Set each bias to the quantile that sends the expert its target share.

    The moving average is debiased by weighing the first steps fully: its decay is at most 1 - 1/t.
    An expert that was off its target twice running in one direction forgets what it knew: its tokens
    have changed. `before` are the loads of the step before. With `follow` off, distributions and slopes
    are tracked, and the bias is left alone.

    Source: quantile balancing (J. Su, kexue.fm/archives/11619), here with an average.
    """
    num_experts = len(state.bias)
    decay = 0.0 if elb.mode == "quantile" else min(elb.decay, 1.0 - 1.0 / state.step)
    shares = target_shares(state, temper=elb.target_share)
    kept = np.where(_has_shifted(before, state.load, shares), 0.0, decay)
    histogram = kept[:, None] * state.histogram + counts.histogram
    part = np.minimum(top_k * shares, 1.0 - 0.5 / num_experts)  # of all tokens
    high = np.minimum(2 * part, (1 + part) / 2)
    low = part / 2
    cumulative = np.cumsum(histogram, axis=1)
    z, z_high, z_low = (_quantile(cumulative, q) for q in (part, high, low))
    spread = z_high - z_low
    bias = state.origin + z * state.width
    slope = np.maximum(spread, 0.1) * state.width / np.log(high / low)
    known = cumulative[:, -1] > 0
    bias, slope = np.where(known, bias, state.bias), np.where(known, slope, state.slope)
    alone = np.cumsum(counts.histogram, axis=1).astype(np.float64)
    wanted = state.origin + _quantile(alone, part) * state.width
    drift = np.where(alone[:, -1] > 0, (state.bias - wanted) / slope, 0.0)
    drift -= _sum(drift) / num_experts  # one bias more for all changes no choice
    moved = replace(state, histogram=histogram, slope=slope, drift=drift)
    if follow:
        # Cutoffs fall with the mean of the biases, and so does what tokens will need.
        mean = _sum(bias) / num_experts
        moved = replace(moved, bias=bias - mean, origin=state.origin - mean)
    # Bins must be fine on the denser side: where scores saturate, needs have a cliff there.
    narrow = 2 * np.minimum(z_high - z, z - z_low)
    far = (np.abs(z) > WANDERING) | (narrow > 2 * SPREAD_BINS) | (narrow < SPREAD_BINS / 2)
    return _move_bins(moved, cumulative, z=z, spread=narrow, which=far & known)


def _has_shifted(before: Array, load: Array, shares: Array) -> npt.NDArray[np.bool_]:
    """[E] whether an expert's load was far off its target in two steps, in the same direction."""
    signs = []
    for tokens in (before, load):
        target = _sum(tokens) * shares
        error = tokens - target
        least = np.maximum(
            SHIFT * target, 3.0 * np.sqrt(target)
        )  # 3 sigma of independent choices
        signs.append(np.where(np.abs(error) > least, np.sign(error), 0.0))
    shifted: npt.NDArray[np.bool_] = (signs[0] == signs[1]) & (signs[0] != 0)
    return shifted


def _move_bins(
    state: BalancerState,
    cumulative: Array,
    *,
    z: Array,
    spread: Array,
    which: npt.NDArray[np.bool_],
) -> BalancerState:
    """Put the bins of some experts where their quantile lies, at a width that fits; what was counted
    moves along, spread evenly inside each old bin."""
    if not which.any():
        return state
    # Within a factor of 8 a step: the spread of few counts is a guess.
    scale = np.clip(np.maximum(spread, 1e-3) / SPREAD_BINS, 1 / 8, 8)
    # In an outermost bin, which has no end, nothing more is known than that bins are too narrow.
    scale = np.where(np.abs(z) >= _unwarp(np.array(1 - 2 / NUM_BINS)), 8.0, scale)
    origin = np.where(which, state.origin + z * state.width, state.origin)
    width = np.where(which, state.width * scale, state.width)
    histogram = state.histogram.copy()
    inner = _unwarp(np.arange(1, NUM_BINS) / NUM_BINS * 2 - 1)
    for expert in np.flatnonzero(which):
        at = z[expert] + inner * scale[expert]  # new edges in old units
        position = (_warp(at) + 1) / 2 * NUM_BINS
        edges = np.concatenate(([0.0], cumulative[expert]))
        moved = np.interp(position, np.arange(NUM_BINS + 1), edges)
        histogram[expert] = np.diff(np.concatenate(([0.0], moved, edges[-1:])))
    return replace(state, histogram=histogram, origin=origin, width=width)


def _quantile(cumulative: Array, part: Array) -> Array:
    """[E] where so much of each expert's counts lies below, in widths from the origin."""
    num_experts = len(cumulative)
    rows = np.arange(num_experts)
    wanted = part * cumulative[:, -1]
    bin_E = np.minimum((cumulative < wanted[:, None]).sum(axis=1), NUM_BINS - 1)
    above = cumulative[rows, bin_E]
    below = np.where(bin_E > 0, cumulative[rows, bin_E - 1], 0.0)
    inside = (wanted - below) / np.maximum(above - below, 1e-300)
    y = (bin_E + np.clip(inside, 0.0, 1.0)) / NUM_BINS * 2 - 1
    outermost = 1 - 1 / NUM_BINS  # the last bins reach to infinity
    return _unwarp(np.clip(y, -outermost, outermost))


def _warp(z: Array) -> Array:
    y: Array = z / (NEAR + np.abs(z))
    return y


def _unwarp(y: Array) -> Array:
    z: Array = NEAR * y / (1 - np.abs(y))
    return z


def _sum(values: Array) -> float:
    """Exactly rounded, so that no order of addition shows."""
    return math.fsum(values.tolist())
