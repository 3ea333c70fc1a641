"""What layers cost as a run has measured it: the times of stages, shared out over their layers. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import replace

from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import Op, parse_action

MEASURED = "measured"


def stage_times(
    op_times_s: Iterable[Mapping[str, float]],
) -> dict[tuple[int, Op], float]:
    """Mean seconds of each operation of each stage, over the workers that ran it.

    Args:
        op_times_s: of each worker, seconds by `STAGE OP`, for example `2F`.
    """
    found: dict[tuple[int, Op], list[float]] = defaultdict(list)
    for times in op_times_s:
        for name, seconds in times.items():
            action = parse_action(f"{name}0")
            found[action.stage, action.op].append(seconds)
    return {key: statistics.fmean(values) for key, values in found.items()}


def measured_costs(
    op_times_s: Iterable[Mapping[str, float]],
    *,
    plan: Plan,
    prior: LayerCosts,
    update_s: float,
) -> LayerCosts | None:
    """Costs of layers that add up to the times of the stages that a run has measured.

    Inside a stage, and between I and W where they ran as one, times are shared out as in `prior`. The
    speed of a device is part of its stages' times, so ranks have no factors of their own. Links,
    sizes and memory stay those of `prior`.

    Args:
        op_times_s: of each worker, seconds by `STAGE OP`.
        plan: what ran.
        prior: costs of the same layers.
        update_s: optimizer update of one worker.

    Returns:
        None when a stage was not measured.
    """
    times = stage_times(op_times_s)
    parts: dict[str, list[float]] = {"forward_s": [], "input_s": [], "weight_s": []}
    prepare: list[float] = []
    for stage in range(plan.num_stages):
        layers = plan.stage_layers(stage)
        whole = times.get((stage, Op.B))
        apart = [times.get((stage, op)) for op in (Op.I, Op.W)]
        if (stage, Op.F) not in times or (whole is None and None in apart):
            return None
        parts["forward_s"] += _shared(times[stage, Op.F], [prior.forward_s[i] for i in layers])
        inputs = [prior.input_s[i] for i in layers]
        weights = [prior.weight_s[i] for i in layers]
        if None not in apart:
            seconds = [apart[0] or 0.0, apart[1] or 0.0]
        else:
            seconds = _shared(whole or 0.0, [sum(inputs), sum(weights)])
        parts["input_s"] += _shared(seconds[0], inputs)
        parts["weight_s"] += _shared(seconds[1], weights)
        repeated = [prior.prepare_s[i] for i in layers] if prior.recomputes else []
        if repeated:
            # Where no R ran, it is the forward again.
            again = times.get((stage, Op.R), times[stage, Op.F]) if any(repeated) else 0.0
            prepare += _shared(again, repeated)
    held = sum(len(plan.stage_layers(s)) for s in plan.held_stages(0))
    return replace(
        prior,
        forward_s=tuple(parts["forward_s"]),
        input_s=tuple(parts["input_s"]),
        weight_s=tuple(parts["weight_s"]),
        prepare_s=tuple(prepare),
        update_s=(update_s / held,) * prior.num_layers,
        rank_factor=(),
        source=MEASURED,
    )


def _shared(total: float, weights: list[float]) -> list[float]:
    """A total in parts that are in proportion to weights; equal parts where all are zero."""
    whole = sum(weights)
    if whole <= 0:
        return [total / len(weights)] * len(weights)
    return [total * weight / whole for weight in weights]
