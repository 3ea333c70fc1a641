"""What a step was said to take before it ran, and by which measured parts it took something else. Pure.

A prediction is made with the plan and kept. When the run has ended, its predicted costs are exchanged for
measured ones part by part, always through the same simulation; what each exchange moves the step by
is the share of that part, and what is left over is named as what was not measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.measured import stage_times
from deepopt.planner.plan import Plan
from deepopt.planner.rank_memory import rank_bytes
from deepopt.schedule.ir import Op, Schedule
from deepopt.schedule.period import num_messages, period
from deepopt.schedule.simulate import CostTable, simulate

_SECONDS = frozenset(
    {"measured", "emulated", "analytic"}
)  # sources of costs whose times are seconds
OTHERS = "other processes on the cores that the workers share, deepopt's head and Ray too"
MORE_OTHERS = "other processes on the cores that the workers share, beyond those predicted"
DISPATCH = "CPU time between actions and steps: order of work, reports, copies for checkpoints"
SUMS = "gradients, tied weights and routers' counts between copies, after the last action"
TURN = "from the update to the next step: reports, copies of buffers"
OVERRAN = "operations whose real work overran their emulated time"
_THREAD_PARTS = (
    "compute_cpu_s",
    "send_cpu_s",
    "receive_cpu_s",
    "reduce_cpu_s",
    "agree_cpu_s",
    "update_cpu_s",
)
REST = "waiting for links and cores, and what no part measures"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A step that has not run yet.

    Args:
        step_s: from the end of one step to the end of the next.
        bubble: idle share of it.
        stage_s: F, I, W and R of each stage.
        memory_bytes: peak of each pipeline rank.
        costs: that it was made from.
        cores: that all workers share; None where each has a device of its own.
        overlap: whether steps overlap.
        warm_up_s: by how much a step is longer in which all routers warm up.
    """

    step_s: float
    bubble: float
    stage_s: tuple[tuple[float, float, float, float], ...]
    memory_bytes: tuple[float, ...]
    costs: LayerCosts
    cores: int | None
    overlap: bool
    warm_up_s: float = 0.0

    def in_warm_up(self, share: float) -> float:
        """Seconds of a step in which a share of the routers warms up.

        Args:
            share: 0 to 1.
        """
        return self.step_s + share * self.warm_up_s

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {**asdict(self), "costs": self.costs.to_json()}

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> Prediction:
        """From what `to_json` gave."""
        return cls(
            step_s=fields["step_s"],
            bubble=fields["bubble"],
            stage_s=tuple(tuple(own) for own in fields["stage_s"]),
            memory_bytes=tuple(fields["memory_bytes"]),
            costs=LayerCosts.from_json(fields["costs"]),
            cores=fields["cores"],
            overlap=fields["overlap"],
            warm_up_s=fields.get("warm_up_s", 0.0),
        )


def predict(
    costs: LayerCosts,
    *,
    plan: Plan,
    schedules: Sequence[Schedule],
    cores: int | None,
    overlap: bool,
) -> Prediction | None:
    """What a step will take.

    Args:
        costs: of the layers.
        plan: who holds them.
        schedules: the order of each replica; the slowest counts.
        cores: that all workers share; None where each has a device of its own.
        overlap: whether steps overlap.

    Returns:
        None where the costs are no seconds, but only in proportion.
    """
    if costs.source not in _SECONDS:
        return None
    table = plan.stage_costs(costs)
    per_replica = cores_of_replica(cores, plan)

    def slowest_of(own_costs: LayerCosts) -> tuple[float, float]:
        own_table = plan.stage_costs(own_costs)
        return max(
            (step_of(own, own_table, cores=per_replica, overlap=overlap) for own in schedules),
            key=lambda found: found[0],
        )

    slowest = slowest_of(costs)
    prepare = table.prepare_s or (0.0,) * plan.num_stages
    return Prediction(
        step_s=slowest[0],
        bubble=slowest[1],
        stage_s=tuple(
            zip(table.forward_s, table.input_s, table.weight_s, prepare, strict=True)
        ),
        memory_bytes=tuple(
            max(sizes)
            for sizes in zip(*(rank_bytes(costs, plan, own) for own in schedules), strict=True)
        ),
        costs=costs,
        cores=cores,
        overlap=overlap,
        warm_up_s=max(0.0, slowest_of(costs.warming_up(1.0))[0] - slowest[0]),
    )


def cores_of_replica(cores: int | None, plan: Plan) -> int | None:
    """Cores for each replica of the pipeline, which all work at the same time.

    Args:
        cores: that all workers share.
        plan: says how many replicas there are.
    """
    return None if cores is None else max(1, cores // plan.data_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRun:
    """What the workers of a run measured.

    Args:
        step_s: median, without the first steps.
        op_times_s: of each worker, seconds by `STAGE OP`.
        parts_s: of each worker, seconds of a step by part (`worker.step_parts`).
        late_s: by how much the operations of the latest emulated device overran in a step.
        warm_up: median share of the routers that warmed up in these steps; they are compared with what is
            predicted for as many.
        mean_step_s: of the same steps, since what other processes used is a mean; None: as `step_s`.
        threads: CPU threads of a worker.
    """

    step_s: float
    op_times_s: Sequence[Mapping[str, float]]
    parts_s: Sequence[Mapping[str, float]]
    late_s: float = 0.0
    warm_up: float = 0.0
    mean_step_s: float | None = None
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """A part that moved the step.

    Args:
        what: in words.
        share: of the predicted step; positive where it made the step longer.
    """

    what: str
    share: float


def causes(
    prediction: Prediction, run: MeasuredRun, *, plan: Plan, schedule: Schedule
) -> tuple[Cause, ...]:
    """By which parts a step took something else than predicted; the largest first.

    Args:
        prediction: of the step.
        run: what was measured.
        plan: what ran.
        schedule: the order of a replica.
    """
    if not run.parts_s or prediction.step_s <= 0:
        return ()
    prediction = replace(
        prediction,
        step_s=prediction.in_warm_up(run.warm_up),
        costs=prediction.costs.warming_up(run.warm_up),
    )
    cores = cores_of_replica(prediction.cores, plan)
    found = []
    before = prediction.step_s
    for what, table in _exchanged(prediction, run, plan=plan, schedule=schedule):
        now, _ = step_of(schedule, table, cores=cores, overlap=prediction.overlap)
        found.append(Cause(what=what, share=(now - before) / prediction.step_s))
        before = now
    if run.late_s:
        found.append(Cause(what=OVERRAN, share=run.late_s / prediction.step_s))
        before += run.late_s
    found.append(Cause(what=REST, share=(run.step_s - before) / prediction.step_s))
    return tuple(sorted(found, key=lambda cause: -abs(cause.share)))


def _exchanged(
    prediction: Prediction, run: MeasuredRun, *, plan: Plan, schedule: Schedule
) -> Iterator[tuple[str, CostTable]]:
    """Cost tables in which ever more parts are the measured ones, and which part came last."""
    table = plan.stage_costs(prediction.costs)
    # Copies of a stage on unlike devices have one time, in that of the device of factor 1.
    factors = table.rank_factor or (1.0,) * plan.pipeline_size
    times = stage_times(
        {name: seconds / factors[rank % plan.pipeline_size] for name, seconds in own.items()}
        for rank, own in enumerate(run.op_times_s)
    )
    table = replace(
        table,
        forward_s=_measured(table.forward_s, times, Op.F),
        input_s=_backward(table, times)[0],
        weight_s=_backward(table, times)[1],
        prepare_s=_measured(table.prepare_s, times, Op.R) if table.prepare_s else (),
    )
    yield "stage times differ from the profile", table
    shared = prediction.cores is not None
    mean_step_s = run.mean_step_s or run.step_s
    ends = [count for count in num_messages(schedule) if count]
    if ends:
        # Threads that take cores whether there are messages or not were predicted with the background.
        idle_s = (
            prediction.costs.background_threads * run.threads * mean_step_s / len(run.parts_s)
        )
        spent = [_message_cpu_s(own, shared=shared, idle_s=idle_s) for own in run.parts_s]
        table = replace(table, message_s=max(0.0, fmean(spent) / fmean(ends)))
        yield "CPU time of sends and receives", table
    # An emulated update lasts as stated, whatever CPU time it takes; where it does not, it overran.
    if not (prediction.costs.source == "emulated" and any(table.update_s)):
        held = fmean(len(plan.held_stages(rank)) for rank in range(plan.pipeline_size))
        # Where cores are shared, sums between copies cost what they compute, not what they wait.
        names = ("agree_cpu_s", "update_cpu_s", *(("reduce_cpu_s",) if shared else ()))
        once_s = fmean(
            sum(parts.get(name, 0.0) for name in names) / factors[rank % plan.pipeline_size]
            for rank, parts in enumerate(run.parts_s)
        )
        table = replace(table, update_s=(once_s / held,) * plan.num_stages)
        yield "norms and optimizer" + (", sums of gradients" if shared else ""), table
    if not shared:
        # The last to come waits least for the others: what is left is the exchange itself.
        table = replace(table, reduce_s=(), late_s=_least(run.parts_s, "reduce_wall_s"))
        yield SUMS, table
    table = replace(table, agree_s=_least(run.parts_s, "agree_wall_s"))
    yield "the exchange at the end of a step", table
    if not shared:
        turn_s = fmean(parts.get("turn_wall_s", 0.0) for parts in run.parts_s)
        yield TURN, replace(table, turn_s=turn_s)
        return
    table = replace(table, turn_s=fmean(map(_dispatch_cpu_s, run.parts_s)))
    yield DISPATCH, table
    others = fmean(parts.get("others_cpu_s", 0.0) for parts in run.parts_s) / mean_step_s
    costs = prediction.costs
    background = max(0.0, others / run.threads) + costs.background_threads
    what = MORE_OTHERS if costs.background_processes else OTHERS
    yield what, replace(table, background=background / plan.data_size)


def _least(parts_s: Sequence[Mapping[str, float]], name: str) -> float:
    return min(parts.get(name, 0.0) for parts in parts_s)


def _message_cpu_s(parts: Mapping[str, float], *, shared: bool, idle_s: float) -> float:
    """CPU time of a worker's messages in a step: of its thread, or with shared cores of all its threads but
    for what these take without messages."""
    own = parts.get("send_cpu_s", 0.0) + parts.get("receive_cpu_s", 0.0)
    if not shared:
        return own
    others = parts.get("process_cpu_s", 0.0) - parts.get("thread_cpu_s", 0.0)
    return own + max(0.0, others - idle_s)


def _dispatch_cpu_s(parts: Mapping[str, float]) -> float:
    """CPU time of a worker's training thread in a step that belongs to no part of it."""
    return max(
        0.0,
        parts.get("thread_cpu_s", 0.0) - sum(parts.get(name, 0.0) for name in _THREAD_PARTS),
    )


def _measured(
    times_s: Sequence[float], found: Mapping[tuple[int, Op], float], op: Op
) -> tuple[float, ...]:
    return tuple(found.get((stage, op), own) for stage, own in enumerate(times_s))


def _backward(
    table: CostTable, found: Mapping[tuple[int, Op], float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """I and W of each stage; where they ran as one, in the predicted proportion."""
    inputs, weights = [], []
    for stage, (own_i, own_w) in enumerate(zip(table.input_s, table.weight_s, strict=True)):
        whole = found.get((stage, Op.B))
        if whole is not None and (stage, Op.I) not in found:
            share = own_i / (own_i + own_w) if own_i + own_w > 0 else 1.0
            inputs.append(whole * share)
            weights.append(whole * (1 - share))
        else:
            inputs.append(found.get((stage, Op.I), own_i))
            weights.append(found.get((stage, Op.W), own_w))
    return tuple(inputs), tuple(weights)


def step_of(
    schedule: Schedule, table: CostTable, *, cores: int | None, overlap: bool
) -> tuple[float, float]:
    """Step time and bubble.

    Args:
        schedule: the order of a replica.
        table: what its actions take.
        cores: that the ranks of the replica share; None where each has a device of its own.
        overlap: whether steps overlap.
    """
    if overlap:
        timeline = simulate(schedule, table, cores=cores)
        busy = sum(timeline.busy_s) / len(timeline.busy_s)
        steady_s = timeline.steady_s
        return steady_s, max(0.0, 1 - busy / steady_s) if steady_s > 0 else 0.0
    found = period(schedule, table, cores=cores)
    return found.step_s, found.bubble
