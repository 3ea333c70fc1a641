"""Which layers a rank of somebody's own loop holds, and who holds the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch

from deepopt.convert import DeepModel
from deepopt.errors import InputError
from deepopt.moe.elb_router import ElbRouter
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.transport import Transport
from deepopt.planner.partition import partition_folded
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind

NUM_GROUPS = 2  # one a direction


def make_plan(
    model: DeepModel, *, stages: int | Sequence[int], microbatches: int, world_size: int
) -> Plan:
    """Who holds what: one stage and its mirror image a rank; alone, all stages as one.

    Args:
        model: converted.
        stages: number of stages, or the index of the first layer of each.
        microbatches: of a pass.
        world_size: processes.

    Raises:
        InputError: a number does not fit.
    """
    if microbatches < NUM_GROUPS:
        raise InputError(
            f"microbatches is {microbatches}: two streams need one each at least",
            remedy=f"set microbatches to {NUM_GROUPS} or more; 2 x stages fills the pipeline",
        )
    boundaries = _boundaries(model, stages)
    if world_size not in (1, len(boundaries)):
        raise InputError(
            f"{len(boundaries)} stages need {len(boundaries)} processes, or 1 that holds them all; "
            f"there are {world_size}",
            remedy=f"torchrun --nproc-per-node {len(boundaries)}, or stages={world_size}",
        )
    plan = Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in model.layers),
        boundaries=boundaries,
        placement=PlacementKind.MIRROR,
        schedule="bi_stream",
        pipeline_size=len(boundaries),
        data_size=1,
        num_microbatches=microbatches,
        num_groups=NUM_GROUPS,
    )
    if world_size == 1:
        fields = {**plan.to_json(), "boundaries": (0,), "pipeline_size": 1}
        plan = Plan.from_json(fields)
    return plan


def held_layers(model: DeepModel, *, indices: Iterable[int]) -> dict[int, Layer]:
    """Layers of a model as a stage takes them: the model's own modules, not copies.

    Args:
        model: converted.
        indices: which.

    Raises:
        InputError: the model has what copies on several ranks could not keep alike.
    """
    chain = model.chain
    for number, layer in enumerate(chain.layers):
        for name in layer.parameters(remove_duplicate=False):
            if chain.is_tied_elsewhere(name, number):
                raise InputError(
                    f"{name} is the same parameter as {chain.ties[name]} in another layer: "
                    "BiStreamPipeline does not sum over the uses of tied weights",
                    remedy="untie them (tie_word_embeddings=False), or train with DeepTrainer",
                )
    routers = [n for n, m in chain.model.named_modules() if isinstance(m, ElbRouter)]
    if routers:
        raise InputError(
            f"{routers[0]} is an ElbRouter: BiStreamPipeline does not sum what its copies count",
            remedy="leave elb_config out, or train with DeepTrainer",
        )
    found = {}
    for index in indices:
        layer = chain.layers[index]
        found[index] = Layer(
            index=index,
            name=layer.name,
            module=layer.module,
            parameters=layer.parameters(),
            buffers=layer.buffers(),
        )
    return found


def check_copies(plan: Plan, *, rank: int, layers: dict[int, Layer], wire: Transport) -> None:
    """See that the copies of each stage begin with the same weights.

    Args:
        plan: who holds what.
        rank: this one.
        layers: that it holds, by index.
        wire: to the others; all ranks call this together.

    Raises:
        InputError: they do not; on all ranks.
    """
    marks = [0.0] * plan.num_stages
    for stage in plan.held_stages(rank):
        digest = hashlib.sha256()
        for index in plan.stage_layers(stage):
            layer = layers[index]
            for tensor in (*layer.parameters.values(), *layer.buffers.values()):
                flat = tensor.detach().cpu().contiguous().flatten()
                digest.update(flat.view(torch.uint8).numpy().data)
        marks[stage] = float(int.from_bytes(digest.digest()[:6]))  # exact in float64
    rows = wire.start_all_gather(marks).wait()
    for stage in range(plan.num_stages):
        holders = plan.holders(stage)
        if len({rows[holder][stage] for holder in holders}) > 1:
            raise InputError(
                f"stage {stage} begins with different weights on ranks {holders[0]} and {holders[1]}",
                remedy="call torch.manual_seed with one seed on all ranks before the model is made, "
                "or load one state_dict everywhere",
            )


def _boundaries(model: DeepModel, stages: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(stages, int):
        return tuple(stages)
    if not 1 <= stages <= len(model.layers):
        raise InputError(
            f"stages is {stages}, the model has {len(model.layers)} layers",
            remedy=f"set stages between 1 and {len(model.layers)}",
        )
    flops = [layer.forward_flops for layer in model.layers]
    costs = [
        float(layer.num_parameters) if None in flops else float(layer.forward_flops or 0)
        for layer in model.layers
    ]
    return partition_folded(costs, stages)
