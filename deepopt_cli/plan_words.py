"""What a launch will do, in words: the plan, its stages, what it was chosen from."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from deepopt.config import JobConfig
from deepopt.launch.fp8_words import fp8_words
from deepopt.launch.preparation import Prepared
from deepopt.planner.microbatch_count import words
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt_cli.output import human_count, human_percent, ranges, table


def plan_lines(prepared: Prepared) -> list[str]:
    """What will be done, in words.

    Args:
        prepared: the job.
    """
    job, skeleton, plan = prepared.job, prepared.skeleton, prepared.plan
    training = job.training
    kwargs = ", ".join(f"{key}={value}" for key, value in job.model.kwargs.items())
    replicas = f" x {plan.data_size} replicas" if plan.data_size > 1 else ""
    fp8 = fp8_words(job, skeleton)
    return [
        f"model       {job.model.factory}({kwargs}), {len(skeleton.layers)} layers, "
        f"{human_count(skeleton.num_parameters)} parameters, {job.precision.dtype}",
        *([f"fp8         {fp8}"] if fp8 else []),
        f"data        {prepared.source}",
        f"training    {training.steps} steps of {training.microbatches} micro-batches x "
        f"{training.microbatch_size} x {job.data.sequence_length} tokens, "
        f"{plan.num_groups} groups, seed {training.seed}",
        *([f"tried       {words(prepared.tried_counts)}"] if prepared.tried_counts else []),
        f"plan        {plan.pipeline_size} ranks{replicas}, placement {plan.placement}, schedule "
        f"{prepared.planned.schedules[0].name}, predicted bubble "
        f"{human_percent(prepared.timeline.bubble)} ({prepared.planned.costs.source} costs)",
        f"split       {_split_words(prepared)}",
        f"cluster     {_cluster_words(job)}",
        "",
        stage_table(plan, skeleton),
    ]


def comparison_table(prepared: Prepared) -> str:
    """What the schedule was chosen from, the best first; empty where the job names it.

    Args:
        prepared: the job.
    """
    comparison = prepared.planned.comparison
    if comparison is None:
        return ""
    best_s = comparison.best.step_s
    rows: list[Sequence[object]] = [
        (
            found.shape,
            found.schedule.name,
            f"{found.step_s / best_s:.3f}",
            human_percent(found.timeline.bubble),
            "" if found.gap is None else human_percent(found.gap),
            f"{max(found.peak_activations):.3g}",
            found.weight_copies,
            "",
        )
        for _, found in comparison.found
    ]
    if comparison.one_f_one_b_s is not None:
        ratio = f"{comparison.one_f_one_b_s / best_s:.3f}"
        rows.append(("line", "1f1b", ratio, "", "", "", 1, "the yardstick"))
    rows += [(c.shape, "", "", "", "", "", "", reason) for c, reason in comparison.left_out]
    header = ("placement", "schedule", "time", "bubble", "gap", "in flight", "copies", "note")
    return table(header, rows)


def stage_table(plan: Plan, skeleton: ModelSkeleton) -> str:
    """Stages, their layers and the ranks that hold them.

    Args:
        plan: who holds which layers.
        skeleton: their parameters.
    """
    edges = [*plan.boundaries, len(plan.layer_names)]
    rows: list[Sequence[object]] = []
    for stage, (start, end) in enumerate(itertools.pairwise(edges)):
        names = plan.layer_names[start:end]
        count = sum(layer.num_parameters for layer in skeleton.layers[start:end])
        rows.append(
            (
                stage,
                end - start,
                names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}",
                human_count(count),
                ranges(plan.holders(stage)),
            )
        )
    return table(("stage", "layers", "from .. to", "parameters", "ranks"), rows)


def _split_words(prepared: Prepared) -> str:
    """How good the cut is, and what else was decided with it."""
    plan, gap = prepared.plan, prepared.planned.gap
    words = [
        f"the busiest rank has at most {human_percent(gap)} more to do than the best split gives it"
        if gap > 1e-6  # less is rounding
        else "no other gives the busiest rank less to do"
    ]
    if prepared.job.pipeline.boundaries is not None:
        words = ["as pipeline.boundaries says"]
    if plan.order:
        words.append(f"ranks in the order {' '.join(map(str, plan.order))}")
    if plan.recompute is not None:
        count = len(plan.recompute)
        words.append(f"{count} of {len(plan.layer_names)} layers run again for their backward")
    return "; ".join(words)


def _cluster_words(job: JobConfig) -> str:
    workers = f"{job.worker.count} workers, device {job.worker.device}"
    if job.cluster.address is not None:
        return f"{workers}, in the Ray cluster at {job.cluster.address}"
    if job.cluster.hostfile is not None:
        return f"{workers}, on the hosts of {job.cluster.hostfile}"
    return f"{workers}, in a private Ray on this machine"
