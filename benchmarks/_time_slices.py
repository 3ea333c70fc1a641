"""Contenders that take turns of a few seconds, so that a slow minute of the machine hits all of them alike.

Each is started and warmed up alone and then paused (SIGSTOP). In every cycle each one goes on
for one slice while the others stand still. A pause in the middle of a step loses nothing: the
step goes on in the next slice. The measurement of a contender begins and ends with the end of a
step.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from _processes import StartedCommand, machine_cpu_s, started
from _report import progress
from _thread_use import Thread, Use

_LOOK_EVERY_S = 0.005
_UNTIL_STOPPED = "1000000"  # steps: more than any measurement takes
# Steps whose losses must agree: the third has seen two updates, so data, initial values, loss,
# clipping and optimizer are the same. Later ones drift: routing to experts is discontinuous.
_COMPARED_STEPS = 3
_LOSS_TOLERANCE = 1e-4  # relative; fp32 sums in another order differ by 1e-7 a step


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A command that trains a job until it is stopped and writes a JSON line a step.

    Args:
        command: with `{steps}` for the number of steps and `{out}` for a fresh path.
        steps_file: the file of lines, with `{out}`.
    """

    command: tuple[str, ...]
    steps_file: str = "{out}"

    def arguments(self, out: Path) -> list[str]:
        """The command that trains until it is stopped.

        Args:
            out: what it writes: a file or a folder.
        """
        return [
            word.replace("{steps}", _UNTIL_STOPPED).replace("{out}", str(out))
            for word in self.command
        ]

    def steps_path(self, out: Path) -> Path:
        """The file of steps.

        Args:
            out: as for `arguments`.
        """
        return Path(self.steps_file.replace("{out}", str(out)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What one contender did in its slices.

    Args:
        losses: of the first steps.
        steps: whole steps that were measured.
        wall_s: time that it was allowed to run for them.
        cpu_s: CPU time of all its processes in them.
        others_cpu_s: CPU time of all other programs of the machine in that time.
        step_times_s: of the steps measured, by number, as the contender itself tells them: a pause
            in the middle of a step counts.
        threads_before: what its threads had used when the measurement began.
        threads_after: what they had used at its end.
    """

    losses: tuple[float, ...]
    steps: int
    wall_s: float
    cpu_s: float
    others_cpu_s: float
    step_times_s: Mapping[int, float] = field(default_factory=dict)
    threads_before: Mapping[Thread, Use] = field(default_factory=dict)
    threads_after: Mapping[Thread, Use] = field(default_factory=dict)


def measure(
    contenders: Mapping[str, Contender],
    *,
    warm_up: int,
    cycles: int,
    slice_s: float,
    threads: int,
    timeout_s: float,
) -> dict[str, Measured]:
    """Run all contenders in turns and end them.

    Args:
        contenders: by name.
        warm_up: first steps, which do not count.
        cycles: slices of each contender.
        slice_s: length of a slice.
        threads: CPU threads of the libraries of each process.
        timeout_s: longest wait for a step, the first one with the start of the processes.

    Raises:
        RuntimeError: a contender ended.
        TimeoutError: a step took too long.
        ValueError: they do not train the same.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deepopt-bench-")))
        runners = {}
        for number, (name, contender) in enumerate(contenders.items()):
            progress(f"starting {name}")
            runner = _Runner(
                contender, folder / str(number), stack, threads=threads, timeout_s=timeout_s
            )
            runner.warm_up(max(warm_up, _COMPARED_STEPS))
            runners[name] = runner
        check_same_training({name: runner.losses() for name, runner in runners.items()})
        progress(f"measuring {cycles} x {slice_s:g} s each")
        for cycle in range(cycles):
            # Back and forth, so that a steady drift hits all alike, too.
            for runner in runners.values() if cycle % 2 == 0 else reversed(runners.values()):
                runner.run_slice(slice_s)
        return {name: runner.finish() for name, runner in runners.items()}


def check_same_training(losses: Mapping[str, Sequence[float]]) -> None:
    """See that all contenders train the same model on the same data in the same way.

    Args:
        losses: of the first steps, by contender.

    Raises:
        ValueError: two of them differ by more than rounding.
    """
    (first, reference), *others = losses.items()
    for name, own in others:
        for step, (a, b) in enumerate(zip(reference, own, strict=True), start=1):
            if abs(a - b) > _LOSS_TOLERANCE * abs(a):
                raise ValueError(
                    f"step {step}: {first} has loss {a}, {name} has loss {b}: "
                    "they do not train the same"
                )


def read_steps(path: Path) -> list[dict[str, float]]:
    """The steps in a file of JSON lines, in order; an unfinished last line is left out.

    Args:
        path: need not exist yet.
    """
    if not path.exists():
        return []
    whole_lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
    by_step = {record["step"]: record for record in map(json.loads, whole_lines)}
    return [by_step[step] for step in sorted(by_step)]  # the last line of a step stands


class _Runner:
    """One contender at work."""

    def __init__(
        self,
        contender: Contender,
        folder: Path,
        stack: ExitStack,
        *,
        threads: int,
        timeout_s: float,
    ) -> None:
        folder.mkdir()
        out = folder / "out"
        self._steps_file = contender.steps_path(out)
        self._timeout_s = timeout_s
        self._wall_s = 0.0
        self._machine_cpu_s = 0.0
        self._first_step = 0
        self._cpu_before_s = 0.0
        self._threads_before: Mapping[Thread, Use] = {}
        self._running: StartedCommand = stack.enter_context(
            started(
                contender.arguments(out),
                log=folder / "log",
                environment={"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)},
            )
        )

    def losses(self) -> list[float]:
        return [record["loss"] for record in read_steps(self._steps_file)[:_COMPARED_STEPS]]

    def warm_up(self, steps: int) -> None:
        self._wait_for_step(steps)
        self._running.pause()
        self._first_step = len(read_steps(self._steps_file))
        self._cpu_before_s = self._running.cpu_s()
        self._threads_before = self._running.threads()

    def run_slice(self, slice_s: float) -> None:
        with self._timed():
            self._running.resume()
            time.sleep(slice_s)
            self._running.pause()
        self._check_alive()

    def finish(self) -> Measured:
        """Go on to the end of the step in work, and stop there."""
        with self._timed():
            self._running.resume()
            last = self._wait_for_step(len(read_steps(self._steps_file)) + 1)
        cpu_s = self._running.cpu_s() - self._cpu_before_s
        threads = self._running.threads()
        self._running.end()
        return Measured(
            losses=tuple(self.losses()),
            steps=last - self._first_step,
            wall_s=self._wall_s,
            cpu_s=cpu_s,
            others_cpu_s=max(0.0, self._machine_cpu_s - cpu_s),
            step_times_s={
                int(record["step"]): record["step_time_s"]
                for record in read_steps(self._steps_file)[self._first_step :]
                if "step_time_s" in record  # not every contender tells
            },
            threads_before=self._threads_before,
            threads_after=threads,
        )

    @contextmanager
    def _timed(self) -> Iterator[None]:
        wall_s, used_s = time.perf_counter(), machine_cpu_s()
        yield
        self._wall_s += time.perf_counter() - wall_s
        self._machine_cpu_s += machine_cpu_s() - used_s

    def _wait_for_step(self, step: int) -> int:
        deadline = time.monotonic() + self._timeout_s
        while (done := len(read_steps(self._steps_file))) < step:
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"no step {step} after {self._timeout_s:.0f} s")
            time.sleep(_LOOK_EVERY_S)
        return done

    def _check_alive(self) -> None:
        if self._running.check():
            raise RuntimeError(f"a contender ended at step {len(read_steps(self._steps_file))}")
