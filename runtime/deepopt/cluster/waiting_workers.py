"""Processes that wait for a place: spares, which take that of a worker that is lost, and seekers, one for
each place without a device, which start when there is one again.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection
from typing import Any

from deepopt.cluster.group import HeadEvent, PlaceFound, SpareGone
from deepopt.cluster.slots import Slots
from deepopt.cluster.worker_process import WorkerProcess, when_answered
from deepopt.cluster.worker_starter import WorkerStarter
from deepopt.run_directory import RunDirectory
from deepopt.worker.adopted import Whereabouts

logger = logging.getLogger(__name__)


_SPARE_TRIES = 3  # that fail in a row, each of seconds of CPU and a model's memory


class WaitingWorkers:
    """The waiting processes of a job.

    Args:
        starter: starts them.
        slots: where workers may run.
        run: the run directory.
        tell: takes events, from any thread.
        warm_up: has an actor get everything ready; gives the reference of the call.
    """

    def __init__(
        self,
        starter: WorkerStarter,
        *,
        slots: Slots,
        run: RunDirectory,
        tell: Callable[[HeadEvent], None],
        warm_up: Callable[[Any], Any],
    ) -> None:
        self._starter = starter
        self._slots = slots
        self._run = run
        self._tell = tell
        self._warm_up = warm_up
        # Ray tells of an end in a thread of its own, also while this very process is given a place.
        self._lock = threading.Lock()  # for the next two, and for `waits` of those in them
        self._spares: list[WorkerProcess] = []
        self._seekers: dict[int, WorkerProcess] = {}  # by place
        self._num_made = 0
        self._spares_failed = 0  # in a row, and since `try_again`

    @property
    def num_warm_spares(self) -> int:
        """Spares that can take a place at once."""
        return sum(spare.warm for spare in list(self._spares))

    def keep_spares(self, count: int, *, is_first: bool) -> None:
        """Begin to start spares, until there are so many; none where the last ones could not even start.

        Args:
            count: so many.
            is_first: as for `WorkerStarter.start_worker`.
        """
        while len(self._spares) < count and self._spares_failed < _SPARE_TRIES:
            self._start_spare(is_first=is_first)

    def try_again(self) -> None:
        """Have spares started again, where the last ones could not."""
        self._spares_failed = 0

    def seek(self, places: Collection[int], *, is_first: bool) -> None:
        """Have a seeker at each of some places, and nowhere else.

        Args:
            places: indices.
            is_first: as for `WorkerStarter.start_worker`.
        """
        with self._lock:
            gone = [self._seekers.pop(place) for place in self._seekers.keys() - set(places)]
        for seeker in gone:
            seeker.kill()
        for place in places:
            if place not in self._seekers:
                self._start_seeker(place, is_first=is_first)

    def take(self, place: int) -> WorkerProcess | None:
        """A process for a place, which waits no more; None where none fits.

        Args:
            place: index of the place.
        """
        return self._take_seeker(place) or self._take_spare(place)

    def give_up(self) -> list[WorkerProcess]:
        """All that wait, for the caller to end: nobody waits any more."""
        with self._lock:
            waiting = [*self._spares, *self._seekers.values()]
            self._spares, self._seekers = [], {}
        return waiting

    def _start_spare(self, *, is_first: bool) -> None:
        number = self._next_number()
        place = number % len(self._slots.places)  # all hosts in turn
        log = self._run.spare_log(number)
        spare = WorkerProcess(
            actor=self._starter.start_spare(place, log=log, is_first=is_first), waits=True
        )
        with self._lock:
            self._spares.append(spare)

        def is_gone(error: BaseException) -> None:
            with self._lock:
                if not spare.waits:
                    return  # it is a worker by now: its work tells of its end
                spare.ended = True  # who kills one without a process waits for this
                if spare not in self._spares:
                    return
                self._spares.remove(spare)
                if not spare.warm:
                    self._spares_failed += 1
                given_up = not spare.warm and self._spares_failed == _SPARE_TRIES
            logger.warning("a spare is gone: %s", error)
            if spare.warm:
                self._tell(SpareGone())
            elif given_up:
                self._tell(
                    SpareGone(
                        given_up=f"{_SPARE_TRIES} spares in a row ended before they were ready; none is "
                        f"started before the next group forms; the last one's log is {log}"
                    )
                )

        def is_up(found: Whereabouts) -> None:
            spare.note(found, head_node_id=self._slots.head_node_id)

        def is_warm(_: None) -> None:
            spare.warm = True
            self._spares_failed = 0

        self._ask(spare, spare.actor.whereabouts.remote(), is_up, is_gone)
        # An idle process that dies is told of by nothing but a call that is pending with it.
        self._ask(spare, spare.actor.stay.remote(), lambda _: None, is_gone)
        self._ask(spare, self._warm_up(spare.actor), is_warm, is_gone)

    def _start_seeker(self, place: int, *, is_first: bool) -> None:
        log = self._run.spare_log(self._next_number())
        seeker = WorkerProcess(
            actor=self._starter.start_seeker(place, log=log, is_first=is_first),
            place=place,
            waits=True,
        )
        with self._lock:
            self._seekers[place] = seeker

        def is_gone(error: BaseException) -> None:
            with self._lock:
                if not seeker.waits:
                    return
                seeker.ended = True
                if self._seekers.get(place) is not seeker:
                    return
                del self._seekers[place]
            logger.info("nothing at place %d: %s", place, str(error).strip())
            self._tell(PlaceFound(place=place, is_there=False))

        def is_up(found: Whereabouts) -> None:
            seeker.note(found, head_node_id=self._slots.head_node_id)
            self._starter.note_gpus(place, found.gpus)

        def is_warm(_: None) -> None:
            seeker.warm = True
            if self._seekers.get(place) is seeker:
                self._tell(PlaceFound(place=place, is_there=True))

        self._ask(seeker, seeker.actor.whereabouts.remote(), is_up, is_gone)
        self._ask(seeker, self._warm_up(seeker.actor), is_warm, is_gone)

    def _next_number(self) -> int:
        self._num_made += 1
        return self._num_made - 1

    def _ask(
        self,
        process: WorkerProcess,
        reference: Any,
        done: Callable[[Any], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        process.references.append(reference)
        when_answered(reference, done=done, failed=failed)

    def _take_seeker(self, place: int) -> WorkerProcess | None:
        """The process that waits at a place; None while it has no device."""
        with self._lock:
            seeker = self._seekers.get(place)
            if seeker is None or not seeker.pid:
                return None
            seeker.waits = False
            del self._seekers[place]
        return seeker

    def _take_spare(self, place: int) -> WorkerProcess | None:
        """A spare for a place, the readiest; on the host of its GPU, if it has one."""
        host = self._slots.places[place].node_id
        with self._lock:
            fitting = [
                spare
                for spare in self._spares
                if host is None or spare.node_id == host or not self._slots.use_gpus
            ]
            if not fitting:
                return None
            spare = min(fitting, key=lambda s: (not s.warm, not s.pid))
            spare.waits = False
            self._spares.remove(spare)
        spare.place = place
        self._starter.give_gpus(place, spare.actor)
        return spare
