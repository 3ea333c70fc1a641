import pytest

from deepopt.head.budgets import Budget, Limits, Spent
from deepopt.head.recovery import Fail, Restart, StopAnyway, Verdict, decide, find_culprit
from deepopt.worker.messages import Failure, Sender

LIMITS = Limits(most=dict.fromkeys(Budget, 2), window_s=100.0, bad_host_after=2)


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


def judge(failures: list[Failure], *, stopping: bool = False, **words: object) -> Verdict:
    known = {"spent": (), "limits": LIMITS, "now_s": 1000.0, "step_done": 6, **words}
    return decide(failures, stopping=stopping, **known)  # type: ignore[arg-type]


def spent(budget: Budget = Budget.WORKER, *, at_s: float = 990.0, host: str = "alpha") -> Spent:
    return Spent(budget=budget, at_s=at_s, step_done=6, host=host)


@pytest.mark.parametrize("kind", ["death", "hang", "peer"])
def test_lost_workers_are_replaced_until_the_budget_is_spent(kind: str) -> None:
    failures = [failure(2, kind)]
    verdict = judge(failures, spent=[spent()])
    assert isinstance(verdict, Restart)
    assert (verdict.budget, verdict.left) == (Budget.WORKER, 0)
    verdict = judge(failures, spent=[spent(), spent()])
    assert isinstance(verdict, Fail)
    assert verdict.exit_code == 4
    assert "rank 2 on alpha" in verdict.message
    assert "3 lost worker group(s) within faults.window_s (100 s)" in verdict.message
    assert "faults.max_restarts allows 2" in verdict.message


def test_faults_that_are_older_than_the_window_do_not_count() -> None:
    verdict = judge([failure(2, "death")], spent=[spent(at_s=899.0)] * 9)
    assert isinstance(verdict, Restart)
    assert verdict.left == 1


@pytest.mark.parametrize(
    ("fields", "preempted", "budget"),
    [
        ({"cause": "unreachable"}, frozenset(), Budget.HOST),
        ({"cause": "stopped"}, frozenset(), Budget.WORKER),
        ({}, frozenset({2}), Budget.PREEMPTION),
    ],
)
def test_each_kind_of_fault_has_a_budget_of_its_own(
    fields: dict[str, str], preempted: frozenset[int], budget: Budget
) -> None:
    other = Budget.HOST if budget is Budget.WORKER else Budget.WORKER
    failures = [failure(2, "hang", **fields)]
    verdict = judge(failures, spent=[spent(other)] * 5, preempted=preempted)
    assert isinstance(verdict, Restart)
    assert verdict.budget is budget
    verdict = judge(failures, spent=[spent(budget)] * 5, preempted=preempted)
    assert isinstance(verdict, Fail)


def test_a_host_with_too_many_faults_is_named() -> None:
    failures = [failure(2, "death", host="beta")]
    verdict = judge(failures, spent=[spent(Budget.HOST, host="beta")])
    assert isinstance(verdict, Restart)
    assert verdict.bad_hosts == ("beta",)
    verdict = judge(failures, spent=[spent(host="alpha")])
    assert isinstance(verdict, Restart)
    assert verdict.bad_hosts == ()


def test_an_error_of_the_model_ends_the_job_without_a_restart() -> None:
    failures = [failure(0, "peer"), failure(1, "error", message="loss is nan", exit_code=5)]
    verdict = judge(failures)
    assert isinstance(verdict, Fail)
    assert verdict.exit_code == 5
    assert verdict.message == "rank 1 on alpha failed in step 7: loss is nan"


@pytest.mark.parametrize("exit_code", [1, 3, 5])
def test_a_failed_start_has_the_exit_code_of_its_error(exit_code: int) -> None:
    verdict = judge([failure(0, "setup", exit_code=exit_code, remedy="fix it")])
    assert isinstance(verdict, Fail)
    assert (verdict.exit_code, verdict.remedy) == (exit_code, "fix it")
    assert "while starting" in verdict.message


def test_a_start_that_failed_because_of_a_peer_is_tried_again() -> None:
    assert isinstance(judge([failure(0, "setup", exit_code=4)]), Restart)


def test_a_worker_lost_while_stopping_ends_the_job_as_stopped() -> None:
    assert isinstance(judge([failure(0, "death")], stopping=True), StopAnyway)
    assert isinstance(judge([failure(0, "error")], stopping=True), Fail)
