"""How a job ends: its workers go, the checkpoint in work is kept, the report is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deepopt.cluster.group import ExportEnded
from deepopt.errors import CheckpointError, DeepoptError
from deepopt.head import recovery
from deepopt.head.account import Account
from deepopt.head.generation import Generation
from deepopt.head.record import JobRecord, Outcome
from deepopt.head.state import JobState, advance
from deepopt.head.status import error_of
from deepopt.telemetry import events

KILL_TIMEOUT_S = 20.0  # for processes to be gone after SIGKILL; a busy disk can hold them


class Ending:
    """Ends a job, once.

    Args:
        record: of the job.
        account: takes the last checkpoints.
        make_report: makes the closing report.
    """

    def __init__(
        self,
        record: JobRecord,
        *,
        account: Account,
        make_report: Callable[[JobRecord], Mapping[str, Any]] | None,
    ) -> None:
        self._record = record
        self._account = account
        self._make_report = make_report

    @property
    def drain_timeout_s(self) -> float:
        """Longest wait for a checkpoint in work."""
        return self._record.job.checkpoint.timeout_s

    def take_export(self, generation: Generation, event: ExportEnded) -> None:
        """Take what became of the final weights."""
        if not generation.exporting:
            return
        if event.folder is None:
            self.failed(
                f"all steps are done, but the final weights could not be written: "
                f"{event.reason}",
                remedy="make room, then `deepopt resume`: it writes them from the checkpoint",
                exit_code=CheckpointError.exit_code,
            )
        else:
            self.end(JobState.FINISHED, exit_code=0)

    def stopped(self, *, reason: str, exit_code: int = 0) -> None:
        """End the job as stopped."""
        self.end(JobState.STOPPED, exit_code=exit_code, reason=reason)

    def failed(
        self,
        message: str,
        *,
        remedy: str,
        exit_code: int,
        blame: recovery.Blame | None = None,
    ) -> None:
        """End the job as failed."""
        self._record.error = error_of(
            message, remedy=remedy, blame=blame, plan=self._record.plan
        )
        self._record.board.tell(
            events.Failed(message=message, remedy=remedy, exit_code=exit_code)
        )
        self.end(JobState.FAILED, exit_code=exit_code, reason=message)

    def end(self, state: JobState, *, exit_code: int, reason: str = "") -> None:
        """End the job: kill the workers, keep the checkpoint in work, report."""
        previous, self._record.state = self._record.state, advance(self._record.state, state)
        self._record.note("state", state=str(state), exit_code=exit_code)
        self._record.close_fault("recovered" if state is JobState.FINISHED else str(state))
        try:
            self._record.group.kill_all(timeout_s=KILL_TIMEOUT_S)
        except DeepoptError as error:  # the supervisor takes the whole cluster down
            self._record.warn(error.message)
        if self._record.generation is not None:
            committer = self._record.generation.committer
            self._account.take_commits(committer.drain(timeout_s=self.drain_timeout_s))
        self._record.outcome = Outcome(state=state, exit_code=exit_code)
        self._report()
        self._record.announce(previous, reason=reason)

    def _report(self) -> None:
        if self._make_report is None:
            return
        try:
            self._record.board.report(self._make_report(self._record))
        except Exception as error:  # noqa: BLE001 - it must not keep the end from being told
            self._record.warn(f"no closing report: {type(error).__name__}: {error}")
