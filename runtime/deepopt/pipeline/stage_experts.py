"""The routers of a stage: one flat tensor of counts, one update a step.

Forwards count into it; at the end of the step it is summed over the stage's holders like a gradient,
in integers, so that every holder finds the same routing bias. The counts of a step stay until the next
one is summed, so that an update that was taken back can be done again. Does not decide biases
(`deepopt.moe.balancer` does).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from deepopt.moe import balancer
from deepopt.moe.elb_router import ElbRouter
from deepopt.moe.state_buffers import STEP_BUFFER
from deepopt.moe.step_totals import bad_tokens, gate_masses
from deepopt.pipeline.reduction import Bucket
from deepopt.planner.skeleton import ModelSkeleton

logger = logging.getLogger(__name__)

NUM_FIGURES = 10  # of one router in the exchange at the end of a step


class _Layer(Protocol):
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def module(self) -> torch.nn.Module: ...
    @property
    def trainable(self) -> dict[str, torch.nn.Parameter]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterFigures:
    """How one router's step went.

    Args:
        max_vio: load of the busiest expert over its target, less 1.
        max_vio_window: the same over the window so far.
        max_vio_unbiased: what it would have been without bias, from sampled tokens.
        straggler_factor: load of the busiest device over the mean.
        best_mass: score mass of sampled tokens that top-k without bias would have chosen.
        chosen_mass: that was chosen.
        dead: experts without a token in the step.
        shrunk: experts whose gradients were shrunk.
        bad: tokens whose scores are not finite.
        warm_up: 1 where the router warmed up in the step, else 0.
    """

    max_vio: float
    max_vio_window: float
    max_vio_unbiased: float
    straggler_factor: float
    best_mass: float
    chosen_mass: float
    dead: float
    shrunk: float
    bad: float
    warm_up: float

    def row(self) -> list[float]:
        """As numbers for the exchange."""
        return [getattr(self, name) for name in RouterFigures.__slots__]


@dataclass(slots=True)
class _Place:
    """A router of the stage, its part of the counts, and its experts' weights."""

    layer: str
    router: ElbRouter
    part: slice
    experts: tuple[str, ...]
    shrunk: int = 0


class StageExperts:
    """All `ElbRouter`s of a stage.

    Args:
        layers: of the stage.
        device: where they are.
        recomputed: indices of the layers whose forward runs again: it repeats a micro-batch's choices.
    """

    def __init__(
        self, layers: Sequence[_Layer], *, device: torch.device, recomputed: Collection[int]
    ) -> None:
        self._places: list[_Place] = []
        self._in_layer: dict[int, list[ElbRouter]] = {}
        length = 0
        for layer in layers:
            for path, module in layer.module.named_modules():
                if isinstance(module, ElbRouter):
                    part = slice(length, length + module.num_counts)
                    experts = _expert_weights(layer, path, module.num_experts)
                    self._places.append(_Place(layer.name, module, part, experts))
                    module.keeps_routes = layer.index in recomputed
                    self._in_layer.setdefault(layer.index, []).append(module)
                    length = part.stop
        self._counts = torch.zeros(length, dtype=torch.int32, device=device)
        self._totals = np.zeros(length, dtype=np.int32)
        for place in self._places:
            place.router.count_into(self._counts[place.part])

    def __bool__(self) -> bool:
        return bool(self._places)

    def begin_step(self) -> None:
        """Count from 0."""
        self._counts.zero_()
        for place in self._places:
            place.router.begin_step()

    def begin_pass(self, layer: int, microbatch: int) -> None:
        """Say which layer is about to run on which micro-batch."""
        for router in self._in_layer.get(layer, ()):
            router.begin_pass((microbatch, layer))

    def bucket(self, index: int, *, holders: Sequence[int], rank: int) -> Bucket:
        """The counts as something to sum over the holders.

        Args:
            index: of the bucket.
            holders: ranks that hold the stage.
            rank: this one.
        """
        return Bucket(
            index=index,
            owners=(tuple(holders),),
            numel=len(self._counts),
            terms={(0, tuple(holders).index(rank)): self._counts},
            results=(self._counts,),
        )

    def latch(self, *, more: bool = False) -> None:
        """Take the sums of the step; forwards of the next may count from now on.

        Args:
            more: add them to those taken before: an update follows several passes.
        """
        counts = self._counts.cpu().numpy().copy()
        self._totals = self._totals + counts if more else counts

    def num_bad_tokens(self) -> int:
        """Of the step, those whose scores are not finite, over all routers."""
        return sum(bad_tokens(self._totals[place.part]) for place in self._places)

    def waits_for_norms(self, layer: str) -> bool:
        """Whether a layer's gradients are still to be shrunk after they were summed."""
        return any(p.layer == layer and p.router.elb.compensate for p in self._places)

    def compensate(self, grads: Mapping[str, torch.Tensor]) -> None:
        """Shrink gradients of overloaded experts, before norms are taken and clipped.

        Args:
            grads: summed over groups, by parameter name; changed in place.
        """
        for place in self._places:
            if not place.router.elb.compensate or not place.experts:
                continue
            load = place.router.read_counts(self._totals[place.part]).load
            parts = [grads[name].flatten(1) for name in place.experts]
            squares_E = sum(torch.linalg.vector_norm(p, dim=1).double().square() for p in parts)
            assert isinstance(squares_E, torch.Tensor), "a router with experts has weights"
            norms = squares_E.sqrt().cpu().numpy()
            factors = balancer.compensation(load, norms)
            place.shrunk = int((factors < 1).sum())
            if place.shrunk:
                factor_E = torch.from_numpy(factors).float().to(parts[0].device)
                for part in parts:
                    part.mul_(factor_E.unsqueeze(1))

    def hold_warm_up(self) -> bool:
        """Let all routers route as in their warm-up until the next update, for trials; whether any does."""
        return any([place.router.hold_warm_up() for place in self._places])

    def update(self) -> None:
        """Apply the step's counts to the routers' states."""
        for place in self._places:
            totals = self._totals[place.part]
            if not bad_tokens(
                totals
            ):  # else the step fails on all workers, and nothing shall change
                place.router.balance(totals)
                if (warning := place.router.gain_warning()) is not None:
                    logger.warning("%s: %s", place.layer, warning)

    def figures(self) -> list[RouterFigures]:
        """Of each router, in the order of the layers; call it before `update`."""
        return [_figures(place, self._totals[place.part]) for place in self._places]

    def loads(self) -> list[tuple[str, tuple[int, ...]]]:
        """(layer, tokens of each expert) of each router in the step."""
        return [
            (p.layer, tuple(p.router.read_counts(self._totals[p.part]).load.tolist()))
            for p in self._places
        ]


def count_routers(buffers: Sequence[str]) -> int:
    """How many routers a layer has, by the names of its persistent buffers."""
    return sum(name.split("#")[0].rpartition(".")[2] == STEP_BUFFER for name in buffers)


def layers_with_routers(skeleton: ModelSkeleton) -> tuple[int, ...]:
    """Indices of the layers whose routers count tokens.

    Args:
        skeleton: the model.
    """
    return tuple(i for i, layer in enumerate(skeleton.layers) if count_routers(layer.buffers))


def count_bad_scores(rows: Sequence[Sequence[float]]) -> int:
    """Tokens whose scores are not finite, over all routers.

    Args:
        rows: figures of each router, as `RouterFigures.row` gave them.
    """
    return sum(int(figures.bad) for figures in _figures_of(rows))


def _figures_of(rows: Sequence[Sequence[float]]) -> list[RouterFigures]:
    names = RouterFigures.__slots__
    return [RouterFigures(**dict(zip(names, row, strict=True))) for row in rows]


def summarise(rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """The figures of a step, from those of all routers in the order of the layers.

    Args:
        rows: as `RouterFigures.row` gave them.
    """
    figures = _figures_of(rows)
    if not figures:
        return {}
    best = math.fsum(f.best_mass for f in figures)
    chosen = math.fsum(f.chosen_mass for f in figures)
    return {
        "max_vio": math.fsum(f.max_vio for f in figures) / len(figures),
        "max_vio_window": math.fsum(f.max_vio_window for f in figures) / len(figures),
        "max_vio_unbiased": math.fsum(f.max_vio_unbiased for f in figures) / len(figures),
        "straggler_factor": math.fsum(f.straggler_factor for f in figures) / len(figures),
        "gate_mass_lost": 1.0 - chosen / best if best else 0.0,
        "dead_experts": math.fsum(f.dead for f in figures),
        "shrunk_experts": math.fsum(f.shrunk for f in figures),
        "warm_up_share": math.fsum(f.warm_up for f in figures) / len(figures),
    }


def _figures(place: _Place, totals: np.ndarray[Any, np.dtype[Any]]) -> RouterFigures:
    router = place.router
    counts = router.read_counts(totals)
    load = counts.load
    state = router.state()
    shares = balancer.target_shares(state, temper=router.elb.target_share)
    begins = state.step % router.elb.monitor_freq == 0
    best, chosen = gate_masses(totals)
    return RouterFigures(
        max_vio=balancer.max_violation(load, shares),
        max_vio_window=balancer.max_violation(load if begins else state.window + load, shares),
        max_vio_unbiased=balancer.max_violation(counts.natural),
        straggler_factor=balancer.straggler_factor(load, devices=router.num_devices),
        best_mass=best,
        chosen_mass=chosen,
        dead=float((load == 0).sum()) if load.any() else 0.0,
        shrunk=float(place.shrunk),
        bad=float(bad_tokens(totals)),
        warm_up=float(router.warms_up()),
    )


def _expert_weights(layer: _Layer, router_path: str, num_experts: int) -> tuple[str, ...]:
    """Names of the weights beside a router with one matrix an expert: of the module that holds it."""
    parent = layer.module.get_submodule(router_path.rpartition(".")[0])
    held = {id(p) for p in parent.parameters() if p.dim() == 3 and p.shape[0] == num_experts}
    return tuple(name for name, p in layer.trainable.items() if id(p) in held)
