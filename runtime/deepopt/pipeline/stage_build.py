"""Makes the stages that a worker holds, and the buckets in which their gradients are summed."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.reduction import Bucket
from deepopt.pipeline.reporters import TrainableParameters
from deepopt.pipeline.stage import Layer, Loss, Stage
from deepopt.pipeline.weight_ways import Verdict
from deepopt.planner.plan import Plan


def make_stage(
    index: int,
    *,
    plan: Plan,
    rank: int,
    layers: Mapping[int, Layer],
    trainable: TrainableParameters,
    seed: int,
    device: torch.device,
    loss: Loss | None = None,
    recompute: Collection[int] = (),
    defer_weights: bool = False,
    known_ways: Mapping[str, Verdict] | None = None,
    kind: type[Stage] = Stage,
) -> Stage:
    """A stage of a worker.

    Args:
        index: global stage index.
        plan: who holds what.
        rank: of the worker in the world.
        layers: of the stages that it holds, by index in the chain.
        trainable: tells which weights are tied.
        seed: of random numbers in the layers.
        device: where the layers are.
        loss: of the model; the last stage takes it.
        recompute: layers that are run again for their backward.
        defer_weights: whether its weight gradients may wait for W.
        known_ways: as `Stage` takes them.
        kind: class of the stage.
    """
    held = [layers[i] for i in plan.stage_layers(index)]
    bounds = [b for d in range(plan.data_size) for b in plan.replica_groups(d)]
    owners = plan.group_owners(index)
    groups = [g for g, r in enumerate(owners) if r == rank]
    parameters = {name: p for layer in held for name, p in layer.trainable.items()}
    return kind(
        index,
        held,
        gradients=StageGradients(
            parameters,
            apart=[name for name in parameters if name in trainable.tied_names],
            groups=groups,
            device=device,
            exchanged=len(set(owners)) > 1,
        ),
        group_of={m: g for g in groups for m in range(*bounds[g])},
        seed=seed,
        device=device,
        num_microbatches=plan.num_microbatches,
        loss=loss if index == plan.num_stages - 1 else None,
        recompute=recompute,
        defer_weights=defer_weights,
        known_ways=known_ways,
    )


def stage_bucket(stage: Stage, *, plan: Plan) -> Bucket:
    """The gradients of a stage that have a single use."""
    gradients = stage.gradients
    rows = [row[gradients.own] for row in gradients.rows]
    return Bucket(
        index=stage.index,
        owners=(plan.group_owners(stage.index),),
        numel=rows[0].numel(),
        terms={(0, g): row for g, row in zip(gradients.groups, rows, strict=True)},
        results=(rows[0],),
    )


def tied_buckets(
    stages: Mapping[int, Stage], *, plan: Plan, trainable: TrainableParameters
) -> list[Bucket]:
    """One bucket for each tied parameter that a worker holds a use of.

    Args:
        stages: that it holds, by index.
        plan: who holds what.
        trainable: tells which weights are tied.
    """
    buckets = []
    for number, uses in enumerate(trainable.tied_uses):
        terms: dict[tuple[int, int], torch.Tensor] = {}
        results: list[torch.Tensor] = []
        numel = 0
        for use, (stage_index, name) in enumerate(uses):
            stage = stages.get(stage_index)
            if stage is None:
                continue
            gradients = stage.gradients
            rows = [row[gradients.region(name)] for row in gradients.rows]
            terms |= {(use, g): r for g, r in zip(gradients.groups, rows, strict=True)}
            results.append(rows[0])
            numel = rows[0].numel()
        if terms:
            buckets.append(
                Bucket(
                    index=plan.num_stages + number,
                    owners=tuple(plan.group_owners(stage) for stage, _ in uses),
                    numel=numel,
                    terms=terms,
                    results=tuple(results),
                )
            )
    return buckets


def count_buckets(
    stages: Mapping[int, Stage], *, plan: Plan, rank: int, trainable: TrainableParameters
) -> list[Bucket]:
    """One bucket for each stage with routers that a worker shares with others.

    Args:
        stages: that it holds, by index.
        plan: who holds what.
        rank: of the worker in the world.
        trainable: tells how many buckets come before.
    """
    first = plan.num_stages + len(trainable.tied_uses)
    return [
        stage.experts.bucket(first + index, holders=plan.holders(index), rank=rank)
        for index, stage in stages.items()
        if stage.experts and len(plan.holders(index)) > 1
    ]
