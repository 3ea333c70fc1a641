"""The rows of the fault matrix: what is done to which job, and what must be seen of it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from chaos.play import Play, strike
from chaos.report import Result

GAP = 26  # steps between scripted faults: the next spare warms up meanwhile


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of a fault.

    Args:
        faults: the reports that it led to.
        note: what else is worth saying.
        wrong: what should not have been so; empty when all is well.
    """

    faults: Sequence[dict[str, Any]] = ()
    note: str = ""
    wrong: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row.

    Args:
        name: the fault.
        causes: what the report may call it, in the order of the reports; empty: no report is due.
        limit_s: from the last good sign to the first new step, at most.
        rank: the culprit; None: nobody, or any.
        script: kind and keys of an entry of `faults.inject`; its step and generation are filled in.
        act: does it and waits for the end of it; None: the script does it.
    """

    name: str
    causes: tuple[str, ...] = ("exit",)
    limit_s: float = 5.0
    rank: int | None = None
    script: tuple[str, dict[str, Any]] | None = None
    act: Callable[[Play], Seen] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Act:
    """Rows that one job goes through, one after the other; the scripted ones first.

    Args:
        name: of the act.
        rows: in order.
        steps: of the job: more than all rows take; it is ended after the last one.
        spares: that wait.
        sections: of the job file.
    """

    name: str
    rows: tuple[Row, ...]
    steps: int
    spares: int = 1
    sections: dict[str, Any] = field(default_factory=dict)

    def inject(self) -> list[dict[str, Any]]:
        """The entries of `faults.inject`: each row in the generation that the one before led to."""
        entries, generation, step = [], 1, 30
        for row in self.rows:
            if row.script is None:
                continue
            kind, keys = row.script
            at = step
            if keys.get("op") == "SAVE":
                at = -(-step // 10) * 10  # a checkpoint is due there
            entries.append({kind: {"rank": 1, **keys, "step": at, "generation": generation}})
            generation += bool(row.causes)
            step = at + GAP
        return entries


def _signal(rank: int, number: signal.Signals) -> Callable[[Play], Seen]:
    def act(play: Play) -> Seen:
        strike(play.worker(rank), number)
        return Seen(faults=play.next_faults())

    return act


def kill(op: str | None, *, rank: int = 1) -> Row:
    """A worker that kills itself before an operation."""
    return Row(
        name=f"kill -9 before {op or 'a step'}",
        rank=rank,
        script=("kill", {"op": op, "rank": rank}),
        limit_s=5.0,
    )


# --- rows that take more than a signal -----------------------------------------------------


def _two_at_once(play: Play) -> Seen:
    status = play.steady(steps=1)
    for worker in status["workers"]:
        strike(worker["pid"])
    return Seen(faults=play.next_faults())


def _killed_in_recovery(play: Play) -> Seen:
    """A second worker dies as soon as the next group forms."""
    status = play.steady(steps=1)
    strike(status["workers"][1]["pid"])
    play.until("recovering", lambda s: s["generation"] > status["generation"])
    strike(status["workers"][0]["pid"])
    return Seen(faults=play.next_faults(2))


def _agent(number: signal.Signals) -> Callable[[Play], Seen]:
    def act(play: Play) -> Seen:
        """The agent goes; then a worker is stopped, which only an agent can tell."""
        told = len(play.events("warning"))
        agent = play.actor("AgentActor")
        strike(agent, number)

        def is_replaced(_: object) -> bool:
            new = play.events("warning")[told:]
            return any("another one is started" in event["message"] for event in new)

        play.until("another agent", is_replaced)
        play.steady(steps=8)
        strike(play.worker(0), signal.SIGSTOP)
        return Seen(faults=play.next_faults(), note="then SIGSTOP of a worker")

    return act


def _spare(play: Play) -> Seen:
    workers = {worker["pid"] for worker in play.status["workers"]}
    (spare,) = set(play.actors("WorkerActor")) - workers
    strike(spare)
    play.steady(steps=8, spares=1)
    return Seen(note="another one is kept")


def _head(number: signal.Signals) -> Callable[[Play], Seen]:
    def act(play: Play) -> Seen:
        status = play.status
        strike(play.actor("HeadActor"), number)
        faults = play.next_faults()
        now = play.steady(steps=4)
        same = [w["pid"] for w in now["workers"]] == [w["pid"] for w in status["workers"]]
        wrong = "" if same else "workers did not go on"
        return Seen(faults=faults, note="workers go on", wrong=wrong)

    return act


def _head_in_recovery(play: Play) -> Seen:
    status = play.steady(steps=1)
    head = play.actor("HeadActor")
    strike(status["workers"][1]["pid"])
    play.until("recovering", lambda s: s["state"] == "recovering")
    strike(head)
    faults = play.next_faults(2)
    if faults[-1]["outcome"] != "interrupted":
        return Seen(faults=faults)
    # It died before it had formed the next group: the new head finds the dead worker anew.
    return Seen(
        faults=[faults[-1], *play.next_faults(1)],
        note="the new head adopts who lives and reports the dead worker again",
    )


def _bad_numbers(play: Play) -> Seen:
    play.until("bad numbers", lambda _: play.events("bad_numbers"))
    (event,) = play.events("bad_numbers")
    return Seen(note=str(event["what"]))


def _full_disk(play: Play) -> Seen:
    """Writes fail for a while: a checkpoint is told to have failed, a later one is whole."""
    play.until("a failed checkpoint", lambda _: play.events("checkpoint_failed"))
    failed = play.events("checkpoint_failed")[0]
    play.until("a later checkpoint", lambda s: s["checkpoint_step"] > failed["step"])
    return Seen(note=str(failed["reason"]))


def _preempted(play: Play) -> Seen:
    """SIGTERM is a notice; the machine goes a little later."""
    pid = play.worker(0)
    step = play.status["checkpoint_step"]
    strike(pid, signal.SIGTERM)
    status = play.until("a checkpoint", lambda s: s["checkpoint_step"] > step)
    strike(pid)
    faults = play.next_faults()
    wrong = "" if faults[0]["budget"] == "preemption" else f"counted as {faults[0]['budget']}"
    return Seen(faults=faults, note=f"saved at step {status['checkpoint_step']}", wrong=wrong)


KILLS = Act(
    name="a worker's process dies",
    rows=(
        *(kill(op) for op in ("F", "I", "W", "SEND_F", "RECV_F", "SEND_B", "REDUCE")),
        *(kill(op, rank=0) for op in ("EXCHANGE", "UPDATE", "SAVE", None)),
        Row(name="SIGSEGV", rank=0, act=_signal(0, signal.SIGSEGV)),
        Row(
            name="two workers at once (a stage and its mirror)", act=_two_at_once, limit_s=10.0
        ),
        Row(
            name="a second death while the next group forms",
            act=_killed_in_recovery,
            causes=("exit", "exit"),
            limit_s=10.0,
        ),
    ),
    steps=2000,
)
HANGS = Act(
    name="a worker hangs; numbers, links, disks",
    rows=(
        Row(
            name="hang inside F: heartbeats go on",
            causes=("stuck",),
            rank=1,
            limit_s=6.0,
            script=("hang", {"op": "F"}),
        ),
        Row(
            name="hang before a receive: all wait",
            causes=("stuck",),
            rank=1,
            limit_s=12.0,
            script=("hang", {"op": "RECV_F"}),
        ),
        Row(
            name="GIL held",
            causes=("held_gil",),
            rank=1,
            limit_s=6.0,
            script=("hold", {"op": "F"}),
        ),
        Row(
            name="links to peers break",
            causes=("peer",),
            limit_s=5.0,
            script=("cut", {"op": "SEND_F"}),
        ),
        Row(
            name="a bit of a gradient flips",
            causes=(),
            script=("flip", {"op": "REDUCE"}),
            act=_bad_numbers,
        ),
        Row(
            name="a worker's disk is full for 4 s",
            causes=(),
            script=("full_disk", {"op": "SAVE", "duration_s": 4.0}),
            act=_full_disk,
        ),
        Row(
            name="SIGSTOP",
            causes=("stopped",),
            rank=0,
            limit_s=6.0,
            act=_signal(0, signal.SIGSTOP),
        ),
        Row(
            name="agent killed",
            causes=("stopped",),
            rank=0,
            limit_s=6.0,
            act=_agent(signal.SIGKILL),
        ),
        Row(
            name="agent stopped",
            causes=("stopped",),
            rank=0,
            limit_s=6.0,
            act=_agent(signal.SIGSTOP),
        ),
        Row(name="spare killed", causes=(), act=_spare),
        Row(name="SIGTERM to a worker, on_preemption: go_on", rank=0, act=_preempted),
    ),
    steps=2000,
    sections={"faults": {"bad_step": "recompute", "on_preemption": "go_on"}},
)
HEADS = Act(
    name="the head",
    rows=(
        Row(name="head: kill -9", causes=("head",), limit_s=10.0, act=_head(signal.SIGKILL)),
        Row(name="head: SIGSTOP", causes=("head",), limit_s=10.0, act=_head(signal.SIGSTOP)),
        Row(
            name="head killed during a recovery",
            causes=("exit", "head"),
            limit_s=20.0,
            act=_head_in_recovery,
        ),
    ),
    steps=2000,
)
ACTS = (KILLS, HANGS, HEADS)


NOT_RUN = (
    Result(
        act="not run",
        name="clock set back or forward by an hour",
        not_run="would change the clock of the whole machine; intervals are monotonic throughout",
    ),
    Result(
        act="not run",
        name="out of memory",
        not_run="the kernel's killer would choose among all processes of the machine; its SIGKILL is a "
        "row above, its words are in tests/process/test_node_agent.py",
    ),
    Result(
        act="not run",
        name="a device at half speed, a slow link",
        not_run="stage boundaries do not move while training runs",
    ),
    Result(
        act="not run",
        name="Ray's head host restarted",
        not_run="its loss ends the job; see resume",
    ),
)
