"""Lets a job go on with fewer workers when no device can be had for a replacement."""

from __future__ import annotations

from collections.abc import Collection

from deepopt.errors import PlanError, WorkersLostError
from deepopt.head.ending import KILL_TIMEOUT_S, Ending
from deepopt.head.former import Former
from deepopt.head.generation import Generation
from deepopt.head.record import JobRecord
from deepopt.head.resize import without_place


class Shrinking:
    """Ends a group that waits for a device, and forms one that needs none.

    Args:
        record: of the job.
        former: forms the smaller group.
        ending: ends the job where no plan fits.
    """

    def __init__(self, record: JobRecord, *, former: Former, ending: Ending) -> None:
        self._record = record
        self._former = former
        self._ending = ending

    def begins(self, generation: Generation, *, now_s: float) -> bool:
        """Look whether a group waits in vain; whether it has been told to end.

        Args:
            generation: the group.
            now_s: the time.
        """
        if not self._record.has_run or generation.adopted:
            return False
        lost = without_place(generation, now_s=now_s, faults=self._record.job.faults)
        if lost:
            self._give_up(generation, lost)
        return bool(lost)

    def takes(self, generation: Generation, rank: int) -> bool:
        """Take the word that a rank's host is gone; whether the others go on without it."""
        faults = self._record.job.faults
        left = len(generation.members) - len(generation.unplaced | {rank})
        in_vain = self._record.has_run and not generation.adopted and faults.shrink != "never"
        if not in_vain or left < faults.min_workers:
            return False
        self._give_up(generation, [rank])
        return True

    def is_all(self, generation: Generation) -> bool:
        """Whether a group has ended for want of a device, and for no other reason."""
        return bool(generation.unplaced) and all(f.kind == "peer" for f in generation.failures)

    def finish(self, generation: Generation) -> None:
        """Go on with the workers that are left.

        Args:
            generation: the group that has ended.
        """
        self._do_without(generation, generation.unplaced, why="no device")

    def has_bad_places(self, generation: Generation) -> bool:
        """Whether a group has places whose device is lost again and again."""
        return bool(self._bad_ranks(generation))

    def can_leave_out(self, generation: Generation) -> bool:
        """Whether the job goes on without the places whose device is lost again and again."""
        faults, bad = self._record.job.faults, self._bad_ranks(generation)
        left = len(generation.members) - len(bad)
        return bool(bad) and faults.shrink != "never" and left >= faults.min_workers

    def leave_out(self, generation: Generation) -> None:
        """Go on without the places whose device is lost again and again.

        Args:
            generation: the group that has ended.
        """
        self._do_without(generation, self._bad_ranks(generation), why="no device that works")

    def _bad_ranks(self, generation: Generation) -> frozenset[int]:
        bad, places = self._record.bad_places, self._record.places
        return frozenset(
            m.sender.rank for m in generation.members if places[m.sender.rank] in bad
        )

    def _do_without(self, generation: Generation, ranks: Collection[int], *, why: str) -> None:
        record = self._record
        who = ", ".join(str(rank) for rank in sorted(ranks))
        left = [p for r, p in enumerate(record.places) if r not in ranks]
        why = f"{why} for rank {who}"
        try:
            self._former.shrink(left, reason=f"shrank to {len(left)} worker(s): {why}")
        except PlanError as problem:
            self._ending.failed(
                f"{why}, and no plan fits {len(left)} worker(s): {problem.message}",
                remedy="`deepopt resume` when there is a device again, or set faults.shrink to "
                "never to wait for it",
                exit_code=WorkersLostError.exit_code,
            )
            return
        reason = f"shrank to {record.plan.world_size} worker(s): {why}"
        if (fault := record.faults.open) is not None:
            fault.next += f"; {reason}"
            record.note("fault", fault=fault.to_json(record.plan))
        record.group.kill_all(timeout_s=KILL_TIMEOUT_S, but=generation.standings().keys())
        self._former.form(reason=reason, before=generation)

    def _give_up(self, generation: Generation, ranks: Collection[int]) -> None:
        """No device can be had for some ranks: end the group that waits for them."""
        now_s = self._record.clock.monotonic_s()
        generation.unplaced |= frozenset(ranks)
        if not generation.interrupted:
            generation.interrupted, generation.interrupted_s = True, now_s
            self._record.group.interrupt()
        if generation.settle_by_s is None:
            generation.settle_by_s = now_s + self._record.job.faults.survivor_timeout_s
