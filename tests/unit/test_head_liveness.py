import pytest

from deepopt.head.liveness import Deadlines, Liveness, choose_stuck
from deepopt.worker.messages import Heartbeat, Sender


def beat(rank: int, *, progress: int = 0, step: int = 1, action: str = "0F0") -> Heartbeat:
    sender = Sender(job_id="j", generation=1, plan_id=1, rank=rank, incarnation=str(rank))
    return Heartbeat(sender=sender, step=step, progress=progress, action=action)


@pytest.fixture
def liveness() -> Liveness:
    return Liveness(Deadlines(heartbeat_timeout_s=3.0, step_timeout_s=10.0))


def kinds(liveness: Liveness, now_s: float, *, stepping: bool = True) -> list[tuple[int, str]]:
    return [(f.rank, f.kind) for f in liveness.check(now_s=now_s, stepping=stepping)]


def test_a_worker_is_suspect_once_then_silent(liveness: Liveness) -> None:
    liveness.hear(beat(0), now_s=0.0)
    assert kinds(liveness, 1.0) == []
    assert kinds(liveness, 1.1) == [(0, "suspect")]
    assert kinds(liveness, 2.9) == []
    assert liveness.suspects() == (0,)
    assert kinds(liveness, 3.1) == [(0, "silent")]


def test_a_sign_of_life_clears_the_suspicion(liveness: Liveness) -> None:
    liveness.hear(beat(0), now_s=0.0)
    assert kinds(liveness, 2.0) == [(0, "suspect")]
    liveness.hear(beat(0), now_s=2.5)
    assert liveness.suspects() == ()
    assert kinds(liveness, 3.4) == []


def test_progress_is_counted_apart_from_signs_of_life(liveness: Liveness) -> None:
    for now_s in range(12):
        liveness.hear(beat(0, progress=now_s), now_s=now_s)
        liveness.hear(beat(1, progress=7), now_s=now_s)
    assert kinds(liveness, 11.0) == [(1, "stuck")]
    assert kinds(liveness, 11.0, stepping=False) == []


def test_the_set_up_does_not_count_as_standing_still(liveness: Liveness) -> None:
    liveness.hear(beat(0), now_s=0.0)
    liveness.hear(beat(0), now_s=11.0)
    liveness.begin_steps(now_s=11.0)
    assert kinds(liveness, 12.0) == []


def test_a_pause_of_the_head_moves_all_signs(liveness: Liveness) -> None:
    liveness.hear(beat(0), now_s=0.0)
    liveness.forgive(100.0)
    assert kinds(liveness, 100.5) == []
    assert liveness.age_s(0, now_s=100.5) == 0.5


def test_a_released_worker_is_not_watched_even_if_it_speaks_again(liveness: Liveness) -> None:
    liveness.hear(beat(0), now_s=0.0)
    liveness.release(0)
    liveness.hear(beat(0), now_s=1.0)
    assert kinds(liveness, 100.0) == []
    assert liveness.age_s(0, now_s=100.0) is None


@pytest.mark.parametrize(
    ("actions", "stuck"),
    [
        (["0RECV_B1", "1B1", "2RECV_F3"], 1),
        (["0RECV_B1", "", "2REDUCE"], 1),
        (["0SEND_F1", "1RECV_F1", ""], 0),
        (["", "", ""], 2),  # all alike: the one that stands still longest
    ],
)
def test_the_others_wait_for_the_one_that_computes(actions: list[str], stuck: int) -> None:
    stalled = [(rank, 10.0 + rank, action) for rank, action in enumerate(actions)]
    assert choose_stuck(stalled) == stuck
