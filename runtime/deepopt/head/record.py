"""The record: what the head knows of its job, and how it is written down and shown.

The one owner of the job's state. The head's other parts read and change it here and keep nothing of
it themselves; it decides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from deepopt.clock import Clock
from deepopt.cluster.group import WorkerGroup
from deepopt.config import JobConfig
from deepopt.errors import DeepoptError
from deepopt.head.board import Board
from deepopt.head.budgets import limits_of, spent_of
from deepopt.head.fault_log import FaultLog, faults_of
from deepopt.head.generation import Generation
from deepopt.head.journal import Journal, replay
from deepopt.head.load_forecast import LoadForecast
from deepopt.head.measures import Pace
from deepopt.head.prediction_report import load_prediction
from deepopt.head.resize import bad_places
from deepopt.head.state import JobState, advance
from deepopt.head.status import Identity, Progress, status_of
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry import events
from deepopt.worker.messages import WeightWork


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a job ended.

    Args:
        state: finished, stopped or failed.
        exit_code: of the whole job.
    """

    state: JobState
    exit_code: int


class JobRecord:
    """One launch of one job.

    Args:
        run: the run directory.
        job: the resolved job.
        skeleton: the model.
        plan: who holds which layers.
        identity: the job's id, name, last step and supervisor.
        group: starts and kills workers.
        journal: decisions; its entries say how far earlier launches came.
        board: files for people.
        clock: the time.

    Attributes:
        number: of the newest generation.
        error: what ended the job badly, as `status.error_of` makes it.
        tokens_seen: tokens trained on by step, of the last ones; None where unknown.
        data_fingerprint: of the data that the job began with.
        wanted: the plan with all workers.
        places: index of the place of each rank of `plan`.
        last_plan_id: of the newest plan.
        shrunk_s: when the job shrank, on the head's monotonic clock.
        lost_devices_s: when each place lost its device, by generation, on that clock.
        weight_ways: how weight gradients are computed, as workers found it out, by the conditions of their
            trials and by the layer's name.
    """

    def __init__(
        self,
        *,
        run: RunDirectory,
        job: JobConfig,
        skeleton: ModelSkeleton,
        plan: Plan,
        identity: Identity,
        group: WorkerGroup,
        journal: Journal,
        board: Board,
        clock: Clock,
    ) -> None:
        self.run = run
        self.job = job
        self.skeleton = skeleton
        self.plan = plan
        self.identity = identity
        self.group = group
        self.journal = journal
        self.board = board
        self.clock = clock
        self.progress = Progress()
        self.pace = Pace()
        self.load_forecast = LoadForecast()
        self.prediction = load_prediction(run, plan)
        self.generation: Generation | None = None
        self.state = JobState.STARTING
        self.outcome: Outcome | None = None
        history = replay(journal.entries)
        self.number = history.generation
        earlier = faults_of(history.faults)
        self.faults = FaultLog(earlier)
        self.spent = spent_of(
            [fault for fault in earlier if fault["number"] in history.counting],
            now_s=clock.monotonic_s(),
        )
        self.limits = limits_of(job.faults)
        self.wanted = plan
        self.places = tuple(range(plan.world_size))
        self.last_plan_id = max(plan.plan_id, history.plan_id)
        self.shrunk_s: list[float] = []
        self.lost_devices_s: dict[int, dict[int, float]] = {}
        self.error: dict[str, Any] | None = None
        self.tokens_seen: dict[int, int | None] = {0: 0}
        self.data_fingerprint: str | None = None
        self.weight_ways = {c: dict(ways) for c, ways in history.weight_ways.items()}

    @property
    def next_generation(self) -> int:
        """The number that the next worker group will have."""
        return self.number + 1

    @property
    def missing_places(self) -> tuple[int, ...]:
        """Places of the full job that have no worker and may have one."""
        taken = {*self.places, *self.bad_places}
        return tuple(p for p in range(self.wanted.world_size) if p not in taken)

    @property
    def bad_places(self) -> frozenset[int]:
        """Places whose device was lost again and again."""
        now_s, window_s = self.clock.monotonic_s(), self.limits.window_s
        lost_s = {place: [*times.values()] for place, times in self.lost_devices_s.items()}
        return bad_places(lost_s, now_s=now_s, window_s=window_s)

    @property
    def has_run(self) -> bool:
        """Whether a group forms in the place of another one, so that it may do with fewer places."""
        return self.faults.open is not None or bool(self.shrunk_s)

    def learn_ways(self, message: WeightWork) -> None:
        """Keep what a worker found out of weight gradients, for those that take places later, in a later
        launch too."""
        known = self.weight_ways.setdefault(message.conditions, {})
        news = {name: v for name, v in message.ways.items() if known.get(name) != v}
        if news:
            known.update(news)
            told = {name: verdict.to_json() for name, verdict in news.items()}
            self.note("weight_work", conditions=message.conditions, ways=told)

    def take_plan(self, plan: Plan, *, places: tuple[int, ...]) -> None:
        """Go on by another plan: what was measured and predicted of the one before is of no use.

        Args:
            plan: journaled.
            places: index of each rank's place.
        """
        self.plan, self.places = plan, places
        self.last_plan_id = max(self.last_plan_id, plan.plan_id)
        self.pace = Pace()
        self.prediction = load_prediction(self.run, plan)

    def lose_device(self, place: int) -> None:
        """Take note, for later heads too, that a place has lost its device in this generation."""
        known = self.lost_devices_s.setdefault(place, {})
        if self.number not in known:  # else told once more, to a head that has taken over
            known[self.number] = self.clock.monotonic_s()
            self.note("device_lost", place=place, generation=self.number)

    def recall_size(self) -> None:
        """Take the plan, the size and the bad places that the job had under the head before this one."""
        history = replay(self.journal.entries)
        if history.wanted is not None:
            self.wanted = Plan.from_json(history.wanted)
        if history.plan is not None:
            plan = Plan.from_json(history.plan)
            self.take_plan(plan, places=history.places or tuple(range(plan.world_size)))
        now, now_s = datetime.now(tz=UTC), self.clock.monotonic_s()

        def here_s(time: str) -> float:
            return now_s - max(0.0, (now - datetime.fromisoformat(time)).total_seconds())

        self.shrunk_s = [here_s(time) for time in history.shrunk]
        self.lost_devices_s = {
            place: {generation: here_s(time) for generation, time in times.items()}
            for place, times in history.lost_devices.items()
        }

    def close_fault(self, outcome: str) -> None:
        """Write down how the open fault ended, if there is one."""
        is_judged = self.faults.open is not None and self.faults.open.is_judged
        closed = self.faults.close(outcome, plan=self.plan)
        if closed is not None and is_judged:
            self.note("recovered", fault=closed)
            self.board.tell(events.FaultOver(fault=closed))

    def move(self, state: JobState, *, reason: str = "") -> None:
        """Go to another state: journaled and told."""
        previous, self.state = self.state, advance(self.state, state)
        self.note("state", state=str(state))
        self.announce(previous, reason=reason)

    def announce(self, previous: JobState, *, reason: str) -> None:
        """Tell people of the state that the job is in now."""
        self.board.tell(
            events.StateChanged(state=str(self.state), previous=str(previous), reason=reason)
        )
        self.show(force=True)

    def note(self, kind: str, **fields: Any) -> None:
        """Journal what a resume can do without: a full disk does not stop training."""
        try:
            self.journal.append(kind, **fields)
        except DeepoptError as error:
            self.warn(error.message)

    def warn(self, message: str) -> None:
        """Tell people of something that they may want to look at."""
        self.board.tell(events.Warned(message=message))

    def show(self, *, force: bool = False) -> None:
        """Bring the status file up to date, at most twice a second unless `force`."""
        now_s = self.clock.monotonic_s()

        def status() -> dict[str, Any]:
            return status_of(
                self.identity,
                state=self.state,
                plan=self.plan,
                progress=self.progress,
                generation=self.generation,
                exit_code=None if self.outcome is None else self.outcome.exit_code,
                error=self.error,
                faults=self.faults.to_json(self.plan),
                now_s=now_s,
                warm_spares=self.group.warm_spares,
                workers_wanted=self.wanted.world_size,
            )

        self.board.show(status, now_s=now_s, force=force)
