"""Workers killed with SIGKILL at all kinds of moments: survivors go on in place, no loss changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepopt.config import JobConfig
from deepopt.worker.messages import WeightWork
from support.recovering import TOLD, Story, train_through_faults
from support.worker_processes import losses_of, make_plan, tiny_job

STEPS = 6
MIRROR = {
    "placement": "mirror",
    "schedule": "bi_stream",
    "boundaries": (0, 2, 4, 6),
    "pipeline_size": 4,
}
NEVER_ON_DISK = {"every": 0}


def kills(*points: tuple[int, int, str | None]) -> dict[str, Any]:
    """Kill (rank, step, op), one in each generation."""
    return {
        "inject": [
            {"kill": {"rank": rank, "step": step, "op": op, "generation": generation}}
            for generation, (rank, step, op) in enumerate(points, start=1)
        ]
    }


def job_of(**sections: Any) -> JobConfig:
    return tiny_job(checkpoint=NEVER_ON_DISK, **sections)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    job = job_of()
    return losses_of(job, make_plan(job), run_dir=tmp_path_factory.mktemp("a"), last_step=STEPS)


def play(job: JobConfig, run_dir: Path, **where: Any) -> Story:
    return train_through_faults(job, make_plan(job, **where), run_dir=run_dir, last_step=STEPS)


def test_a_mirror_goes_on_after_kills_in_all_parts_of_a_step(
    undisturbed: list[float], tmp_path: Path
) -> None:
    points = [
        (0, 1, "F"),
        (1, 2, "I"),
        (2, 3, "EXCHANGE"),
        (3, 4, "SEND_F"),
        (1, 4, "UPDATE"),
        (0, 5, "REDUCE"),
        (2, 6, None),
    ]
    story = play(job_of(faults=kills(*points)), tmp_path, **MIRROR)
    assert story.loss_of_each_step == undisturbed
    assert [r and (r.step, r.source) for r in story.restorations] == [
        (0, "copies"),
        (1, "copies"),
        (2, "copies"),
        (3, "copies"),
        (4, "copies"),
        (4, "copies"),
        (5, "copies"),
    ]
    for before, after, (dead, _, _) in zip(story.pids, story.pids[1:], points, strict=False):
        changed = {rank for rank in before if before[rank] != after[rank]}
        assert changed == {dead}


def test_who_takes_a_place_is_told_how_weight_gradients_are_computed_and_tries_nothing(
    undisturbed: list[float], tmp_path: Path
) -> None:
    story = play(job_of(faults=kills((1, 3, "F"))), tmp_path, **MIRROR)
    work = [message for message in story.messages if isinstance(message, WeightWork)]
    assert [w.sender.rank for w in work if w.sender.generation == 2] == [1]
    for w in work:
        reasons = {way.reason for way in w.ways.values()}
        assert (reasons == {TOLD}) == (w.sender.generation == 2)
    assert story.loss_of_each_step == undisturbed


def test_links_that_break_cost_no_process(undisturbed: list[float], tmp_path: Path) -> None:
    cuts = [
        {"cut": {"rank": 1, "step": 3, "op": "RECV_F"}},
        {"cut": {"rank": 0, "step": 5, "op": "EXCHANGE", "generation": 2}},
    ]
    story = play(job_of(faults={"inject": cuts}), tmp_path, **MIRROR)
    assert story.loss_of_each_step == undisturbed
    assert [r and r.step for r in story.restorations] == [2, 4]
    assert story.pids[0] == story.pids[1] == story.pids[2]


def test_steps_that_overlap_are_taken_back_to_the_last_one_agreed_on(
    undisturbed: list[float], tmp_path: Path
) -> None:
    points = [(3, 3, "F"), (1, 5, "W")]
    job = job_of(
        training={"grad_clip": None}, pipeline={"overlap_steps": True}, faults=kills(*points)
    )
    alone = losses_of(
        job_of(training={"grad_clip": None}), make_plan(job), run_dir=tmp_path, last_step=STEPS
    )
    story = play(job, tmp_path, **MIRROR)
    assert story.loss_of_each_step == alone
    assert [r and r.source for r in story.restorations] == ["copies", "copies"]


@pytest.mark.parametrize(
    "where",
    [
        pytest.param({"boundaries": (0, 2, 5), "pipeline_size": 3}, id="line-3"),
        pytest.param(
            {
                "placement": "v",
                "schedule": "zb_v",
                "boundaries": (0, 2, 4, 6),
                "pipeline_size": 2,
            },
            id="v-2",
        ),
    ],
)
@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_a_stage_without_a_second_holder_comes_from_a_peers_memory(
    where: dict[str, Any], overlap: bool, undisturbed: list[float], tmp_path: Path
) -> None:
    faults = {**kills((1, 4, "F"), (0, 6, None)), "replica_share": 1.0}
    job = job_of(pipeline={"overlap_steps": overlap}, faults=faults)
    story = play(job, tmp_path, **where)
    assert story.loss_of_each_step == undisturbed
    assert [r and r.source for r in story.restorations] == ["replicas", "replicas"]


def test_a_stage_and_the_peer_that_keeps_its_copy_come_from_the_disk(
    undisturbed: list[float], tmp_path: Path
) -> None:
    both = [{"kill": {"rank": rank, "step": 5}} for rank in (0, 1)]
    job = tiny_job(checkpoint={"every": 2}, faults={"inject": both})
    story = play(job, tmp_path, boundaries=(0, 4), pipeline_size=2)
    assert story.loss_of_each_step == undisturbed
    assert story.restorations == [None]


def test_without_copies_survivors_keep_their_processes_and_load_what_is_on_the_disk(
    undisturbed: list[float], tmp_path: Path
) -> None:
    job = tiny_job(checkpoint={"every": 0}, faults={**kills((1, 3, "B")), "replicas": "none"})
    story = play(job, tmp_path, boundaries=(0, 4), pipeline_size=2)
    assert story.loss_of_each_step == undisturbed
    assert story.restorations == [None]
    assert story.pids[0][0] == story.pids[1][0]


def test_a_death_while_the_next_group_forms_is_one_more_recovery(
    undisturbed: list[float], tmp_path: Path
) -> None:
    story = play(
        job_of(faults=kills((0, 3, "F"), (3, 3, None))),
        tmp_path,
        **MIRROR,
    )
    assert story.loss_of_each_step == undisturbed
    assert [r and r.step for r in story.restorations] == [2, 2]
