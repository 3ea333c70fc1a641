"""Names of everything in a run directory, and nothing else: who writes what, in one place.

| file | writer |
|---|---|
| launch.json, job.yaml, model.json, plan.json | the command line, before anything starts;
plan.json again by the head |
| costs.json, prediction.json, schedules/, plan.yaml | the command line, with each plan |
| profile/rank-N.json | the workers of a profile |
| supervisor.json, logs/supervisor.log | the supervisor |
| journal.jsonl, status.json, metrics.jsonl, events.jsonl, expert_loads.jsonl | the head alone |
| requests/*.json | `deepopt stop` and whoever asks; the supervisor reads and removes them |
| logs/rank-N.log, trace/, checkpoints/*.tmp | workers |
| carried/ | a script's trainer, before anything starts |
| final/ | worker 0, after the last checkpoint |
| predictions/ | the workers with the last layers, in a job of `DeepTrainer.predict` |
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths inside one run directory.

    Args:
        root: the run directory; need not exist yet.
    """

    root: Path

    @property
    def job(self) -> Path:
        """The resolved job: every key, defaults included."""
        return self.root / "job.yaml"

    @property
    def launch(self) -> Path:
        """Where and with which version the job was launched: its import paths start there."""
        return self.root / "launch.json"

    @property
    def model(self) -> Path:
        """The model skeleton: layers, parameter names and shapes, tied weights."""
        return self.root / "model.json"

    @property
    def plan(self) -> Path:
        """The newest plan: stage boundaries, placement, schedule."""
        return self.root / "plan.json"

    @property
    def plan_file(self) -> Path:
        """The plan file that the job was last started with; not there where it was planned anew."""
        return self.root / "plan.yaml"

    @property
    def costs(self) -> Path:
        """What the layers were taken to cost when the newest plan was made."""
        return self.root / "costs.json"

    @property
    def profile(self) -> Path:
        """What each worker of a profile measured, one file a rank."""
        return self.root / "profile"

    @property
    def prediction(self) -> Path:
        """What the newest plan said a step would take, before it ran."""
        return self.root / "prediction.json"

    @property
    def schedules(self) -> Path:
        """Searched orders that plans refer to, one file each."""
        return self.root / "schedules"

    @property
    def carried(self) -> Path:
        """What the script of the job brought along: model, loss, optimizer, data."""
        return self.root / "carried"

    @property
    def supervisor(self) -> Path:
        """Pid, start time and host of the supervisor."""
        return self.root / "supervisor.json"

    @property
    def journal(self) -> Path:
        """What the head decided, one fsynced JSON line a decision."""
        return self.root / "journal.jsonl"

    @property
    def status(self) -> Path:
        """The present state for people and scripts; replaced atomically."""
        return self.root / "status.json"

    @property
    def metrics(self) -> Path:
        """One JSON line a step; the last line of a step stands."""
        return self.root / "metrics.jsonl"

    @property
    def expert_loads(self) -> Path:
        """Tokens of each expert, one JSON line a window of steps and worker."""
        return self.root / "expert_loads.jsonl"

    @property
    def events(self) -> Path:
        """Typed events, one JSON line each."""
        return self.root / "events.jsonl"

    @property
    def requests(self) -> Path:
        """Requests to the head, one file each."""
        return self.root / "requests"

    @property
    def logs(self) -> Path:
        """Log files: supervisor.log, head.log, rank-N.log."""
        return self.root / "logs"

    @property
    def traces(self) -> Path:
        """Perfetto traces of chosen steps."""
        return self.root / "trace"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        """Checkpoints, one folder a step."""
        return self.root / "checkpoints"

    @property
    def predictions(self) -> Path:
        """The model's outputs, of a job that was to write them: a folder a generation."""
        return self.root / "predictions"

    @property
    def final(self) -> Path:
        """Final weights under the model's original names."""
        return self.root / "final"

    @property
    def report(self) -> Path:
        """The closing report as JSON."""
        return self.root / "report.json"

    def checkpoint_root(self, directory: str | None) -> Path:
        """Where checkpoints go: `checkpoint.directory` of the job, else in here."""
        return self.checkpoints if directory is None else Path(directory)

    def spare_log(self, number: int) -> Path:
        """What a spare process prints before it takes a rank's place."""
        return self.logs / f"spare-{number}.log"

    def rank_log(self, rank: int) -> Path:
        """The log file of one worker, by its rank."""
        return self.logs / f"rank-{rank}.log"
