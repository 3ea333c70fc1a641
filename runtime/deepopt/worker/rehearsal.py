"""A few steps of a plan in processes of this host, without Ray, head and run directory.

What a worker does in a step is all real: processes, gloo, executor, autograd, update. One group of
processes can hold several plans and run them in turns, so that they are compared under the same
conditions. Plans of one group exchange tensors of one shape.

    with RehearsalGroup(4) as group:
        group.load("a", job=job, plan=plan)
        print(group.run("a", num_steps=5).step_s)
"""

from __future__ import annotations

import copy
import multiprocessing
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.errors import DeepoptError, TrainingError, TransportError, WorkersLostError
from deepopt.pipeline.emulated_clock import Overruns
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.spans import Span
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.transport import Transport
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import COMPUTE_OPS, Schedule
from deepopt.worker.rendezvous import StoreServer, serve_store, transport_of_group

_LOOPBACK = "127.0.0.1"
_GOODBYE_S = 10.0  # for a process to end by itself

# Children are forked from a server that has imported torch but never ran it.
_context = multiprocessing.get_context("forkserver")


def stand_in(job: JobConfig, *, num_layers: int) -> JobConfig:
    """A job with the costs and sizes of another, on emulated devices, with next to no arithmetic.

    Args:
        job: gives micro-batches, groups, schedule and the `emulation` section.
        num_layers: of its model.
    """
    fields = job.model_dump(by_alias=True)
    fields["model"] = {
        "factory": "deepopt.models.stand_in:build",
        "kwargs": {"num_layers": num_layers},
    }
    fields["data"] = {"dataset": "deepopt.models.stand_in:batches", "sequence_length": 1}
    fields["training"]["microbatch_size"] = 1
    fields["precision"] = {}
    fields["worker"]["device"] = "emulated"
    return JobConfig.model_validate(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSteps:
    """What one rank did in a run of several steps.

    Args:
        began_s: start of the first step, on the monotonic clock of the host.
        ended_s: end of each step, on the same clock.
        spans: of the last step.
        losses: of each step.
        num_ran_ahead: steps that were begun before the one before was agreed on.
        num_rolled_back: those of them that were taken back.
        overruns: of this run; None where the device is real.
    """

    began_s: float
    ended_s: tuple[float, ...]
    spans: tuple[Span, ...]
    losses: tuple[float, ...]
    num_ran_ahead: int
    num_rolled_back: int
    overruns: Overruns | None

    @property
    def busy_s(self) -> float:
        """Time on the device in the last step."""
        return sum(s.busy_ns for s in self.spans if s.action.op in COMPUTE_OPS) * 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Rehearsed:
    """What all ranks did in a run of several steps.

    Args:
        ranks: by rank.
    """

    ranks: tuple[RankSteps, ...]

    @property
    def step_s(self) -> tuple[float, ...]:
        """From the end of the step before on the last rank to the end of each, in seconds."""
        ends = [max(moments) for moments in zip(*(r.ended_s for r in self.ranks), strict=True)]
        begins = [max(rank.began_s for rank in self.ranks), *ends]
        return tuple(end - begin for begin, end in zip(begins, ends, strict=False))

    @property
    def overruns(self) -> Overruns:
        """Of all emulated devices together."""
        all_ranks = [rank.overruns for rank in self.ranks if rank.overruns is not None]
        return Overruns(
            num_operations=sum(one.num_operations for one in all_ranks),
            num_overran=sum(one.num_overran for one in all_ranks),
            late_s=sum(one.late_s for one in all_ranks),
        )


class Rehearsable(Protocol):
    """One rank's part of something that runs in steps."""

    def run(self, num_steps: int) -> RankSteps:
        """Run some steps more; all ranks do at the same time."""
        ...


class RehearsalGroup:
    """Processes that hold plans and run steps of them; a context manager.

    Args:
        num_ranks: processes.
        make: called in each process with (rank, transport) and what `load` is given by keyword.
        timeout_s: longest wait for a plan to be loaded and for a run.
        threads: CPU threads of each.
    """

    def __init__(
        self,
        num_ranks: int,
        *,
        make: Callable[..., Rehearsable] | None = None,
        timeout_s: float = 120.0,
        threads: int = 1,
    ) -> None:
        self._num_ranks = num_ranks
        self._make = make or RankPlan
        self._timeout_s = timeout_s
        self._threads = threads
        self._store: StoreServer | None = None
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Self:
        """Start the processes."""
        _context.set_forkserver_preload([__name__])
        self._store = serve_store(_LOOPBACK)
        for rank in range(self._num_ranks):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_serve,
                args=(rank, self._num_ranks, self._store.port, theirs),
                kwargs={
                    "make": self._make,
                    "timeout_s": self._timeout_s,
                    "threads": self._threads,
                },
                daemon=True,
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End them: gently after a good end, at once after a bad one."""
        for pipe in self._pipes:
            pipe.close()  # a process that waits for its next request ends
        deadline = time.monotonic() + (_GOODBYE_S if error is None else 0.0)
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()

    def load(self, name: str, **arguments: object) -> None:
        """Make one more thing to run in all processes.

        Args:
            name: by which `run` finds it.
            arguments: of `RankPlan`, or of the group's own `make`.

        Raises:
            DeepoptError: it cannot be built.
        """
        self._ask(("load", name, arguments))

    def run(self, name: str, *, num_steps: int) -> Rehearsed:
        """Train some steps more.

        Args:
            name: of a loaded plan.
            num_steps: at least 1.

        Raises:
            DeepoptError: a step failed.
        """
        return Rehearsed(ranks=tuple(self._ask(("run", name, num_steps))))

    def _ask(self, request: tuple[object, ...]) -> list[Any]:
        for rank, pipe in enumerate(self._pipes):
            try:
                pipe.send(request)
            except OSError:
                raise self._death(rank) from None
        answers: dict[int, Any] = {}
        victim: TransportError | None = None
        deadline = time.monotonic() + self._timeout_s
        while len(answers) < self._num_ranks:
            waited_for = {p: r for r, p in enumerate(self._pipes) if r not in answers}
            ready = wait(list(waited_for), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                raise WorkersLostError(
                    f"rank {min(waited_for.values())} of the rehearsal did not answer in "
                    f"{self._timeout_s:.0f} s"
                )
            for pipe, rank in waited_for.items():
                if pipe not in ready:
                    continue
                try:
                    answers[rank] = pipe.recv()
                except EOFError:
                    raise self._death(rank) from None
                if isinstance(answers[rank], TransportError):
                    victim = victim or answers[rank]
                elif isinstance(answers[rank], DeepoptError):
                    raise answers[rank]
        if victim is not None:
            raise victim
        return [answers[rank] for rank in range(self._num_ranks)]

    def _death(self, rank: int) -> WorkersLostError:
        self._processes[rank].join(_GOODBYE_S)
        code = self._processes[rank].exitcode
        return WorkersLostError(f"rank {rank} of the rehearsal died with exit code {code}")


def _serve(
    rank: int,
    num_ranks: int,
    port: int,
    pipe: Connection,
    *,
    make: Callable[..., Rehearsable],
    timeout_s: float,
    threads: int,
) -> None:
    """A process of the group: answers requests until nobody asks any more."""
    torch.set_num_threads(threads)
    transport: Transport | None = None
    loaded: dict[str, Rehearsable] = {}
    while True:
        try:
            kind, name, argument = pipe.recv()
        except (EOFError, ConnectionResetError):  # its owner has ended
            break
        answer: object = None
        try:
            if transport is None:
                transport = _join(rank, num_ranks, port, timeout_s)
            if kind == "load":
                loaded[name] = make(rank, transport, **argument)
            else:
                answer = loaded[name].run(argument)
        except DeepoptError as error:
            answer = error
        except Exception as error:  # noqa: BLE001 - the process's edge, and it reports
            trace = "".join(traceback.format_exception(error))
            answer = TrainingError(f"rank {rank} of the rehearsal failed:\n{trace}")
        pipe.send(answer)
    if transport is not None:
        transport.close()


def _join(rank: int, num_ranks: int, port: int, timeout_s: float) -> Transport:
    if num_ranks == 1:
        return LoneTransport()
    transport = transport_of_group(
        rank=rank,
        world_size=num_ranks,
        device=torch.device("cpu"),
        timeout_s=timeout_s,
        form_timeout_s=timeout_s,
    )
    store = PrefixStore("rehearsal", TCPStore(_LOOPBACK, port, is_master=False))
    transport.join(store, generation=1)
    return transport


class RankPlan:
    """A plan's part on one rank.

    Args:
        rank: in the world.
        transport: to the other ranks.
        job: the resolved job.
        plan: for as many ranks as there are.
        schedules: the order of each replica; None: the plan names a builder's.
    """

    def __init__(
        self,
        rank: int,
        transport: Transport,
        *,
        job: JobConfig,
        plan: Plan,
        schedules: Sequence[Schedule] | None = None,
    ) -> None:
        device = torch.device("cpu")
        stages = plan.held_stages(rank)
        indices = [i for stage in stages for i in plan.stage_layers(stage)]
        layers, loss = build_layers(job, indices, device=device)
        at_an_end = 0 in stages or plan.num_stages - 1 in stages
        self._step = 0
        self._overlap = job.pipeline.overlap_steps
        self._pipeline = PipelineStep(
            job=job,
            plan=plan,
            skeleton=describe(job),
            rank=rank,
            layers=dict(zip(indices, layers, strict=True)),
            loss=loss,
            transport=transport,
            batches=build_batch_source(job, run_dir=None) if at_an_end else None,
            device=device,
            schedule=schedules[rank // plan.pipeline_size] if schedules else None,
        )

    def run(self, num_steps: int) -> RankSteps:
        """Train some steps more."""
        ended_s: list[float] = []
        losses: list[float] = []
        ran_ahead = rolled_back = 0
        spans: Sequence[Span] = ()
        before = copy.copy(self._pipeline.overruns)
        began_s = time.monotonic()
        for index in range(num_steps):
            self._step += 1
            result = self._pipeline.run(
                self._step, go_on=self._overlap and index + 1 < num_steps
            )
            ended_s.append(time.monotonic())
            losses.append(result.loss)
            ran_ahead += result.ran_ahead
            rolled_back += result.rolled_back
            spans = result.spans
        return RankSteps(
            began_s=began_s,
            ended_s=tuple(ended_s),
            spans=tuple(spans),
            losses=tuple(losses),
            num_ran_ahead=ran_ahead,
            num_rolled_back=rolled_back,
            overruns=_since(self._pipeline.overruns, before),
        )


def _since(now: Overruns | None, before: Overruns | None) -> Overruns | None:
    return None if now is None or before is None else now.since(before)
