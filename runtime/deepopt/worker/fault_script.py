"""The job's fault script: what a worker does to itself at a chosen step and operation.

For tests of recovery, the project's and the users': `faults.inject` in the job file.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterable, Sequence

from deepopt.config import FaultInjection
from deepopt.errors import InputError, TrainingError
from deepopt.schedule.ir import Action

HOLD_S = 3600  # much longer than any deadline


class FaultScript:
    """The faults of one worker in one generation; each strikes once.

    Args:
        faults: `faults.inject` of the job.
        rank: this worker's rank.
        generation: its worker group.
    """

    def __init__(self, faults: Sequence[FaultInjection], *, rank: int, generation: int) -> None:
        self._due = [
            f for f in faults if f.point.rank == rank and f.point.generation == generation
        ]

    def __bool__(self) -> bool:
        return bool(self._due)

    def check(self, program: Iterable[Action]) -> None:
        """Refuse a fault whose operation this worker never runs: it would never strike.

        Raises:
            InputError: names the operation and those that there are.
        """
        actions = list(program)
        known = {str(a) for a in actions} | {a.op.value for a in actions}
        for fault in self._due:
            if fault.point.op is not None and fault.point.op not in known:
                raise InputError(
                    f"faults.inject: rank {fault.point.rank} never runs {fault.point.op!r} "
                    "in this schedule",
                    remedy=f"use one of {', '.join(sorted({a.op.value for a in actions}))}, or "
                    "an action like " + str(actions[0]),
                )

    def __call__(self, step: int, action: Action) -> None:
        """Strike, if a fault is due before this action of this step."""
        for fault in list(self._due):
            wanted = (None, action.op.value, str(action))
            if fault.point.step == step and fault.point.op in wanted:
                self._due.remove(fault)
                _strike(fault, step, action)


def _strike(fault: FaultInjection, step: int, action: Action) -> None:
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.kind == "hold":
        ctypes.PyDLL(None).sleep(HOLD_S)  # PyDLL: unlike CDLL, it keeps the GIL meanwhile
    else:
        raise TrainingError(
            f"the fault script raised before {action} of step {step}",
            remedy="remove the entry from faults.inject",
        )
