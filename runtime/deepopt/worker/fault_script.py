"""The job's fault script: what a worker does to itself at a chosen step and operation.

For tests of recovery, the project's and the users': `faults.inject` in the job file.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from deepopt.config.injection import MOMENTS, FaultInjection, FaultSpan
from deepopt.errors import InputError, TrainingError
from deepopt.schedule.ir import Action

HOLD_S = 3600  # much longer than any deadline

Blow = Callable[[], bool]
"""Does its harm; False when there is nothing to harm yet."""


class FaultScript:
    """The faults of one worker in one generation; each strikes once.

    Args:
        faults: `faults.inject` of the job.
        rank: this worker's rank.
        generation: its worker group.
        blows: how this worker does what takes more than a process: by kind, `cut` and `flip`.
    """

    def __init__(
        self,
        faults: Sequence[FaultInjection],
        *,
        rank: int,
        generation: int,
        blows: dict[str, Blow] | None = None,
    ) -> None:
        self._due = [
            f for f in faults if f.point.rank == rank and f.point.generation == generation
        ]
        self._begun: list[FaultInjection] = []  # their moment has come, and they found nothing
        self._blows = blows or {}

    def __bool__(self) -> bool:
        return bool(self._due)

    def check(self, program: Iterable[Action]) -> None:
        """Refuse a fault whose operation this worker never runs: it would never strike.

        Raises:
            InputError: names the operation and those that there are.
        """
        actions = list(program)
        known = {str(a) for a in actions} | {a.op.value for a in actions} | set(MOMENTS)
        for fault in self._due:
            if fault.point.op is not None and fault.point.op not in known:
                names = [*sorted({a.op.value for a in actions}), *MOMENTS]
                raise InputError(
                    f"faults.inject: rank {fault.point.rank} never runs {fault.point.op!r} "
                    "in this schedule",
                    remedy=f"use one of {', '.join(names)}, or an action like {actions[0]}",
                )

    def __call__(self, step: int, action: Action | str) -> None:
        """Strike, if a fault is due before this action, or at this moment, of this step."""
        name = action if isinstance(action, str) else action.op.value
        for fault in list(self._due):
            comes = fault.point.step == step and fault.point.op in (None, name, str(action))
            if comes or fault in self._begun:
                # First: who outlives the blow is not struck again.
                self._due.remove(fault)
                if not self._strike(fault, step, action):
                    self._due.append(fault)
                    self._begun.append(fault)

    def _strike(self, fault: FaultInjection, step: int, action: Action | str) -> bool:
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        elif fault.kind == "hold":
            ctypes.PyDLL(None).sleep(HOLD_S)  # PyDLL: unlike CDLL, it keeps the GIL meanwhile
        elif fault.kind == "hang":
            time.sleep(HOLD_S)
        elif fault.kind == "raise":
            raise TrainingError(
                f"the fault script raised before {action} of step {step}",
                remedy="remove the entry from faults.inject",
            )
        elif isinstance(fault.point, FaultSpan):
            if fault.kind == "delay":
                time.sleep(fault.point.duration_s)
            else:
                _fill_disk(fault.point.duration_s)
        else:
            return self._blows.get(fault.kind, lambda: True)()
        return True


def _fill_disk(duration_s: float) -> None:
    """Let no file of this process grow; Python ignores SIGXFSZ, so that writes fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    timer = threading.Timer(
        duration_s, resource.setrlimit, args=(resource.RLIMIT_FSIZE, before)
    )
    timer.daemon = True
    timer.start()
