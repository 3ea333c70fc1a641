import pytest

from deepopt.head.recovery import Fail, Restart, StopAnyway, decide, find_culprit
from deepopt.worker.messages import Failure, Sender


def failure(rank: int, kind: str, **fields: object) -> Failure:
    sender = Sender(
        job_id="job", generation=1, plan_id=1, rank=rank, incarnation=f"incarnation-{rank}"
    )
    defaults = {"step": 7, "action": "1F2", "message": f"{kind} of {rank}", "host": "alpha"}
    return Failure(sender=sender, kind=kind, **{**defaults, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "culprit"),
    [
        (["peer", "death"], 1),
        (["peer", "error", "death"], 2),
        (["peer", "hang", "error"], 2),
        (["peer", "peer", "hang"], 2),
        (["peer", "peer"], 0),
        (["error", "error"], 0),
        (["death", "death"], 0),
        (["hang", "setup"], 1),
    ],
)
def test_a_death_comes_before_an_own_error_before_a_hang_before_a_victim(
    kinds: list[str], culprit: int
) -> None:
    failures = [failure(rank, kind) for rank, kind in enumerate(kinds)]
    blame = find_culprit(failures)
    assert blame.culprit.sender.rank == culprit
    assert [v.sender.rank for v in blame.victims] == [
        rank for rank in range(len(kinds)) if rank != culprit
    ]


def test_the_first_word_of_a_rank_counts() -> None:
    blame = find_culprit([failure(1, "error"), failure(0, "peer"), failure(1, "death")])
    assert (blame.culprit.sender.rank, blame.culprit.kind) == (1, "error")
    assert len(blame.victims) == 1


@pytest.mark.parametrize("kind", ["death", "hang", "peer"])
def test_lost_workers_are_replaced_until_the_budget_is_spent(kind: str) -> None:
    failures = [failure(2, kind)]
    verdict = decide(failures, restarts=1, max_restarts=2, stopping=False)
    assert isinstance(verdict, Restart)
    assert verdict.restarts == 2
    verdict = decide(failures, restarts=2, max_restarts=2, stopping=False)
    assert isinstance(verdict, Fail)
    assert verdict.exit_code == 4
    assert "rank 2 on alpha" in verdict.message
    assert "lost 3 worker group(s), faults.max_restarts allows 2" in verdict.message


def test_an_error_of_the_model_ends_the_job_without_a_restart() -> None:
    failures = [failure(0, "peer"), failure(1, "error", message="loss is nan", exit_code=5)]
    verdict = decide(failures, restarts=0, max_restarts=3, stopping=False)
    assert isinstance(verdict, Fail)
    assert verdict.exit_code == 5
    assert verdict.message == "rank 1 on alpha failed in step 7: loss is nan"


@pytest.mark.parametrize("exit_code", [1, 3, 5])
def test_a_failed_start_has_the_exit_code_of_its_error(exit_code: int) -> None:
    failures = [failure(0, "setup", exit_code=exit_code, remedy="fix it")]
    verdict = decide(failures, restarts=0, max_restarts=3, stopping=False)
    assert isinstance(verdict, Fail)
    assert (verdict.exit_code, verdict.remedy) == (exit_code, "fix it")
    assert "while starting" in verdict.message


def test_a_start_that_failed_because_of_a_peer_is_tried_again() -> None:
    verdict = decide(
        [failure(0, "setup", exit_code=4)], restarts=0, max_restarts=1, stopping=False
    )
    assert isinstance(verdict, Restart)


def test_a_worker_lost_while_stopping_ends_the_job_as_stopped() -> None:
    verdict = decide([failure(0, "death")], restarts=0, max_restarts=3, stopping=True)
    assert isinstance(verdict, StopAnyway)
    verdict = decide([failure(0, "error")], restarts=0, max_restarts=3, stopping=True)
    assert isinstance(verdict, Fail)
