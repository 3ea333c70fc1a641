"""Which workers still live and get on: signs in, findings out; no clock and no process of its own.

Two signs are needed before a worker is given up. A missing heartbeat makes it *suspect*; what its host's
agent sees of its process is the second sign and says why: stopped by a signal, held by something that
keeps the GIL, waiting for a disk, or out of reach with its host. Without such a word a second, longer
deadline decides. A worker that speaks and does not get on is stuck; its peers then stand still as well,
waiting for it, so one of them is chosen: rather one inside a computation than one that waits.

Deadlines follow what is measured: the gaps between heartbeats, and the longest of the recent steps. Set-up
and first steps get the long ones, and a process that a debugger holds is left alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from deepopt.cluster.process_look import ProcessLook
from deepopt.config import FaultsConfig
from deepopt.schedule.ir import RECEIVE_OPS, Op
from deepopt.worker.messages import Heartbeat

SUSPECT_SHARE = 1 / 3  # of the timeout: time for a second sign before the worker is given up
SUSPECT_BEATS = 3  # missing heartbeats
STOPPED_BEATS = 2  # ... when the agent sees a stopped process
SUSPECT_GAPS = 2.0  # longest recent gaps between heartbeats: a busy machine is no reason
HELD_SHARE = (
    1.5  # of the time to become suspect, until a process that runs and is silent is lost
)
HOST_SHARE = 0.8  # of the timeout, where two processes of a host are silent, not one
WARM_UP_FACTOR = 3.0  # set-up and first steps import, compile, allocate, with the GIL held
STALLED_SHARE = 1 / 2  # of the timeout: peers of a stuck worker stop soon after it, or before
BUSY_FACTOR = 3.0  # a stuck operation that uses a CPU, or would if it had one, may only be slow
BUSY_CPU_SHARE = 0.1  # a process that only waits beats and listens: 1 to 2 %
BUSY_STATES = "RD"  # ready to run, however little it got; in a disk's or driver's hands
LEAVE_S = 3.0  # for a worker inside an operation to leave its group when told to
LEAVE_STEPS = (
    2.0  # ... or as many of the longest recent steps: no operation takes longer than one
)
PATIENT_STEPS = 200  # undisturbed steps after which earlier hangs stretch deadlines no more
NO_AGENT_FACTOR = 2.0  # nobody saw the process: a second deadline instead of a second sign
AGENT_FRESH_S = 1.25  # two of an agent's words: later, what it said of a process may be history
AGENT_SILENT_S = 2.0  # four of its words: it, its host or the link to it is gone
AGENT_RENEW_S = (
    5.0  # ... and where workers of its host are heard meanwhile, it is itself to blame
)
WARM_UP_STEPS = 2  # steps of a generation that say nothing about the next ones
STEADY_STEPS = 3  # further steps until deadlines follow them
STEPS_KEPT = 20
GAP_HALF_LIFE_S = 30.0  # in which a gap between heartbeats is half forgotten


class Cause(StrEnum):
    """Why a worker counts as lost."""

    EXIT = "exit"  # its process ended
    STOPPED = "stopped"  # by a signal: SIGSTOP, SIGTSTP
    HELD_GIL = "held_gil"  # its process runs, its Python does not: something keeps the GIL
    DISK = "disk"  # its process waits for a disk or a driver
    UNREACHABLE = "unreachable"  # neither it nor its host's agent is heard: host or network
    SILENT = "silent"  # no heartbeat, and nothing is known of its process
    STUCK = "stuck"  # it speaks, and an operation does not end
    COLLECTIVE = "collective"  # it speaks, and all wait for each other: no data moves
    SETUP = "setup"  # not ready in time
    ERROR = "error"  # its own error
    DEVICE = "device"  # its device is gone or broken
    PEER = "peer"  # a peer or a link failed
    HEAD = "head"  # the head's process ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadlines:
    """When a worker counts as lost; see `faults` of the job file.

    Args:
        heartbeat_timeout_s: silence, with nothing else known.
        step_timeout_s: longest time without progress in any case.
        heartbeat_s: between heartbeats.
        hang_after_s: shortest time without progress that counts.
        hang_steps: ... and as many of the longest recent steps.
    """

    heartbeat_timeout_s: float
    step_timeout_s: float
    heartbeat_s: float = 0.5
    hang_after_s: float = 2.0
    hang_steps: float = 5.0


def deadlines_of(faults: FaultsConfig) -> Deadlines:
    """The deadlines that a job file asks for."""
    return Deadlines(
        heartbeat_timeout_s=faults.heartbeat_timeout_s,
        step_timeout_s=faults.step_timeout_s,
        heartbeat_s=faults.heartbeat_s,
        hang_after_s=faults.hang_after_s,
        hang_steps=faults.hang_steps,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What is wrong with a worker.

    Args:
        rank: the worker.
        kind: `suspect`, `held` (by a debugger; it is left alone), `silent` or `stuck`; the last two
            are reasons to kill it.
        message: one line with the values.
        cause: why, as far as it is known.
        since_s: time of its last good sign.
    """

    rank: int
    kind: str
    message: str
    cause: Cause = Cause.SILENT
    since_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Signs:
    """The last signs of one worker.

    Args:
        heard_s: when it was last heard.
        moved_s: when it last got on.
        beat: its last heartbeat.
        suspect: whether it was found suspect and not heard since.
        held: whether it was found in a debugger's hands and not heard since.
        look: what its host's agent saw of its process; None before the first.
        looked_s: when that was.
    """

    heard_s: float
    moved_s: float
    beat: Heartbeat
    suspect: bool = False
    held: bool = False
    look: ProcessLook | None = None
    looked_s: float = 0.0

    def silent_look(self) -> ProcessLook | None:
        """The agent's last look, if it is newer than the last heartbeat."""
        return self.look if self.looked_s >= self.heard_s else None


class Liveness:
    """Signs of the workers of one generation; a worker is watched from its first heartbeat on.

    Args:
        deadlines: when a worker counts as lost.
    """

    def __init__(self, deadlines: Deadlines) -> None:
        self._deadlines = deadlines
        self._signs: dict[int, Signs] = {}
        self._released: set[int] = set()
        self._hosts: dict[int, str] = {}
        self._agents_s: dict[str, float] = {}
        self._gap_s = deadlines.heartbeat_s
        self._gap_at_s = 0.0
        self._steps = 0
        self._recent_s: deque[float] = deque(maxlen=STEPS_KEPT)
        self._patience = 1.0

    # --- signs ---------------------------------------------------------------------------

    def hear(self, beat: Heartbeat, *, now_s: float) -> None:
        """Take a heartbeat."""
        rank = beat.sender.rank
        if rank in self._released:
            return
        before = self._signs.get(rank)
        if before is None:
            self._signs[rank] = Signs(heard_s=now_s, moved_s=now_s, beat=beat)
            return
        self._note_gap(now_s - before.heard_s, now_s=now_s)
        if (before.beat.progress, before.beat.step) != (beat.progress, beat.step):
            before.moved_s = max(before.moved_s, now_s - beat.action_s)
        before.heard_s, before.beat = now_s, beat
        before.suspect = before.held = False

    def see(self, host: str, *, looks: Mapping[int, ProcessLook], now_s: float) -> None:
        """Take an agent's word.

        Args:
            host: whose agent.
            looks: what it saw of the workers there, by rank.
            now_s: the time.
        """
        self._agents_s[host] = now_s
        for rank, look in looks.items():
            self._hosts[rank] = host
            if (signs := self._signs.get(rank)) is not None:
                signs.look, signs.looked_s = look, now_s

    def note_step(self, step_s: float) -> None:
        """Take the duration of a step that all have done."""
        self._steps += 1
        if self.is_undisturbed:
            self._patience = 1.0
        if self._steps > WARM_UP_STEPS:
            self._recent_s.append(step_s)

    def begin_steps(self, *, now_s: float) -> None:
        """Count progress from now on: the set-up is over."""
        for signs in self._signs.values():
            signs.moved_s = now_s

    def be_patient(self, factor: float) -> None:
        """Stretch the deadlines of progress: killing for the same reason again does not help."""
        self._patience = factor

    def release(self, rank: int) -> None:
        """Watch a worker no longer: it has ended or failed."""
        self._released.add(rank)
        self._signs.pop(rank, None)

    def forgive(self, gap_s: float) -> None:
        """Move all signs forward: the head itself was not looking for that long."""
        for signs in self._signs.values():
            signs.heard_s += gap_s
            signs.moved_s += gap_s
            signs.looked_s += gap_s
        for host in self._agents_s:
            self._agents_s[host] += gap_s

    # --- questions -----------------------------------------------------------------------

    def last(self, rank: int) -> Heartbeat | None:
        """The last heartbeat of a worker; None before the first."""
        signs = self._signs.get(rank)
        return None if signs is None else signs.beat

    def age_s(self, rank: int, *, now_s: float) -> float | None:
        """Seconds since a worker was heard; None before the first heartbeat."""
        signs = self._signs.get(rank)
        return None if signs is None else max(0.0, now_s - signs.heard_s)

    def silent_agents(self, *, now_s: float) -> list[str]:
        """Hosts whose workers are heard and whose agent is not; each is told once in a while."""
        heard = {
            host
            for rank, host in self._hosts.items()
            if rank in self._signs and now_s - self._signs[rank].heard_s < AGENT_SILENT_S
        }
        silent = [h for h in sorted(heard) if now_s - self._agents_s[h] > AGENT_RENEW_S]
        for host in silent:
            self._agents_s[host] = now_s  # the next one gets as long
        return silent

    def stays(self, rank: int, *, told_s: float, now_s: float) -> bool:
        """Whether a worker should have left its group by now and has not: it hangs.

        Args:
            rank: one that has not told of leaving.
            told_s: when it was told to.
            now_s: the time.
        """
        signs = self._signs.get(rank)
        if signs is None or not signs.beat.action or not self.is_steady:
            return (
                False  # it may be reading data, or compiling: nobody knows how long that takes
            )
        if signs.look is not None and signs.look.is_traced:
            return False
        longest_s = max(self._recent_s)
        return now_s - told_s > max(
            LEAVE_S, LEAVE_STEPS * longest_s, SUSPECT_GAPS * self._gap_s
        )

    def suspects(self) -> tuple[int, ...]:
        """The workers that are suspect now."""
        return tuple(sorted(rank for rank, signs in self._signs.items() if signs.suspect))

    @property
    def is_undisturbed(self) -> bool:
        """Whether so many steps are done that hangs before them do not count any more."""
        return self._steps > PATIENT_STEPS

    @property
    def is_steady(self) -> bool:
        """Whether enough steps are done for deadlines to follow them."""
        return len(self._recent_s) >= STEADY_STEPS

    def explain(self, rank: int, *, now_s: float) -> tuple[Cause, str]:
        """Why a worker is silent, as far as it is known, and what its agent sees, in words."""
        signs = self._signs.get(rank)
        host = self._hosts.get(rank)
        if signs is None or host is None:
            return Cause.SILENT, ""
        if now_s - self._agents_s[host] > AGENT_SILENT_S:
            return Cause.UNREACHABLE, f"the agent on {host} is not heard either"
        look = signs.silent_look()
        if look is None:
            return Cause.SILENT, ""
        if look.is_stopped:
            return Cause.STOPPED, f"its process is {look.words()}"
        if look.state == "D":
            return Cause.DISK, f"its process is {look.words()}"
        if now_s - self._agents_s[host] > AGENT_FRESH_S:
            return Cause.SILENT, ""  # its host may be going: the next word, or none, will tell
        return Cause.HELD_GIL, f"its process is {look.words()}: something holds the GIL"

    def check(self, *, now_s: float, stepping: bool) -> list[Finding]:
        """What is wrong now; a suspect is told once, until it is heard again.

        Args:
            now_s: the time.
            stepping: whether progress is due, which is not so during the set-up.
        """
        found = [self._judge_silence(rank, now_s=now_s) for rank in sorted(self._signs)]
        findings = [finding for finding in found if finding is not None]
        # While one is silent the others may wait for it: its silence decides.
        quiet = any(signs.suspect or signs.held for signs in self._signs.values())
        if stepping and not quiet and not any(f.kind == "silent" for f in findings):
            findings += self._find_stuck(now_s)
        return findings

    # --- silence -------------------------------------------------------------------------

    def _note_gap(self, gap_s: float, *, now_s: float) -> None:
        faded = 0.5 ** (max(0.0, now_s - self._gap_at_s) / GAP_HALF_LIFE_S)
        self._gap_s = max(gap_s, self._gap_s * faded)
        self._gap_at_s = now_s

    def _suspect_s(self) -> float:
        timeout_s = self._deadlines.heartbeat_timeout_s
        beats_s = SUSPECT_BEATS * self._deadlines.heartbeat_s
        return min(timeout_s * SUSPECT_SHARE, max(beats_s, SUSPECT_GAPS * self._gap_s))

    def _silence_limit_s(self, cause: Cause) -> float:
        """Silence after which a worker is lost, by what is known of it."""
        timeout_s = self._deadlines.heartbeat_timeout_s
        if cause is Cause.STOPPED:
            return min(
                self._suspect_s(), max(STOPPED_BEATS * self._deadlines.heartbeat_s, self._gap_s)
            )
        if not self.is_steady:
            return timeout_s * WARM_UP_FACTOR
        if cause is Cause.HELD_GIL:
            return min(timeout_s, self._suspect_s() * HELD_SHARE)
        return timeout_s * HOST_SHARE if cause is Cause.UNREACHABLE else timeout_s

    def _judge_silence(self, rank: int, *, now_s: float) -> Finding | None:
        signs = self._signs[rank]
        silence_s = now_s - signs.heard_s
        look = signs.silent_look()
        if look is not None and look.is_traced:
            if signs.held or silence_s <= self._suspect_s():
                return None
            signs.held = True
            return Finding(
                rank=rank,
                kind="held",
                message=f"silent for {silence_s:.1f} s, {look.words()}: waiting for it",
                since_s=signs.heard_s,
            )
        cause, seen = self.explain(rank, now_s=now_s)
        limit_s = self._silence_limit_s(cause)
        name = "faults.heartbeat_timeout_s"
        why = f"; {seen}" if seen else ""
        if silence_s > limit_s:
            return Finding(
                rank=rank,
                kind="silent",
                cause=cause,
                message=f"no heartbeat for {silence_s:.1f} s{why} (deadline {limit_s:.2g} s, "
                f"{name} {self._deadlines.heartbeat_timeout_s:g})",
                since_s=signs.heard_s,
            )
        if silence_s > self._suspect_s() and not signs.suspect:
            signs.suspect = True
            return Finding(
                rank=rank,
                kind="suspect",
                cause=cause,
                message=f"no heartbeat for {silence_s:.1f} s{why} (deadline {limit_s:.2g} s, "
                f"{name} {self._deadlines.heartbeat_timeout_s:g})",
                since_s=signs.heard_s,
            )
        return None

    # --- progress ------------------------------------------------------------------------

    def _tight_s(self) -> float:
        """Time without progress that counts as a hang, from the recent steps."""
        deadlines = self._deadlines
        if not self.is_steady:
            return deadlines.step_timeout_s
        least_s = max(deadlines.hang_after_s, SUSPECT_GAPS * self._gap_s)
        wanted_s = max(least_s, deadlines.hang_steps * max(self._recent_s)) * self._patience
        return min(deadlines.step_timeout_s, wanted_s)

    def _progress_limit_s(self, rank: int, *, all_stand_still: bool) -> float:
        """Time without progress after which a worker is killed, by what it is doing."""
        signs, timeout_s, tight_s = (
            self._signs[rank],
            self._deadlines.step_timeout_s,
            self._tight_s(),
        )
        action = signs.beat.action
        if not action:
            return (
                timeout_s  # it reads data, copies a checkpoint, evaluates: as long as it takes
            )
        if _waits(action) and not all_stand_still:
            return timeout_s  # somebody works: it may be that one's turn
        if signs.look is None or signs.looked_s < signs.moved_s:
            return min(timeout_s, NO_AGENT_FACTOR * tight_s)
        slow = _is_busy(signs.look) and not _waits(action)
        return min(timeout_s, BUSY_FACTOR * tight_s if slow else tight_s)

    def _find_stuck(self, now_s: float) -> list[Finding]:
        still_s = {rank: now_s - signs.moved_s for rank, signs in self._signs.items()}
        share_s = self._tight_s() * STALLED_SHARE
        stalled = {rank: s for rank, s in still_s.items() if s > share_s}
        if not stalled:
            return []
        rank = choose_stuck((r, s, self._signs[r].beat.action) for r, s in stalled.items())
        signs = self._signs[rank]
        limit_s = self._progress_limit_s(rank, all_stand_still=len(stalled) == len(still_s))
        if still_s[rank] <= limit_s:
            return []
        action = signs.beat.action or "no action (between actions or steps)"
        seen = "" if signs.look is None else f"; its process is {signs.look.words()}"
        if limit_s < self._deadlines.step_timeout_s:
            why = (
                f"deadline {limit_s:.2g} s, from recent steps of up to "
                f"{max(self._recent_s):.2g} s and faults.hang_after_s "
                f"{self._deadlines.hang_after_s:g}"
            )
        else:
            why = f"faults.step_timeout_s {self._deadlines.step_timeout_s:g}"
        return [
            Finding(
                rank=rank,
                kind="stuck",
                cause=Cause.COLLECTIVE if _waits(signs.beat.action) else Cause.STUCK,
                message=f"no progress for {still_s[rank]:.1f} s in {action}{seen} ({why})",
                since_s=signs.moved_s,
            )
        ]


def _is_busy(look: ProcessLook) -> bool:
    return look.state in BUSY_STATES or (look.cpu_share or 0.0) > BUSY_CPU_SHARE


def _waits(action: str) -> bool:
    return any(op in action for op in (*RECEIVE_OPS, Op.REDUCE))


def choose_stuck(stalled: Iterable[tuple[int, float, str]]) -> int:
    """The worker that the others most likely wait for.

    Args:
        stalled: rank, seconds without progress, and action in work of each worker that stands
            still; at least one. An empty action is the end of a step or the loading of data.

    Returns:
        A worker inside a computation or a send before one between actions before one that waits;
        of several the one that stands still longest.
    """

    def waiting(action: str) -> int:
        if not action:
            return 1
        return 2 if _waits(action) else 0

    order = sorted((waiting(action), -still_s, rank) for rank, still_s, action in stalled)
    return order[0][2]
