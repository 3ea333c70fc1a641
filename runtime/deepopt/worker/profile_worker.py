"""`ProfileWorker`: takes a worker's place to measure its device, the layers on it and its links.

It runs where `StageWorker` would: started, watched and ended by the same head, so a device that
vanishes is noticed as in training. CPU workers of one host that are timed by the CPU time of their thread
measure all at once, as they will train: each finds its caches and its core as busy with others then. Where
wall time counts they take turns, as many at once as have cores. What it found lies in
`profile/rank-N.json` of the run directory when it has ended;
nothing is trained.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.samples import model_inputs
from deepopt.errors import DeepoptError, TransportError
from deepopt.pipeline.emulated_transport import EmulatedTransport
from deepopt.pipeline.slowed_cpu import slow_factor
from deepopt.pipeline.stage import Tensors
from deepopt.pipeline.transport import Channel, Kind, Transport
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.host_cores import places_shared
from deepopt.planner.layer_costs import LayerCosts
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import write_json_atomic
from deepopt.worker import rendezvous
from deepopt.worker.background import Background, BackgroundTrial
from deepopt.worker.calibrate import layer_kinds
from deepopt.worker.company import workers_at_once
from deepopt.worker.device import choose_device
from deepopt.worker.device_identity import identify
from deepopt.worker.layer_trial import (
    Clock,
    EmulatedClock,
    LayerTrial,
    SlowedClock,
    cpu_threads,
    num_bytes,
    real_clock,
    try_layer,
)
from deepopt.worker.link_trial import num_messages, pairs_to_try, try_link
from deepopt.worker.message_trial import OTHER_DATA_BYTES
from deepopt.worker.messages import Assignment, Failure, Heartbeat, RunEnded, WorkerReady

logger = logging.getLogger(__name__)

REPEATS = 9  # of a layer: the median and the quartiles count
EXCHANGES = 20


def turns_of(position: int, *, count: int, at_once: int) -> frozenset[int]:
    """The turns in which a worker measures, so that as many as may do so in each.

    Args:
        position: of the worker among those of its host.
        count: of these workers.
        at_once: how many of them may measure in a turn; who fills up the last turn measures again.

    Returns:
        Numbers of turns, from 0; what is measured in the last one counts.
    """
    together = min(at_once, count)
    own, last = position // together, (count - 1) // together
    return frozenset({own, last} if position >= count - together else {own})


@contextmanager
def computing() -> Iterator[None]:
    """Keep a core of this host busy until the end of the block, as a worker does that is not waiting."""
    over = threading.Event()
    weight, data = torch.zeros(256, 256), torch.zeros(OTHER_DATA_BYTES // 4)

    def compute() -> None:
        while not over.is_set():
            torch.mm(weight, weight)
            data.add_(1.0)

    thread = threading.Thread(target=compute, name="computing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class ProfileStopped(Exception):
    """Somebody asked to stop."""


class ProfileWorker:
    """Measures what one rank sees.

    Args:
        assignment: who it is; its job names model, data and devices.
        report: takes messages for the head; a profile has none.
    """

    can_go_on = False  # it has nothing to go on with in another generation

    def __init__(
        self,
        assignment: Assignment,
        *,
        report: Callable[[Any], None],
        warmth: None = None,
        before: None = None,
    ) -> None:
        self._assignment = assignment
        self._sender = assignment.sender
        self._job = assignment.job
        self._transport: Transport | None = None
        self._device = torch.device("cpu")
        self._stop = threading.Event()
        self._progress = 0
        self._doing = "starting"

    def setup(self) -> WorkerReady:
        """Find the device and join the other workers.

        Raises:
            TransportError: a peer or the store did not answer.
            ClusterError: there is no such device.
        """
        began = time.perf_counter()
        self._device = choose_device(self._job)
        self._transport = rendezvous.join(self._assignment, device=self._device)
        return WorkerReady(
            sender=self._sender,
            pid=os.getpid(),
            host=socket.gethostname(),
            stages=(),
            device=str(self._device),
            setup_s={"rendezvous": time.perf_counter() - began},
            peak_flops=0.0,
            peak_source="",
        )

    def interrupt(self, generation: int) -> None:
        """End all waits for peers in a generation. From any thread."""
        if self._transport is not None:
            self._transport.interrupt(generation)

    def let_go(self) -> None:
        """Leave the group, so that peers notice."""
        self.interrupt(self._sender.generation)

    def run(self) -> RunEnded:
        """Measure, and write down what was found.

        Raises:
            TransportError: a peer is gone.
            DeepoptError: the model or its data cannot be tried.
        """
        assert self._transport is not None, "run() before setup()"
        job, rank = self._job, self._sender.rank
        identity = identify(job, self._device)
        hosts = self._hosts(identity.host)
        result: dict[str, Any] = {
            "device": identity.to_json(),
            "slowed": self._slowed(),
            "links": {},
        }
        try:
            with cpu_threads(job.worker.threads):
                mine = turns_of(
                    hosts[:rank].count(hosts[rank]),
                    count=hosts.count(hosts[rank]),
                    at_once=self._workers_at_once(hosts.count(hosts[rank])),
                )
                background = self._begin_background(hosts)
                for turn in range(max(hosts.count(host) for host in hosts)):
                    if turn in mine:
                        result |= self._try_layers()
                    self._barrier()
                if background is not None:
                    result["background"] = asdict(self._end_background(background))
                result["links"] = self._try_links(hosts)
                result["exchange_s"] = self._try_exchange()
        except ProfileStopped:
            return RunEnded(sender=self._sender, step=0, reason="stopped")
        folder = RunDirectory(Path(self._assignment.run_dir)).profile
        folder.mkdir(exist_ok=True)
        write_json_atomic(folder / f"rank-{rank}.json", result)
        return RunEnded(sender=self._sender, step=0, reason="stopped")

    def request_stop(self) -> None:
        """Stop before the next measurement. From any thread."""
        self._stop.set()

    def request_checkpoint(self) -> None:
        """A profile has no state to save."""

    def heartbeat(self) -> Heartbeat:
        """What is measured now. From any thread."""
        return Heartbeat(
            sender=self._sender, step=0, progress=self._progress, action=self._doing
        )

    def describe_failure(self, error: BaseException) -> Failure:
        """What the head should know of an error that `setup` or `run` raised."""
        message, remedy, exit_code = f"{type(error).__name__}: {error}", "", 5
        if isinstance(error, DeepoptError):
            message, remedy, exit_code = error.message, error.remedy, error.exit_code
        return Failure(
            sender=self._sender,
            kind="peer" if isinstance(error, TransportError) else "error",
            step=0,
            action="",
            message=f"while measuring {self._doing}: {message}",
            traceback="".join(traceback.format_exception(error)),
            exit_code=exit_code,
            remedy=remedy,
            pid=os.getpid(),
            host=socket.gethostname(),
        )

    def export(self, checkpoint_dir: str) -> str:
        """Never called: a profile trains nothing."""
        raise AssertionError(f"a profile was asked to export {checkpoint_dir}")

    def close(self) -> None:
        """Leave the process group."""
        if self._transport is not None:
            self._transport.close()

    # Layers. ---------------------------------------------------------------------------------

    def _try_layers(self) -> dict[str, Any]:
        """Try one layer of each kind, and one more of a kind that is repeated."""
        job = self._job
        skeleton = describe(job)
        kinds = layer_kinds(skeleton.layers)
        emulated, clock = self._clock(len(kinds))
        if emulated is not None:  # a list of figures makes layers of one class differ
            kinds = [
                (*kind, emulated.work_s[index], emulated.update_s[index])
                for index, kind in enumerate(kinds)
            ]
        self._begin("data")
        batches = build_batch_source(job, run_dir=None)
        began = time.thread_time()
        batch_inputs, targets = batches.batch(1, 0)
        batch_s = time.thread_time() - began
        values: Tensors = model_inputs(batch_inputs)
        trials: dict[tuple[object, ...], tuple[int, LayerTrial, float]] = {}
        like: list[int] = []
        checks: dict[tuple[object, ...], float] = {}
        num_kinds = len(set(kinds))
        last_of = {kind: index for index, kind in enumerate(kinds)}
        for index, kind in enumerate(kinds):
            key = (kind, *((t.shape, t.dtype, t.requires_grad) for t in values))
            check = key in trials and index == last_of[kind]
            if key not in trials or check:
                self._begin(f"layer {min(len(trials) + 1, num_kinds)}/{num_kinds}")
                layers, loss = build_layers(job, [index], device=self._device)
                is_last = index == len(kinds) - 1
                if emulated is not None and isinstance(clock, EmulatedClock):
                    clock.seconds = self._emulated_seconds(emulated, index)
                trial = try_layer(
                    layers[0],
                    values,
                    job=job,
                    device=self._device,
                    clock=clock,
                    loss=loss if is_last else None,
                    targets=targets if is_last else None,
                    repeats=REPEATS,
                )
                if check:
                    own = trials[key][1]
                    before = median(own.forward_s) + median(own.input_s) + median(own.weight_s)
                    now = (
                        median(trial.forward_s) + median(trial.input_s) + median(trial.weight_s)
                    )
                    checks[key] = now / before - 1 if before > 0 else 0.0
                else:
                    trials[key] = (index, trial, num_bytes(values))
            like.append(trials[key][0])
            values = trials[key][1].outputs
        return {
            "like": like,
            "batch_s": batch_s,
            "checks": {str(trials[key][0]): share for key, share in checks.items()},
            "trials": {
                str(index): {
                    "forward_s": trial.forward_s,
                    "input_s": trial.input_s,
                    "weight_s": trial.weight_s,
                    "update_s": trial.update_s,
                    "warm_up_s": trial.longer_s,
                    "activation_bytes": trial.activation_bytes,
                    "input_bytes": input_bytes,
                    "output_bytes": num_bytes(trial.outputs),
                }
                for index, trial, input_bytes in trials.values()
            },
        }

    def _clock(self, num_layers: int) -> tuple[LayerCosts | None, Clock]:
        if self._job.worker.device == "emulated":
            return emulated_costs(self._job, num_layers=num_layers), EmulatedClock()
        if (factor := self._slowed()) > 1:
            return None, SlowedClock(factor)
        return None, real_clock(self._device, threads=self._job.worker.threads)

    def _slowed(self) -> float:
        rank = self._sender.rank % self._assignment.plan.pipeline_size
        return slow_factor(self._job, pipeline_rank=rank, device=self._device)

    def _emulated_seconds(self, costs: LayerCosts, index: int) -> dict[str, float]:
        pipeline_rank = self._sender.rank % self._assignment.plan.pipeline_size
        factor = costs.rank_factor[pipeline_rank] if costs.rank_factor else 1.0
        return {
            "F": costs.forward_s[index] * factor,
            "I": costs.input_s[index] * factor,
            "W": costs.weight_s[index] * factor,
            "update": costs.update_s[index] * factor,
        }

    # Links. ----------------------------------------------------------------------------------

    def _try_links(self, hosts: list[str]) -> dict[str, Any]:
        """Try the links of this rank; others wait for their turn."""
        transport, rank = self._link_transport(), self._sender.rank
        pairs, shared = pairs_to_try(hosts), self._shares_cores(hosts)
        transport.open(
            Channel(Kind.ACTIVATION, source, target)
            for pair in pairs
            if rank in pair
            for source, target in (pair, pair[::-1])
        )
        found: dict[str, Any] = {}
        data = torch.zeros(OTHER_DATA_BYTES // 4)
        for number, pair in enumerate(pairs):
            self._begin(f"link {number + 1}/{len(pairs)}")
            trial_of = partial(try_link, transport, ranks=pair, device=self._device)
            if rank in pair:
                trial = trial_of(first_message=2 * number * num_messages())
                if rank == pair[0]:
                    found[f"{pair[0]}-{pair[1]}"] = asdict(trial)
            self._barrier()
            if not shared:
                continue
            # What a message costs the cores while all compute on them, the ends of this one between messages.
            if rank in pair:
                trial = trial_of(
                    first_message=(2 * number + 1) * num_messages(),
                    between=partial(data.add_, 1.0),
                )
                if rank == pair[0]:
                    found[f"{pair[0]}-{pair[1]}"]["process"] = asdict(trial.process)
                self._barrier()
            else:
                with computing():
                    self._barrier()
        return found

    def _pids(self, hosts: list[str]) -> list[int]:
        """Process ids of this host's workers."""
        assert self._transport is not None, "process ids before setup()"
        rows = self._transport.start_all_gather([float(os.getpid())]).wait()
        own = hosts[self._sender.rank]
        return [int(row[0]) for row, host in zip(rows, hosts, strict=True) if host == own]

    def _begin_background(self, hosts: list[str]) -> BackgroundTrial | None:
        """Begin to look at what else takes cores of this host; None where no step depends on it."""
        pids = self._pids(hosts)
        if self._device.type != "cpu" or self._job.worker.device == "emulated":
            return None
        background = BackgroundTrial(pids)
        background.begin()
        return background

    def _end_background(self, background: BackgroundTrial) -> Background:
        """What else takes cores of this host, long enough seen."""
        if self._job.worker.threads > 1:  # they computed as well: look while all workers wait
            self._begin("background")
            background.begin()
        self._stop.wait(background.left_s())
        found = background.end()
        self._barrier()
        return found

    def _shares_cores(self, hosts: list[str]) -> bool:
        """Whether workers of this job take turns on the cores of a host; the same answer on all of them."""
        is_cpu = self._device.type == "cpu" and self._job.worker.device != "emulated"
        places = places_shared(
            hosts.count(hosts[self._sender.rank]),
            threads=self._job.worker.threads,
            cores=len(os.sched_getaffinity(0)),
        )
        short = is_cpu and places is not None
        assert self._transport is not None, "cores before setup()"
        return any(row[0] for row in self._transport.start_all_gather([float(short)]).wait())

    def _link_transport(self) -> Transport:
        assert self._transport is not None, "links before setup()"
        section = self._job.emulation
        emulated = self._job.worker.device == "emulated" and self._transport.world_size > 1
        if not emulated or (section.latency_ms == 0 and section.rate_gb_per_s is None):
            return self._transport
        rate = None if section.rate_gb_per_s is None else section.rate_gb_per_s * 1e9
        return EmulatedTransport(
            self._transport,
            latency_s=section.latency_ms * 1e-3,
            transfer_s=lambda channel, message, tensors: (
                0.0 if rate is None else num_bytes(tensors) / rate
            ),
        )

    def _try_exchange(self) -> float:
        """The all-gather at the end of a step, with as many figures as a step has."""
        assert self._transport is not None, "an exchange before setup()"
        self._begin("exchange")
        parameters = sum(len(layer.parameters) for layer in describe(self._job).layers)
        row = [0.0] * (7 + self._job.training.microbatches + parameters)
        times = []
        for _ in range(EXCHANGES):
            began = time.perf_counter()
            self._transport.start_all_gather(row).wait()
            times.append(time.perf_counter() - began)
        return median(times)

    # Turns. ----------------------------------------------------------------------------------

    def _workers_at_once(self, count: int) -> int:
        """How many of this host's workers measure at the same moment."""
        if self._device.type != "cpu" or self._job.worker.device == "emulated":
            return 1
        cores = len(os.sched_getaffinity(0))
        return workers_at_once(count, cores=cores, threads=self._job.worker.threads)

    def _hosts(self, own: str) -> list[str]:
        """The host of each rank, named by the first rank on it: names may repeat elsewhere."""
        assert self._transport is not None, "hosts before setup()"
        digest = hashlib.sha256(f"{own}/{self._assignment.node_ip}".encode()).digest()
        number = float(int.from_bytes(digest[:6], "big"))  # exact in fp64
        rows = self._transport.start_all_gather([number]).wait()
        return [str(rows.index(row)) for row in rows]

    def _barrier(self) -> None:
        """Wait for all workers; stop together when any of them was asked to."""
        assert self._transport is not None, "a barrier before setup()"
        wishes = self._transport.start_all_gather([float(self._stop.is_set())]).wait()
        if any(row[0] for row in wishes):
            raise ProfileStopped

    def _begin(self, what: str) -> None:
        self._doing = what
        self._progress += 1
        logger.info("measuring %s", what)
