"""A worker group that goes on with fewer workers, and with more again: no step is lost, no loss changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepopt.config import JobConfig
from support.recovering import Resize, Story, train_through_faults
from support.worker_processes import losses_of, make_plan, tiny_job

STEPS = 7
LINE_3 = {"boundaries": (0, 2, 5), "pipeline_size": 3}
LINE_2 = {"boundaries": (0, 4), "pipeline_size": 2}
V_2 = {"placement": "v", "schedule": "zb_v", "boundaries": (0, 2, 4, 6), "pipeline_size": 2}
MIRROR_4 = {
    "placement": "mirror",
    "schedule": "bi_stream",
    "boundaries": (0, 2, 4, 6),
    "pipeline_size": 4,
}
DATA_2 = {"data_size": 2}
ALONE: dict[str, Any] = {}


def job_of(*, kill: tuple[int, int, str | None], **sections: Any) -> JobConfig:
    rank, step, op = kill
    inject = [{"kill": {"rank": rank, "step": step, "op": op}}]
    return tiny_job(
        checkpoint={"every": 0}, faults={"inject": inject, "replica_share": 1.0}, **sections
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job = tiny_job(checkpoint={"every": 0})
    return losses_of(job, make_plan(job), run_dir=tmp_path_factory.mktemp("a"), last_step=STEPS)


def play(
    job: JobConfig, run_dir: Path, first: dict[str, Any], resizes: dict[int, Resize]
) -> Story:
    return train_through_faults(
        job, make_plan(job, **first), run_dir=run_dir, last_step=STEPS, resizes=resizes
    )


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_three_workers_become_two_and_three_again_from_what_is_in_memory(
    overlap: bool, undisturbed: list[float], tmp_path: Path
) -> None:
    job = job_of(kill=(1, 4, "F"), pipeline={"overlap_steps": overlap})
    resizes = {
        2: Resize(make_plan(job, **LINE_2), kept={0: 0, 1: 2}),
        3: Resize(make_plan(job, **LINE_3), kept={0: 0, 2: 1}, leave_after=5),
    }
    story = play(job, tmp_path, LINE_3, resizes)
    assert story.loss_of_each_step == undisturbed
    shrunk, grown = story.restorations
    assert shrunk is not None
    assert shrunk.source == "replicas"  # the dead worker's layers, from its peer's memory
    assert grown is not None
    assert (grown.source, grown.step >= 5) == ("copies", True)
    first, second, third = story.pids
    assert second == {0: first[0], 1: first[2]}
    assert (third[0], third[2]) == (second[0], second[1])


@pytest.mark.parametrize(
    ("first", "then", "kept", "victim"),
    [
        pytest.param(MIRROR_4, V_2, {0: 1, 1: 3}, 0, id="mirror-4-to-v-2"),
        pytest.param(LINE_2, ALONE, {0: 1}, 0, id="line-2-to-one"),
        pytest.param(DATA_2, ALONE, {0: 0}, 1, id="two-replicas-to-one"),
    ],
)
def test_another_placement_takes_over_what_survivors_have(
    first: dict[str, Any],
    then: dict[str, Any],
    kept: dict[int, int],
    victim: int,
    undisturbed: list[float],
    tmp_path: Path,
) -> None:
    job = job_of(kill=(victim, 4, None))
    story = play(job, tmp_path, first, {2: Resize(make_plan(job, **then), kept=kept)})
    assert story.loss_of_each_step == undisturbed
    (shrunk,) = story.restorations
    assert shrunk is not None
