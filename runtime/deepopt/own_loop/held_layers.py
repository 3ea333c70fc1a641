"""Which layers a rank of somebody's own loop holds, and who holds the others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from deepopt.convert import DeepModel
from deepopt.convert.build import parameter_skeletons
from deepopt.convert.chain import Chain
from deepopt.errors import InputError
from deepopt.own_loop.separate_uses import SeparateUses
from deepopt.pipeline.reporters import TrainableParameters
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.transport import Transport
from deepopt.planner.partition import partition_folded
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton
from deepopt.schedule.ir import PlacementKind

_STREAMS = 2  # of micro-batches in each replica: one from each end


def make_plan(
    model: DeepModel,
    *,
    stages: int | Sequence[int],
    microbatches: int,
    world_size: int,
    groups: int | None = None,
) -> Plan:
    """Who holds what: one stage and its mirror image a rank, again in each replica; alone, all stages as
    one.

    Args:
        model: converted.
        stages: number of stages, or the index of the first layer of each.
        microbatches: of a pass, in each replica.
        world_size: processes: a replica for each `stages` of them.
        groups: gradient groups of all replicas; None: one for each stream.

    Raises:
        InputError: a number does not fit.
    """
    if microbatches < _STREAMS:
        raise InputError(
            f"microbatches is {microbatches}: two streams need one each at least",
            remedy=f"set microbatches to {_STREAMS} or more; 2 x stages fills the pipeline",
        )
    boundaries = _boundaries(model, stages)
    num_stages = len(boundaries)
    if world_size != 1 and world_size % num_stages:
        raise InputError(
            f"{num_stages} stages need a multiple of {num_stages} processes, or 1 that holds them all; "
            f"there are {world_size}",
            remedy=f"torchrun --nproc-per-node {num_stages}, or stages={world_size}",
        )
    replicas = 1 if world_size == 1 else world_size // num_stages
    most = replicas * microbatches
    if groups is None:
        groups = _STREAMS * replicas
    elif groups % (_STREAMS * replicas) or not 0 < groups <= most:
        raise InputError(
            f"groups is {groups}: {replicas} replica(s) of two streams with {most} micro-batches in all "
            f"take a multiple of {_STREAMS * replicas}, up to {most}",
            remedy=f"leave groups out for {_STREAMS * replicas}",
        )
    plan = Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in model.layers),
        boundaries=boundaries,
        placement=PlacementKind.MIRROR,
        schedule="bi_stream",
        pipeline_size=num_stages,
        data_size=replicas,
        num_microbatches=most,
        num_groups=groups,
    )
    return replace(plan, boundaries=(0,), pipeline_size=1) if world_size == 1 else plan


@dataclass(frozen=True, slots=True)
class HeldParameter:
    """A parameter of the model that layers of this rank use.

    Args:
        value: the model's own.
        use: how the gradients of a stage call it: of several uses, the first one here.
    """

    value: torch.nn.Parameter
    use: str


def held_layers(chain: Chain, *, indices: Iterable[int]) -> dict[int, Layer]:
    """Layers of a model as a stage takes them: the model's own modules, not copies.

    Further uses of tied weights take gradients of their own.

    Args:
        chain: the model.
        indices: which.
    """
    unused = set(chain.unused)
    found = {}
    for index in indices:
        layer = chain.layers[index]
        module = layer.module
        tied = {
            local: parameter
            for local, parameter in module.named_parameters(remove_duplicate=False)
            if chain.is_tied_elsewhere(layer.names[local], index) and parameter.requires_grad
        }
        parameters = layer.parameters()
        if tied:
            module = SeparateUses(module, tied)
            prefix = "module."
            parameters = {
                layer.names[name.removeprefix(prefix)]: parameter
                for name, parameter in module.named_parameters()
            }
        found[index] = Layer(
            index=index,
            name=layer.name,
            module=module,
            parameters={n: p for n, p in parameters.items() if n not in unused},
            buffers=layer.buffers(),
        )
    return found


def held_parameters(chain: Chain, *, indices: Iterable[int]) -> dict[str, HeldParameter]:
    """The parameters of some layers by their first names in the model, each once.

    Args:
        chain: the model.
        indices: of the layers.
    """
    found: dict[str, HeldParameter] = {}
    for index in indices:
        for name, parameter in chain.layers[index].parameters().items():
            found.setdefault(chain.ties.get(name, name), HeldParameter(parameter, name))
    return found


def held_state(chain: Chain, *, indices: Iterable[int]) -> dict[str, torch.Tensor]:
    """Parameters and buffers of some layers by all their names in the model's `state_dict`.

    Args:
        chain: the model.
        indices: of the layers.
    """
    found: dict[str, torch.Tensor] = {}
    for index in indices:
        layer = chain.layers[index]
        found |= {
            name: parameter.detach()
            for name, parameter in layer.parameters(remove_duplicate=False).items()
            if name not in layer.repeated
        }
        found |= {name: buffer.detach() for name, buffer in layer.buffers().items()}
    return found


def trainable_parameters(chain: Chain, plan: Plan) -> TrainableParameters:
    """Which parameters there are, and which are tied: the same on all ranks.

    Args:
        chain: the model.
        plan: who holds what.
    """
    unused = set(chain.unused)
    layers = tuple(
        LayerSkeleton(
            name=layer.name,
            kind=layer.kind,
            parameters=tuple(
                p for p in parameter_skeletons(chain, layer) if p.name not in unused
            ),
        )
        for layer in chain.layers
    )
    return TrainableParameters(plan, ModelSkeleton(factory="", kwargs={}, layers=layers))


def check_copies(
    plan: Plan,
    *,
    rank: int,
    layers: Mapping[int, Layer],
    trainable: TrainableParameters,
    wire: Transport,
) -> None:
    """See that the copies of each stage, and the uses of tied weights, begin with the same values.

    Args:
        plan: who holds what.
        rank: this one.
        layers: that it holds, by index.
        trainable: tells which weights are tied.
        wire: to the others; all ranks call this together.

    Raises:
        InputError: they do not; on all ranks.
    """
    held = plan.held_stages(rank)
    of_stage = {
        stage: [
            tensor
            for index in plan.stage_layers(stage)
            for tensor in (*layers[index].parameters.values(), *layers[index].buffers.values())
        ]
        for stage in held
    }
    named = {name: p for layer in layers.values() for name, p in layer.parameters.items()}
    what: list[tuple[str, tuple[int, ...], float]] = []
    for stage in range(plan.num_stages):
        mark = _mark(of_stage[stage]) if stage in held else 0.0
        what.append((f"stage {stage} begins", plan.holders(stage), mark))
    for uses in trainable.tied_uses:
        holders = tuple(dict.fromkeys(r for stage, _ in uses for r in plan.holders(stage)))
        mine = [named[name] for stage, name in uses if stage in held]
        mark = _mark(mine[:1]) if mine else 0.0
        names = " and ".join(name for _, name in uses)
        what.append((f"the tied {names} begin", holders, mark))
    rows = wire.start_all_gather([mark for *_, mark in what]).wait()
    for position, (words, holders, _) in enumerate(what):
        first = rows[holders[0]][position]
        other = next((h for h in holders if rows[h][position] != first), None)
        if other is not None:
            raise InputError(
                f"{words} with different weights on ranks {holders[0]} and {other}",
                remedy="call torch.manual_seed with one seed on all ranks before the model is made, "
                "or load one state_dict everywhere",
            )


def _mark(tensors: Iterable[torch.Tensor]) -> float:
    """A number that other values would hardly have."""
    digest = hashlib.sha256()
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return float(int.from_bytes(digest.digest()[:6]))  # exact in float64


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
