"""One layer, run as a stage of its own on this process's device: what F, I, W and the update take
and keep.

Who wants costs of a whole model decides which layers to try (`calibrate`, `profile_worker`); this
module tries one. The clock is an argument: CPU time of the thread, GPU time, or an emulated
device's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import Any, Protocol, TypeVar

import torch

from deepopt.config import JobConfig
from deepopt.pipeline.emulated_clock import sharpen_timer, wait_until
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.slowed_cpu import use_up
from deepopt.pipeline.stage import Layer, Loss, Stage, Tensors
from deepopt.pipeline.update_rule import make_rule
from deepopt.worker.message_trial import OTHER_DATA_BYTES

T = TypeVar("T")

_BEFORE_INPUT, _BEFORE_WEIGHT = 1, 2  # micro-batches between F and I, F and W
_PAUSE_S = 5e-3  # long enough for a core to be given to somebody else


class Clock(Protocol):
    """Measures how long a piece of work keeps a device busy."""

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Run some work.

        Args:
            what: `F`, `I`, `W` or `update`.
            work: what to run.

        Returns:
            Seconds on the device, and what the work returned.
        """
        ...


class ThreadClock:
    """CPU time of the calling thread: what others do on a shared core does not count."""

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Run some work; `what` does not matter."""
        began = time.thread_time()
        result = work()
        return time.thread_time() - began, result


class SlowedClock(ThreadClock):
    """CPU time of the calling thread on a worker that the job slows.

    Args:
        factor: how many times as long everything takes.
    """

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Run some work and use up what a slower processor would; `what` does not matter."""
        began_ns = time.thread_time_ns()
        result = work()
        use_up(began_ns, factor=self._factor)
        return (time.thread_time_ns() - began_ns) * 1e-9, result


class PausedClock(ThreadClock):
    """CPU time of the calling thread for work after a pause in which its core did something else: as on an
    emulated device, whose thread sleeps until the stated end of each operation."""

    def __init__(self) -> None:
        self._other_data = torch.zeros(OTHER_DATA_BYTES // 4)

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Pause, then run some work; `what` does not matter."""
        self._other_data.add_(1.0)
        time.sleep(_PAUSE_S)
        return super().measure(what, work)


class WallClock:
    """Wall time, for devices that work apart from the thread and for more than one thread.

    Args:
        device: waited for where it is a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Run some work; `what` does not matter."""
        self._finish()
        began = time.perf_counter()
        result = work()
        self._finish()
        return time.perf_counter() - began, result

    def _finish(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class EmulatedClock:
    """An emulated device: work is done for real, and lasts at least as long as a table says.

    Args:
        seconds: of the layer in work, by `what`; a missing one takes as long as it takes.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        sharpen_timer()

    def measure(self, what: str, work: Callable[[], T]) -> tuple[float, T]:
        """Run some work and wait for its end on the device."""
        began_ns = time.monotonic_ns()
        result = work()
        wait_until(began_ns + round(self.seconds.get(what, 0.0) * 1e9))
        return (time.monotonic_ns() - began_ns) * 1e-9, result


def real_clock(device: torch.device, *, threads: int) -> Clock:
    """The clock of a device that is there.

    Args:
        device: a GPU or the CPU.
        threads: CPU threads of one operation; only one is seen by the thread's own clock.
    """
    return ThreadClock() if device.type == "cpu" and threads == 1 else WallClock(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTrial:
    """What one layer took, in seconds by repetition, and kept, in bytes.

    Args:
        forward_s: F, without those that warmed up.
        input_s: I.
        weight_s: W.
        update_s: norms, clipping, the optimizer's step and the zeroing of gradients.
        warm_up_s: F while the layer's routers warm up; empty where it has none that do.
        activation_bytes: what autograd kept for a micro-batch, weights left out.
        outputs: to feed the next layer; empty for the last one.
    """

    forward_s: tuple[float, ...]
    input_s: tuple[float, ...]
    weight_s: tuple[float, ...]
    update_s: tuple[float, ...]
    warm_up_s: tuple[float, ...]
    activation_bytes: float
    outputs: Tensors

    @property
    def longer_s(self) -> float:
        """By how much F is longer while routers warm up."""
        if not self.warm_up_s:
            return 0.0
        return max(0.0, median(self.warm_up_s) - median(self.forward_s))


def try_layer(
    layer: Layer,
    inputs: Tensors,
    *,
    job: JobConfig,
    device: torch.device,
    clock: Clock,
    loss: Loss | None = None,
    targets: torch.Tensor | None = None,
    repeats: int = 3,
) -> LayerTrial:
    """Run one layer a few times, forward and backward, as the executor will.

    Args:
        layer: on the device.
        inputs: of one micro-batch; a gradient comes back for those that require one.
        job: the resolved job.
        device: where to run.
        clock: what takes the times.
        loss: of the last layer; None for the others.
        targets: of the last layer.
        repeats: times to take, after a run that warms up and one that counts activations.
    """
    gradients = StageGradients(layer.trainable, apart=(), groups=(0,), device=device)
    stage = Stage(
        0,
        [layer],
        gradients=gradients,
        group_of=dict.fromkeys(range(2 * repeats + 2), 0),
        seed=job.training.seed,
        device=device,
        num_microbatches=job.training.microbatches,
        loss=loss,
        defer_weights=True,
    )
    # Micro-batches are in flight while it works, as they are in no training. A rate of 0 leaves weights as
    # they are, but autograd counts writes: so it writes through parameters that autograd has not seen.
    optimizer = make_rule(job.optimizer).optimizer(_aside(layer))
    weights = {p.untyped_storage().data_ptr() for p in layer.parameters.values()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    stage.begin_step(1)
    outputs: Tensors = ()
    times: list[list[float]] = [[], [], [], []]

    activation_bytes = 0.0
    other_data = torch.zeros(OTHER_DATA_BYTES // 4)
    # As in a pipeline, other micro-batches have passed between the operations of one: what it left has gone
    # from the caches that are a core's own.
    for turn in range(repeats + 2 + _BEFORE_WEIGHT):
        if turn < repeats + 2:
            forward = partial(stage.forward, turn, inputs, targets)
            # Hooks take time themselves, so that run counts for nothing else; and in the first one the stage
            # tries ways for its weight gradients, with forwards of their own.
            with _kept_noted(note) if turn == 1 else nullcontext():
                took, outputs = clock.measure("F", forward)
            activation_bytes = activation_bytes or float(sum(kept.values()))
            times[0].append(took)
        if 0 <= (microbatch := turn - _BEFORE_INPUT) < repeats + 2:
            grads = tuple(torch.ones_like(out) for out in outputs if out.requires_grad)
            backward = partial(stage.backward_input, microbatch, grads)
            times[1].append(clock.measure("I", backward)[0])
        if (microbatch := turn - _BEFORE_WEIGHT) >= 0:
            weights_only = partial(stage.backward_weight, microbatch)
            times[2].append(clock.measure("W", weights_only)[0])
        if turn < repeats + 2:
            other_data.add_(
                1.0
            )  # an update comes once a step: all that it needs has left the caches
            update = partial(_update, stage, optimizer)
            times[3].append(clock.measure("update", update)[0])
    forward_s, input_s, weight_s, update_s = (tuple(own[2:]) for own in times)
    warm_up_s: list[float] = []
    # On one and the same micro-batch, as here, routers settle at once; in a training they may take long.
    if stage.experts.hold_warm_up():
        for repeat in range(repeats + 2, 2 * repeats + 2):
            other_data.add_(1.0)  # the other ones followed an update
            forward = partial(stage.forward, repeat, inputs, targets)
            warm_up_s.append(clock.measure("F", forward)[0])
            stage.abandon()
    return LayerTrial(
        forward_s=forward_s,
        input_s=input_s,
        weight_s=weight_s,
        update_s=update_s,
        warm_up_s=tuple(warm_up_s),
        activation_bytes=activation_bytes,
        outputs=outputs,
    )


def _aside(layer: Layer) -> Layer:
    """The same layer with parameters that share its memory, but not autograd's count of writes to it."""
    return replace(
        layer,
        parameters={
            name: torch.nn.Parameter(parameter.data, parameter.requires_grad)
            for name, parameter in layer.parameters.items()
        },
    )


def _update(stage: Stage, optimizer: LayerOptimizer) -> None:
    """Everything that a step does with a layer once: routers' counts and biases, norms, clipping, update,
    zeros."""
    gradients, experts = stage.gradients, stage.experts
    totals = gradients.totals()
    if experts:
        experts.latch()
        experts.compensate(totals)
        experts.figures()
        experts.update()
    if totals:
        torch.stack([torch.linalg.vector_norm(total) for total in totals.values()]).tolist()
    gradients.rows[0].mul_(1.0)
    optimizer.step(totals, 0.0)
    gradients.zero()


def _kept_noted(note: Callable[[torch.Tensor], torch.Tensor]) -> AbstractContextManager[Any]:
    return torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)


def num_bytes(tensors: Sequence[torch.Tensor]) -> float:
    """The size of some tensors together.

    Args:
        tensors: of any dtype.
    """
    return float(sum(t.numel() * t.element_size() for t in tensors))


@contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """A number of CPU threads for torch, and the former number afterwards.

    Args:
        count: `worker.threads`.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
