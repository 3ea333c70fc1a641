"""The loss of a run's checkpoint on data, by a job of its own: `deepopt evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepopt.checkpoint.verification import Found, verify
from deepopt.config import EvaluationConfig, FaultsConfig, JobConfig
from deepopt.errors import InputError, TrainingError
from deepopt.job_file import load_job
from deepopt.launch.export_run import find_checkpoint
from deepopt.launch.follow import View
from deepopt.launch.preparation import import_from, with_absolute_paths
from deepopt.launch.run_files import launch_roots, new_run_path
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json, read_json_lines
from deepopt.trainer import run as runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What an evaluation came to.

    Args:
        loss: mean over the samples.
        step: of the checkpoint.
        time_s: of the forwards, without the start of the processes.
        data: in words.
        run_dir: of the evaluation's own job.
    """

    loss: float
    step: int
    time_s: float
    data: str
    run_dir: Path


def evaluate_run(
    run: RunDirectory,
    *,
    view: View,
    step: int | None = None,
    files: Sequence[str] = (),
    workers: int | None = None,
) -> Evaluated:
    """Measure a checkpoint of a run, which may still be running.

    Args:
        run: of any job that has written a checkpoint.
        view: is told what happens.
        step: of the checkpoint; None: the newest.
        files: text files and globs; none: the run's own evaluation data.
        workers: how many; None: as the run.

    Raises:
        DeepoptError: there is no such checkpoint or no data, or the evaluation failed.
        KeyboardInterrupt: Ctrl-C.
    """
    saved = load_job(run.job)
    data = evaluation_of(saved, files=files)
    import_from([*launch_roots(run), Path.cwd()], job=saved)
    skeleton = ModelSkeleton.from_json(read_json(run.model))
    path = find_checkpoint(run, job=saved, skeleton=skeleton, step=step)
    manifest = verify(path, skeleton_fingerprint=skeleton.fingerprint())
    job = job_of_evaluation(saved, evaluation=data, step=manifest.step, workers=workers)
    made = runs.open_new(
        new_run_path(f"{saved.name}-evaluation"),
        lambda _: job,
        begin_with=Found(path=path, manifest=manifest, rejected=()),
    )
    outcome, supervisor = runs.follow(made, view=view, fresh=True)
    runs.raise_failure(outcome, run=made, supervisor=supervisor)
    if outcome.interrupts:
        raise KeyboardInterrupt
    figures = [row for row in read_json_lines(made.metrics) if row.get("val_loss") is not None]
    if not figures:
        raise TrainingError(
            "the evaluation ended without a loss", remedy=f"see the logs in {made.logs}"
        )
    return Evaluated(
        loss=figures[-1]["val_loss"],
        step=manifest.step,
        time_s=figures[-1]["val_time_s"],
        data=", ".join(data.files) or str(data.dataset),
        run_dir=made.root,
    )


def evaluation_of(job: JobConfig, *, files: Sequence[str]) -> EvaluationConfig:
    """What is evaluated.

    Args:
        job: of the run.
        files: text instead of the run's own evaluation data.

    Raises:
        InputError: there is none, or text is given where the run is not trained on text.
    """
    if files:
        if job.data.dataset is not None and not job.evaluation.files:
            raise InputError(
                f"--files reads text, and this run reads {job.data.dataset}",
                remedy="leave --files out, or use DeepTrainer.evaluate(dataset) with trainer.load(RUN_DIR)",
            )
        return EvaluationConfig(files=tuple(files), alone=True)
    if not job.evaluation.is_wanted:
        raise InputError(
            "the run has no evaluation data of its own",
            remedy="name text: --files 'heldout/*.txt'; for the next run: evaluation.files",
        )
    return job.evaluation.model_copy(update={"alone": True, "every": 0})


def job_of_evaluation(
    job: JobConfig, *, evaluation: EvaluationConfig, step: int, workers: int | None
) -> JobConfig:
    """The job that evaluates and does nothing else.

    Args:
        job: of the run.
        evaluation: what it evaluates.
        step: of the checkpoint that it begins with.
        workers: how many; None: as the run.
    """
    update = {
        "training": {"steps": step + 1},
        "checkpoint": {"every": 0, "directory": None},
        "logging": {"trace_steps": ()},
    }
    if workers is not None and workers != job.worker.count:  # a new plan
        update["worker"] = {"count": workers}
        update["parallel"] = {"pipeline": None, "data": 1}
        update["pipeline"] = {"boundaries": None}
    sections = {
        name: getattr(job, name).model_copy(update=fields) for name, fields in update.items()
    }
    faults = job.faults.model_copy(update={"inject": FaultsConfig().inject})
    sections |= {"evaluation": evaluation, "faults": faults}
    return with_absolute_paths(job.model_copy(update=sections))
