import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.cluster.process_look import ProcessLook
from deepopt.head.liveness import (
    PATIENT_STEPS,
    Cause,
    Deadlines,
    Finding,
    Liveness,
    choose_stuck,
)
from deepopt.worker.messages import Heartbeat, Sender

STOPPED = ProcessLook(state="T")
RUNNING = ProcessLook(state="R", cpu_share=1.0)
ASLEEP = ProcessLook(state="S", cpu_share=0.0)
TRACED = ProcessLook(state="t", tracer=77)
DISK = ProcessLook(state="D")


def beat(
    rank: int, *, progress: int = 0, step: int = 1, action: str = "0F0", action_s: float = 0.0
) -> Heartbeat:
    sender = Sender(job_id="j", generation=1, plan_id=1, rank=rank, incarnation=str(rank))
    return Heartbeat(
        sender=sender, step=step, progress=progress, action=action, action_s=action_s
    )


class Scene:
    """Workers on two hosts, time in steps of a tenth of a second, beats every half second."""

    def __init__(
        self, *, num_workers: int = 2, steady: bool = True, **deadlines: float
    ) -> None:
        words = {"heartbeat_timeout_s": 5.0, "step_timeout_s": 600.0, **deadlines}
        self.liveness = Liveness(Deadlines(**words))
        self.now_s = 0.0
        self.ranks = range(num_workers)
        self.actions = {rank: f"{rank}F0" for rank in self.ranks}
        self.progress = dict.fromkeys(self.ranks, 0)
        self.looks = dict.fromkeys(self.ranks, ASLEEP)
        self.silent: set[int] = set()
        self.still: set[int] = set()
        self.moved_s = dict.fromkeys(self.ranks, 0.0)
        self.agents = {"alpha", "beta"}
        self.found: list[tuple[float, Finding]] = []
        self.go(1.0)
        if steady:
            for _ in range(5):
                self.liveness.note_step(0.2)

    def go(self, duration_s: float) -> None:
        for _ in range(round(duration_s / 0.1)):
            self.now_s = round(self.now_s + 0.1, 1)
            for rank in self.ranks:
                if rank not in self.still:
                    self.progress[rank] += 1
                    self.moved_s[rank] = self.now_s
                if round(self.now_s * 10) % 5 == 0 and rank not in self.silent:
                    sign = beat(
                        rank,
                        progress=self.progress[rank],
                        action=self.actions[rank],
                        action_s=self.now_s - self.moved_s[rank],
                    )
                    self.liveness.hear(sign, now_s=self.now_s)
            if round(self.now_s * 10) % 5 == 2:
                for number, host in enumerate(("alpha", "beta")):
                    if host in self.agents:
                        looks = {r: self.looks[r] for r in self.ranks if r % 2 == number}
                        self.liveness.see(host, looks=looks, now_s=self.now_s)
            findings = self.liveness.check(now_s=self.now_s, stepping=True)
            self.found += [(self.now_s, finding) for finding in findings]

    def lost(self) -> tuple[float, Finding]:
        """The first worker to be killed, and when."""
        return next((s, f) for s, f in self.found if f.kind in ("silent", "stuck"))

    def kinds(self) -> set[str]:
        return {finding.kind for _, finding in self.found}


# --- silence ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("look", "cause", "within_s", "word"),
    [
        (STOPPED, Cause.STOPPED, 1.5, "stopped by a signal"),
        (RUNNING, Cause.HELD_GIL, 2.5, "running, 100 % CPU: something holds the GIL"),
        (ASLEEP, Cause.HELD_GIL, 2.5, "asleep, 0 % CPU: something holds the GIL"),
        (DISK, Cause.DISK, 5.2, "waiting for a disk or a driver"),
    ],
)
def test_a_silent_worker_is_lost_at_the_agents_word_and_its_cause_is_named(
    look: ProcessLook, cause: Cause, within_s: float, word: str
) -> None:
    scene = Scene()
    scene.looks[1], scene.silent, scene.still = look, {1}, {1}
    scene.go(6.0)
    at_s, finding = scene.lost()
    assert (finding.rank, finding.kind, finding.cause) == (1, "silent", cause)
    assert word in finding.message
    assert at_s - 1.0 <= within_s
    assert finding.since_s == 1.0


def test_a_host_out_of_reach_is_lost_at_the_last_deadline_and_named() -> None:
    scene = Scene(num_workers=4)
    scene.silent, scene.still, scene.agents = {1, 3}, {1, 3}, {"alpha"}
    scene.go(5.5)
    lost = [finding for _, finding in scene.found if finding.kind == "silent"]
    assert {finding.rank for finding in lost} == {1, 3}
    assert {finding.cause for finding in lost} == {Cause.UNREACHABLE}
    assert "the agent on beta is not heard either" in lost[0].message
    assert 4.0 < scene.lost()[0] - 1.0 < 4.3


def test_a_host_that_is_cut_off_is_not_taken_for_a_held_gil() -> None:
    scene = Scene(num_workers=4)
    scene.go(0.2)  # the agent's last word comes after the last heartbeat
    scene.silent, scene.still, scene.agents = {1, 3}, {1, 3}, {"alpha"}
    scene.go(6.0)
    causes = {finding.cause for _, finding in scene.found if finding.kind == "silent"}
    assert causes == {Cause.UNREACHABLE}


def test_an_agent_that_is_silent_while_its_workers_speak_is_told_once_in_a_while() -> None:
    scene = Scene(num_workers=4)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == []
    scene.agents = {"alpha"}
    scene.go(4.5)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == []
    scene.go(1.0)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == ["beta"]
    scene.go(4.5)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == []
    scene.go(1.0)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == ["beta"]


def test_an_agent_whose_workers_are_silent_too_is_out_of_reach_not_to_blame() -> None:
    scene = Scene(num_workers=4)
    scene.agents, scene.silent = {"alpha"}, {1, 3}
    scene.go(8.0)
    assert scene.liveness.silent_agents(now_s=scene.now_s) == []


def test_without_an_agent_the_timeout_decides() -> None:
    scene = Scene(heartbeat_timeout_s=3.0)
    scene.agents = set()
    scene.go(3.0)  # forgotten by now
    scene.silent = {0}
    scene.go(3.5)
    assert scene.lost()[1].rank == 0
    assert scene.lost()[0] > 6.3


def test_a_process_in_a_debuggers_hands_is_told_once_and_left_alone() -> None:
    scene = Scene()
    scene.looks[1], scene.silent, scene.still = TRACED, {1}, {0, 1}
    scene.actions[0] = "0RECV_B0"
    scene.go(120.0)
    assert [(f.rank, f.kind) for _, f in scene.found] == [(1, "held")]
    assert "debugger (pid 77)" in scene.found[0][1].message


def test_a_sign_of_life_clears_the_suspicion() -> None:
    scene = Scene(heartbeat_timeout_s=9.0)
    scene.agents = set()
    scene.silent = {1}
    scene.go(3.0)
    assert scene.liveness.suspects() == (1,)
    scene.silent = set()
    scene.go(1.0)
    assert scene.liveness.suspects() == ()
    scene.go(20.0)
    assert scene.kinds() == {"suspect"}


def test_set_up_and_first_steps_have_three_times_the_deadline() -> None:
    scene = Scene(steady=False)
    scene.looks[1], scene.silent = RUNNING, {1}
    scene.go(14.5)
    assert scene.kinds() == {"suspect"}
    scene.go(1.0)
    assert scene.lost()[1].cause is Cause.HELD_GIL


def test_on_a_busy_machine_late_heartbeats_stretch_the_deadlines() -> None:
    scene = Scene(heartbeat_timeout_s=15.0)
    for _ in range(3):
        scene.silent = {0, 1}
        scene.go(1.4)
        scene.silent = set()
        scene.go(0.5)
    assert scene.kinds() <= {"suspect"}
    scene.looks[1], scene.silent, scene.still = RUNNING, {1}, {1}
    before_s = scene.now_s
    scene.go(8.0)
    at_s, _ = scene.lost()
    assert at_s - before_s > 3.0  # where a quiet machine takes 2.3


def test_a_pause_of_the_head_moves_all_signs() -> None:
    scene = Scene()
    scene.liveness.forgive(100.0)
    scene.now_s += 100.0
    assert scene.liveness.check(now_s=scene.now_s + 0.5, stepping=True) == []
    assert scene.liveness.age_s(0, now_s=scene.now_s + 0.5) == 0.5


def test_a_released_worker_is_not_watched_even_if_it_speaks_again() -> None:
    scene = Scene()
    scene.liveness.release(0)
    scene.liveness.release(1)
    scene.go(1.0)
    assert scene.liveness.check(now_s=100.0, stepping=True) == []
    assert scene.liveness.age_s(0, now_s=100.0) is None


# --- progress --------------------------------------------------------------------------------


def test_a_hang_is_found_by_what_recent_steps_took() -> None:
    scene = Scene()
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1B1"}
    scene.go(4.0)
    at_s, finding = scene.lost()
    assert (finding.rank, finding.kind, finding.cause) == (1, "stuck", Cause.STUCK)
    assert at_s - 1.0 < 2.3
    assert "in 1B1; its process is asleep, 0 % CPU" in finding.message
    assert "recent steps of up to 0.2 s" in finding.message


def test_a_hang_counts_from_its_beginning_not_from_the_heartbeat_after_it() -> None:
    scene = Scene()
    scene.go(
        0.1
    )  # the hang begins at 1.1 s; the next heartbeat, the first of it, comes at 1.5 s
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1B1"}
    scene.go(4.0)
    at_s, finding = scene.lost()
    assert finding.since_s == pytest.approx(1.1)
    assert 2.0 < at_s - 1.1 < 2.3


@pytest.mark.parametrize(
    "look",
    [
        RUNNING,
        ProcessLook(state="R", cpu_share=0.05),  # others have the cores
        ProcessLook(state="S", cpu_share=0.3),
        DISK,
    ],
)
def test_a_stuck_operation_that_computes_or_would_gets_three_times_as_long(
    look: ProcessLook,
) -> None:
    scene = Scene()
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1B1"}
    scene.looks[1] = look
    scene.go(5.5)
    assert scene.kinds() == set()
    scene.go(2.0)
    assert scene.lost()[1].rank == 1


def test_when_all_wait_no_data_moves() -> None:
    scene = Scene()
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1RECV_F2"}
    scene.go(4.0)
    assert scene.lost()[1].cause is Cause.COLLECTIVE


def test_one_that_waits_while_another_works_is_not_to_blame() -> None:
    scene = Scene()
    scene.still, scene.actions = {0}, {0: "0RECV_B1", 1: "1B1"}
    scene.go(60.0)
    assert scene.kinds() == set()


@pytest.mark.parametrize("steady", [True, False])
def test_between_actions_and_in_first_steps_only_the_step_timeout_counts(steady: bool) -> None:
    scene = Scene(step_timeout_s=60.0, steady=steady)
    scene.still = {0, 1}
    scene.actions = {0: "" if steady else "0F0", 1: "1RECV_F2"}  # a checkpoint, a first step
    scene.go(59.0)
    assert scene.kinds() == set()
    scene.go(3.0)
    assert scene.lost()[1].rank == 0
    assert "faults.step_timeout_s 60" in scene.lost()[1].message


def test_long_steps_have_long_deadlines() -> None:
    scene = Scene()
    for _ in range(20):
        scene.liveness.note_step(4.0)
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1B1"}
    scene.go(19.0)
    assert scene.kinds() == set()
    scene.go(3.0)
    assert scene.kinds() == {"stuck"}


def test_patience_grows_when_killing_did_not_help() -> None:
    scene = Scene()
    scene.liveness.be_patient(4.0)
    scene.still, scene.actions = {0, 1}, {0: "0RECV_B1", 1: "1B1"}
    scene.go(7.5)
    assert scene.kinds() == set()
    scene.go(2.0)
    assert scene.kinds() == {"stuck"}


def test_patience_ends_when_all_went_well_for_long() -> None:
    scene = Scene(steady=False)
    scene.liveness.be_patient(8.0)
    for _ in range(PATIENT_STEPS + 1):
        scene.liveness.note_step(0.2)
    assert scene.liveness.is_undisturbed
    scene.still = {0, 1}
    scene.go(4.0)
    assert scene.lost()[1].kind == "stuck"


def test_the_set_up_does_not_count_as_standing_still() -> None:
    scene = Scene(step_timeout_s=10.0, steady=False)
    scene.still = {0, 1}
    scene.go(9.5)
    scene.liveness.begin_steps(now_s=scene.now_s)
    scene.go(5.0)
    assert scene.kinds() == set()


@given(
    gaps_s=st.lists(st.floats(0.01, 4.9), min_size=1, max_size=60),
    state=st.sampled_from("RSDT"),
)
def test_no_silence_is_judged_before_two_heartbeats_are_missing_nor_long_after_the_timeout(
    gaps_s: list[float], state: str
) -> None:
    liveness = Liveness(Deadlines(heartbeat_timeout_s=5.0, step_timeout_s=600.0))
    now_s = 0.0
    for gap_s in gaps_s:
        liveness.hear(beat(0), now_s=now_s)
        liveness.note_step(0.1)
        now_s += gap_s
    heard_s = now_s
    liveness.hear(beat(0), now_s=heard_s)
    liveness.see("alpha", looks={0: ProcessLook(state=state)}, now_s=heard_s + 0.1)
    lost_s = None
    for tick in range(200):
        now_s = heard_s + 0.1 * tick
        if any(f.kind == "silent" for f in liveness.check(now_s=now_s, stepping=False)):
            lost_s = now_s - heard_s
            break
    assert lost_s is not None
    assert lost_s + 0.05 > 1.0
    assert lost_s <= (5.2 if len(gaps_s) >= 5 else 15.2)


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
