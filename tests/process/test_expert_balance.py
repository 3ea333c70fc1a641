"""Routing biases are the same on all holders, whatever happens to a step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.worker_processes import TINY_MODEL, Outcome, commit, make_plan, tiny_job, train

STEPS = 4
MIRROR = {
    "placement": "mirror",
    "schedule": "bi_stream",
    "boundaries": (0, 4),
    "pipeline_size": 2,
}
REPLICAS = {"boundaries": (0, 4), "pipeline_size": 2, "data_size": 2}
# Two devices share the experts, gradients of busy experts are shrunk, targets are not uniform.
EVERYTHING = {
    "elb": {
        "devices": 2,
        "alpha": 1.0,
        "chunks": 4,
        "compensate": True,
        "z_coefficient": 0.001,
    },
    "model": {"kwargs": {**TINY_MODEL, "num_blocks": 4, "init_std": 0.3}},
    "pipeline": {"recompute": "full"},
}


def trained(run_dir: Path, sections: dict[str, Any], **where: Any) -> Outcome:
    run_dir.mkdir(exist_ok=True)
    job = tiny_job(**sections)
    outcome = train(job, make_plan(job, **where), run_dir=run_dir, last_step=STEPS)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    return outcome


def told(outcome: Outcome) -> tuple[Any, ...]:
    """Everything about experts that does not depend on who said it."""
    figures = [
        {name: value for name, value in report.scalars.items() if "time" not in name}
        for report in outcome.reports
    ]
    loads = {
        (message.step, layer): tokens
        for message in outcome.expert_loads
        for layer, tokens in message.loads
    }
    return outcome.losses, figures, loads


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return trained(tmp_path_factory.mktemp("alone"), EVERYTHING)


@pytest.mark.parametrize("where", [MIRROR, REPLICAS], ids=["mirror", "replicas"])
def test_losses_figures_and_loads_are_those_of_one_process(
    where: dict[str, Any], alone: Outcome, tmp_path: Path
) -> None:
    assert told(trained(tmp_path, EVERYTHING, **where)) == told(alone)


def test_every_token_is_counted_once_though_forwards_run_again(alone: Outcome) -> None:
    assert len(alone.expert_loads) == STEPS
    for message in alone.expert_loads:
        assert {sum(tokens) for _, tokens in message.loads} == {8 * 2 * 32 * 2}
    assert alone.reports[-1].scalars["max_vio"] < alone.reports[-1].scalars["max_vio_unbiased"]


def test_a_resumed_run_balances_as_if_it_had_not_stopped(
    alone: Outcome, tmp_path: Path
) -> None:
    job = tiny_job(**EVERYTHING, checkpoint={"every": 2})
    plan = make_plan(job, **MIRROR)
    first = train(job, plan, run_dir=tmp_path, last_step=2)
    checkpoint = commit(first, job, plan, run_dir=tmp_path)
    second = train(
        job,
        make_plan(job),
        run_dir=tmp_path,
        start_step=2,
        last_step=STEPS,
        checkpoint=checkpoint,
        generation=2,
    )
    assert first.losses + second.losses == alone.losses
    assert told(second)[1] == told(alone)[1][2:]
