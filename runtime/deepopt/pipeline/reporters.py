"""Which worker reports which figures in the exchange at the end of a step: the same answer on all workers."""

from __future__ import annotations

from collections.abc import Sequence

from deepopt.pipeline.stage_experts import NUM_FIGURES, count_routers
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton


class TrainableParameters:
    """Which parameters there are to norm and to tie, and who reports which norm: the same on
    every worker."""

    def __init__(self, plan: Plan, skeleton: ModelSkeleton) -> None:
        stage_of = {
            skeleton.layers[i].name: stage
            for stage in range(plan.num_stages)
            for i in plan.stage_layers(stage)
        }
        self.names: list[str] = []
        uses: dict[str, list[tuple[int, str]]] = {}
        reporters: dict[int, list[str]] = {}
        for layer in skeleton.layers:
            own = {p.name for p in layer.parameters}
            for parameter in layer.parameters:
                if not parameter.requires_grad or parameter.tied_to in own:
                    continue
                stage = stage_of[layer.name]
                source = parameter.tied_to or parameter.name
                uses.setdefault(source, []).append((stage, parameter.name))
                if parameter.tied_to is None:
                    self.names.append(parameter.name)
                    reporters.setdefault(plan.holders(stage)[0], []).append(parameter.name)
        self.by_reporter = {rank: tuple(names) for rank, names in reporters.items()}
        self.most_norms = max(map(len, self.by_reporter.values()), default=0)
        self.tied_uses = [tuple(where) for where in uses.values() if len(where) > 1]
        self.tied_names = {name for where in self.tied_uses for _, name in where}


class RoutersByReporter:
    """Who reports the figures of which routers: the same on every worker."""

    def __init__(self, plan: Plan, skeleton: ModelSkeleton) -> None:
        counts = [
            sum(count_routers(skeleton.layers[i].buffers) for i in plan.stage_layers(stage))
            for stage in range(plan.num_stages)
        ]
        reporters: dict[int, list[int]] = {}
        for stage, count in enumerate(counts):
            if count:
                reporters.setdefault(plan.holders(stage)[0], []).append(stage)
        self.by_reporter = {rank: tuple(stages) for rank, stages in reporters.items()}
        self._counts = counts
        self.most_figures = NUM_FIGURES * max(
            (sum(counts[s] for s in stages) for stages in reporters.values()), default=0
        )

    def read(self, rows: Sequence[Sequence[float]], *, first: int) -> list[list[float]]:
        """Figures of each router in the order of stages, from all ranks' rows."""
        by_stage: dict[int, list[list[float]]] = {}
        for rank, stages in self.by_reporter.items():
            numbers = list(rows[rank][first:])
            for stage in stages:
                for _ in range(self._counts[stage]):
                    by_stage.setdefault(stage, []).append(numbers[:NUM_FIGURES])
                    del numbers[:NUM_FIGURES]
        return [figures for stage in sorted(by_stage) for figures in by_stage[stage]]
