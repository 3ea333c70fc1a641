"""The error tree: what went wrong, where, with which values, and the next step.

    DeepoptError                     exit code
    ├── InputError                   1    a job file, argument, path or plan is wrong
    │   ├── JobFileError             1    ... with file, line and field
    │   ├── PlanError                1    ... a partition, placement or schedule does not fit
    │   └── RunDirectoryError        1    ... the run directory is missing, busy or another job's
    ├── ScheduleError                1    a schedule breaks one of its own rules
    ├── CheckpointError              1    a checkpoint is damaged, incomplete or of another model
    ├── ClusterError                 3    Ray, ssh, ports, hosts or devices
    │   └── DeviceError              3    ... a worker's device is not there
    ├── WorkersLostError             4    more workers lost than the budget allows
    ├── TrainingError                5    the model raised, NaN, out of memory
    └── TransportError               4    a peer or link failed while tensors moved (a victim's error)

Every error keeps its fields over pickling, because it travels between processes.
This module does not print; the command line does (`deepopt_cli.output`).
"""

from __future__ import annotations

from typing import Any, ClassVar


class DeepoptError(Exception):
    """Root of every error that deepopt raises on purpose.

    Args:
        message: what, where and the values, in one sentence without a final full stop.
        remedy: the next step for the user; empty when there is none to name.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(kind: type[DeepoptError], message: str, fields: dict[str, Any]) -> DeepoptError:
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    error.__dict__.update(fields)
    return error


class InputError(DeepoptError):
    """Something the user wrote is wrong: an argument, a path, a value."""


class JobFileError(InputError):
    """The job file is wrong; the message starts with `file:line: field`."""


class PlanError(InputError):
    """Layers, stages, ranks and micro-batches do not fit together."""


class RunDirectoryError(InputError):
    """The run directory is missing, in use, or belongs to another job."""


class ScheduleError(DeepoptError):
    """A schedule is wrong: the message names the first bad action and the rule it breaks."""


class CheckpointError(DeepoptError):
    """A checkpoint is damaged, incomplete, or of another model."""


class ClusterError(DeepoptError):
    """Processes cannot be placed or started: Ray, ssh, ports, hosts, devices."""

    exit_code: ClassVar[int] = 3


class DeviceError(ClusterError):
    """A worker's device is not there: the work can go on with another one."""


class WorkersLostError(DeepoptError):
    """More workers were lost than `faults.max_restarts` allows."""

    exit_code: ClassVar[int] = 4


class TransportError(DeepoptError):
    """A send, receive or collective failed because of a peer or a link: the sign of a
    victim."""

    exit_code: ClassVar[int] = 4


class TrainingError(DeepoptError):
    """Training itself failed: the model raised, a loss is not finite, memory ran out."""

    exit_code: ClassVar[int] = 5
