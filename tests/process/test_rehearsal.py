"""Rehearsals: plans that run in turns in one group of processes, without Ray."""

from __future__ import annotations

import pytest

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.rehearsal import RehearsalGroup, stand_in


def job(**emulation: object) -> JobConfig:
    return stand_in(
        JobConfig.model_validate(
            {
                "training": {"microbatches": 4},
                "emulation": {"forward_ms": 2, "input_ms": 2, "weight_ms": 1, **emulation},
            }
        ),
        num_layers=4,
    )


def plan(kind: PlacementKind, *, schedule: str) -> Plan:
    stages = 4 if kind is PlacementKind.V else 2
    return Plan(
        plan_id=1,
        layer_names=tuple(f"layers.{index}" for index in range(4)),
        boundaries=tuple(range(0, 4, 4 // stages)),
        placement=kind,
        schedule=schedule,
        pipeline_size=2,
        data_size=1,
        num_microbatches=4,
        num_groups=2,
    )


def test_plans_take_turns_and_train_the_same() -> None:
    plans = {
        "line": plan(PlacementKind.LINE, schedule="1f1b"),
        "v": plan(PlacementKind.V, schedule="zb_v"),
        "mirror": plan(PlacementKind.MIRROR, schedule="bi_stream"),
    }
    losses: dict[str, list[float]] = {name: [] for name in plans}
    with RehearsalGroup(2) as group:
        for name, own in plans.items():
            group.load(name, job=job(), plan=own)
        for _ in range(2):
            for name in plans:
                run = group.run(name, num_steps=2)
                losses[name] += run.ranks[0].losses
                assert len(run.step_s) == 2
                # A rank's own share of four layers, four micro-batches.
                assert run.ranks[0].busy_s == pytest.approx(4 * 2 * 0.005)
                assert run.overruns.num_operations > 0
    assert losses["line"] == losses["v"] == losses["mirror"]
    assert len(set(losses["line"])) == 4


def test_what_cannot_be_built_is_told_with_its_reason() -> None:
    wrong = job(forward_ms=(1, 2, 3))
    with RehearsalGroup(2) as group, pytest.raises(PlanError, match="forward_ms has 3 figures"):
        group.load("a", job=wrong, plan=plan(PlacementKind.LINE, schedule="1f1b"))
