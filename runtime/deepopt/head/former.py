"""Forms worker groups: says who is in, where it begins, and has it started."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import replace

from deepopt.checkpoint import folders
from deepopt.checkpoint.store import CheckpointStore
from deepopt.checkpoint.verification import Found
from deepopt.errors import RunDirectoryError
from deepopt.head.closing_report import shared_cores
from deepopt.head.commits import Committer, Origin
from deepopt.head.formation import (
    Start,
    choose_start,
    is_checkpoint_due,
    make_assignments,
    open_generation,
)
from deepopt.head.generation import Generation
from deepopt.head.record import JobRecord
from deepopt.head.resize import places_for, plan_for
from deepopt.head.survivors import restore
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.orders import known_orders, write_orders
from deepopt.planner.plan import Plan
from deepopt.run_directory import RunDirectory
from deepopt.telemetry import events
from deepopt.telemetry.files import read_json, write_json_atomic
from deepopt.worker.messages import InPlace, Standing


class Former:
    """Forms one generation after the other.

    Args:
        record: of the job.
        store: checkpoints.
        store_address: IP address and port of the rendezvous store.
        executor: runs commits, one at a time.
        new_incarnation: makes a fresh uuid.

    Attributes:
        hangs: workers killed for want of progress: the next deadlines are longer.
    """

    def __init__(
        self,
        record: JobRecord,
        *,
        store: CheckpointStore,
        store_address: tuple[str, int],
        executor: Executor,
        new_incarnation: Callable[[], str],
    ) -> None:
        self._record = record
        self._store = store
        self._store_address = store_address
        self._executor = executor
        self.new_incarnation = new_incarnation
        self._formed_places: tuple[int, ...] = record.places
        self.hangs = 0

    def form(self, *, reason: str, before: Generation | None = None) -> None:
        """Form the next generation, of what lives on of the one before.

        It goes on from what its workers have; where that is not enough, from the newest verified
        checkpoint.
        """
        number, plan = self._record.next_generation, self._record.plan
        places, kept = self._record.places, {}
        if before is not None:
            found, old = before.standings(), self._formed_places
            ranks = {old[rank]: rank for rank in found}
            kept = {new: ranks[place] for new, place in enumerate(places) if place in ranks}
            standings = {new: found[rank] for new, rank in kept.items()}
        else:
            standings = {}
        self._record.group.prepare(number, places=places, kept=kept)
        self._store.sweep(number)
        start = self._find_start(standings)
        self._record.journal.append(
            "generation",
            generation=number,
            plan_id=plan.plan_id,
            start_step=start.step,
            checkpoint=start.checkpoint,
            source=start.source,
        )
        self._record.number = number
        self._formed_places = places
        self._record.generation = generation = open_generation(
            number,
            plan=plan,
            job=self._record.job,
            job_id=self._record.identity.job_id,
            skeleton_fingerprint=self._record.skeleton.fingerprint(),
            start=start,
            now_s=self._record.clock.monotonic_s(),
            incarnations=[
                before.members[kept[rank]].sender.incarnation
                if before is not None and rank in kept
                else self.new_incarnation()
                for rank in range(plan.world_size)
            ],
            make_committer=self.make_committer,
        )
        self._record.board.tell(
            events.GenerationFormed(
                generation=number,
                plan_id=plan.plan_id,
                num_workers=plan.world_size,
                start_step=start.step,
                checkpoint=start.checkpoint,
                reason=reason,
                source=start.source,
                kept=tuple(sorted(standings)),
            )
        )
        generation.liveness.be_patient(2.0**self.hangs)
        if (fault := self._record.faults.open) is not None:
            fault.start_step = start.step
            fault.source = start.source
        self._record.group.launch(
            make_assignments(
                generation,
                start=start,
                job=self._record.job,
                run_dir=str(self._record.run.root),
                store_address=self._store_address,
                last_step=self._record.identity.last_step,
                known_ways={d: dict(ways) for d, ways in self._record.weight_ways.items()},
            )
        )
        self._record.show(force=True)

    def adopted(self) -> None:
        """Take note that the group of an earlier head goes on, at the places that it has."""
        self._formed_places = self._record.places

    def shrink(self, places: Sequence[int], *, reason: str, is_loss: bool = True) -> None:
        """Decide on a plan for the places that are left; the next generation works by it.

        Args:
            places: that have a process or can have one.
            reason: why, in words.
            is_loss: whether there are fewer than before.

        Raises:
            PlanError: no plan fits.
        """
        record = self._record
        members = [] if record.generation is None else record.generation.members
        ready = [(m.ready.device, m.host) for m in members if m.ready is not None]
        planned = plan_for(
            record.job,
            record.skeleton,
            wanted=record.wanted,
            available=len(places),
            plan_id=record.last_plan_id + 1,
            costs=_known_costs(record.run),
            cores=shared_cores(
                [d for d, _ in ready],
                [h for _, h in ready],
                threads=record.job.worker.threads,
            )
            if ready
            else None,
            known=known_orders(record.run.schedules),
        )
        write_orders(record.run.schedules, orders=planned.orders)
        self._take(planned.plan, there=places, reason=reason, shrunk=is_loss)

    def grow(self, places: Sequence[int], *, reason: str) -> None:
        """Decide on a plan for more places: that of the launch where all are there.

        Args:
            places: that have a process.
            reason: why, in words.

        Raises:
            PlanError: no plan fits.
        """
        record = self._record
        if len(places) < record.wanted.world_size:
            self.shrink(places, reason=reason, is_loss=False)
            return
        plan = replace(record.wanted, plan_id=record.last_plan_id + 1)
        self._take(plan, there=places, reason=reason, shrunk=False)

    def _take(self, plan: Plan, *, there: Sequence[int], reason: str, shrunk: bool) -> None:
        record = self._record
        places = places_for(plan, of_wanted=record.wanted.world_size, there=there)
        record.journal.append(
            "plan",
            plan_id=plan.plan_id,
            fingerprint=plan.fingerprint(),
            plan=plan.to_json(),
            places=list(places),
            shrunk=shrunk,
            reason=reason,
        )
        record.take_plan(plan, places=places)
        if shrunk:
            record.shrunk_s.append(record.clock.monotonic_s())
        try:
            write_json_atomic(record.run.plan, plan.to_json(), durable=True)
        except OSError as error:  # the journal has it
            record.warn(f"cannot write {record.run.plan}: {error}")
        record.board.tell(
            events.Resized(
                plan_id=plan.plan_id,
                num_workers=plan.world_size,
                wanted=record.wanted.world_size,
                reason=reason,
            )
        )

    def _find_start(self, standings: Mapping[int, Standing]) -> Start:
        """Where the next generation goes on: from what survivors have, else from a checkpoint."""
        restoration = restore(self._record.plan, survivors=standings)
        progress = self._record.progress
        if restoration is None:
            return self._start_from(self._find_checkpoint())
        step = restoration.step
        if step < progress.checkpoint_step:  # of copies in memory; the disk has a newer one
            found = self._find_checkpoint()
            if found is not None and found.manifest.step > step:
                return self._start_from(found)
        due = is_checkpoint_due(
            step, job=self._record.job, last_step=self._record.identity.last_step
        )
        start = Start(
            step=step,
            checkpoint=progress.checkpoint_path,
            tokens_seen=self._record.tokens_seen.get(step),
            source=restoration.source,
            in_place=InPlace(
                previous_generation=self._record.number,
                transfers=restoration.transfers,
                report=step > progress.reported,
                save=due and step != progress.checkpoint_step,
            ),
        )
        progress.step = step
        return start

    def _find_checkpoint(self) -> Found | None:
        """The newest verified checkpoint; those that were passed over are named."""
        found = self._store.newest_verified(self._record.skeleton.fingerprint())
        for rejected in () if found is None else found.rejected:
            folder = folders.parse(rejected.path)
            self._record.board.tell(
                events.CheckpointWasNotWritten(
                    step=0 if folder is None else folder.step, reason=rejected.reason
                )
            )
        return found

    def _start_from(self, found: Found | None) -> Start:
        """From a checkpoint; None: from the seed."""
        start = choose_start(
            found, plan=self._record.plan, last_step=self._record.identity.last_step
        )
        progress = self._record.progress
        progress.step = progress.reported = progress.checkpoint_step = start.step
        self._record.progress.checkpoint_path = start.checkpoint
        self._record.tokens_seen = {start.step: start.tokens_seen}
        self._record.data_fingerprint = start.data_fingerprint or self._record.data_fingerprint
        return start

    def make_committer(self, origin: Origin) -> Committer:
        """Make what commits the checkpoints of a generation."""
        return Committer(
            self._store,
            executor=self._executor,
            origin=origin,
            tokens_seen=self._record.tokens_seen.get,
        )


def _known_costs(run: RunDirectory) -> LayerCosts | None:
    """The costs that the launch planned with, measured where it could; None: nobody kept them."""
    try:
        return LayerCosts.from_json(read_json(run.costs))
    except (RunDirectoryError, KeyError, TypeError, ValueError):
        return None
