"""From which step a group goes on, and who sends which layers to whom: from what survivors have. Pure.

All survivors stand at most one step apart, since nobody ends an exchange before all have begun it. Who
is a step behind has whole gradients, and makes that step's update when it is told the exchange. So
usually no step is lost; a layer that only a copy of an earlier step is left of takes all back to
that one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from deepopt.planner.plan import Plan
from deepopt.worker.messages import Standing, Transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class Restoration:
    """How a new group takes up the job without a checkpoint.

    Args:
        step: steps done.
        transfers: what goes from survivors to who does not have it.
        source: `seed`, `survivors`, `copies` (of other workers' layers: mirrors and data-parallel
            replicas) or `replicas` (kept in memory by peers).
    """

    step: int
    transfers: tuple[Transfer, ...]
    source: str


def restore(plan: Plan, *, survivors: Mapping[int, Standing]) -> Restoration | None:
    """Where a new group can go on from; None: a checkpoint is needed.

    Args:
        plan: of the new group.
        survivors: what those of its members have that were in the group before, by new rank.
    """
    standings = {rank: s for rank, s in survivors.items() if s.layers or s.replicas}
    if not standings:
        return None
    newest = max(s.version for s in standings.values())
    steps = {newest} | {step for s in standings.values() for step in (s.version, *s.held)}
    for step in sorted(steps, reverse=True):
        if all(_reaches(s, step, newest=newest) for s in standings.values()):
            transfers = _plan_transfers(plan, standings, step)
            if transfers is not None:
                return Restoration(
                    step=step, transfers=transfers, source=_source_of(transfers, step)
                )
    return None


def _reaches(standing: Standing, step: int, *, newest: int) -> bool:
    """Whether a survivor can bring its own layers to a step."""
    if standing.version == step or step in standing.held or not standing.layers:
        return True
    # Its exchange is known to whoever has made the update.
    return standing.ready and standing.version + 1 == step == newest


def _plan_transfers(
    plan: Plan, standings: Mapping[int, Standing], step: int
) -> tuple[Transfer, ...] | None:
    """A source for each layer that a rank needs and does not have; None when one has no source."""
    live: dict[str, list[int]] = defaultdict(list)
    copies: dict[str, list[int]] = defaultdict(list)
    for rank, standing in sorted(standings.items()):
        for layer in standing.layers:
            live[layer].append(rank)
        for layer in standing.replicas.get(step, ()):
            copies[layer].append(rank)
    sent: dict[int, int] = defaultdict(int)  # layers by source, so that all share the work
    transfers = []
    for rank in range(plan.world_size):
        for stage in plan.held_stages(rank):
            for index in plan.stage_layers(stage):
                layer = plan.layer_names[index]
                if rank in live[layer]:
                    continue
                sources = live[layer] or copies[layer]
                if sources:
                    source = rank  # under another plan it may keep the copy itself
                    if rank not in sources:
                        source = min(sources, key=lambda other: (sent[other], other))
                        sent[source] += 1
                    transfers.append(
                        Transfer(
                            layer=layer,
                            source=source,
                            target=rank,
                            replica=not live[layer],
                        )
                    )
                elif step > 0:  # before the first step it is as initialised, wherever it is
                    return None
    return tuple(transfers)


def _source_of(transfers: tuple[Transfer, ...], step: int) -> str:
    if any(one.replica for one in transfers):
        return "replicas"
    if transfers:
        return "copies"
    return "survivors" if step else "seed"
