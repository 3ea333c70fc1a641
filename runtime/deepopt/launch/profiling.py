"""Measures on the real devices: starts a profile where the job would run, and gathers what it found.

The workers are started, watched and ended as those of a job, with another class for the work
(`worker.profile_worker`). Their run directory goes when all is well, and stays with its logs when not.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.errors import (
    ClusterError,
    DeepoptError,
    InputError,
    PlanError,
    TrainingError,
    WorkersLostError,
)
from deepopt.job_file import dump_job
from deepopt.launch.batch_choice import with_microbatches
from deepopt.launch.follow import Follower, Interrupts
from deepopt.launch.preparation import count_workers, resolved, shared_cores
from deepopt.launch.run_files import new_run_path, write_launch
from deepopt.launch.start import start
from deepopt.pipeline.stage_experts import layers_with_routers
from deepopt.planner.plan import Plan
from deepopt.planner.plan_make import Measured
from deepopt.planner.profile_result import (
    check_versions,
    deviations,
    hardware_section,
    layer_sections,
    model_section,
)
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.schedule.ir import PlacementKind
from deepopt.telemetry.files import read_json, write_json_atomic, write_text_atomic

PROFILE_WORKER = "deepopt.worker.profile_worker:ProfileWorker"
SCATTER = 0.15
"""A second layer of a kind that differs by more from the first is worth a warning."""

_KINDS: tuple[type[DeepoptError], ...] = (
    InputError,
    ClusterError,
    WorkersLostError,
    TrainingError,
)

_LATE = {"background": 0.7, "exchange": 0.97}
"""Measurements without parts, and how much of a worker's work is done when one begins."""

Tell = Callable[[str, float], None]
"""Takes what is measured now, and the share of all that is done."""


class ProfileInterrupted(Exception):
    """Somebody pressed Ctrl-C: everything is taken down, nothing was written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Profiled:
    """What a profile found.

    Args:
        job: resolved.
        skeleton: its model.
        measured: for a plan file.
        warnings: a sentence each.
    """

    job: JobConfig
    skeleton: ModelSkeleton
    measured: Measured
    warnings: tuple[str, ...]


def profile(job: JobConfig, *, import_roots: list[Path], tell: Tell) -> Profiled:
    """Measure layers, devices and links where a job would run.

    Args:
        job: with absolute paths; its import paths can be imported.
        import_roots: folders where they start.
        tell: told how far it is.

    Raises:
        DeepoptError: the model cannot be tried, a device vanished, versions differ.
        ProfileInterrupted: as asked by Ctrl-C.
    """
    num_workers = count_workers(job)
    job, _ = with_microbatches(
        job, num_workers=num_workers, cores=shared_cores(job, num_workers)
    )
    job = resolved(job)
    skeleton = describe(job)
    run = _make_run(job, skeleton, num_workers=num_workers, import_roots=import_roots)
    view = _ProgressView(tell)
    with Interrupts() as interrupts:
        follower = Follower(run, interrupts=interrupts)
        supervisor = start(run, fresh=True, stage_worker=PROFILE_WORKER)
        outcome = follower.follow(supervisor, view=view)
    if outcome.interrupts:
        shutil.rmtree(run.root, ignore_errors=True)
        raise ProfileInterrupted
    _raise_failure(outcome.status if outcome.ended else None, run)
    results = [read_json(run.profile / f"rank-{rank}.json") for rank in range(num_workers)]
    check_versions(results)
    shutil.rmtree(run.root, ignore_errors=True)
    cores = shared_cores(job, num_workers)
    measured = Measured(
        source="emulated" if job.worker.device == "emulated" else "measured",
        model=model_section(job, skeleton, routers=layers_with_routers(skeleton)),
        hardware=hardware_section(results, shared_cores=cores),
        layers=layer_sections(results, job=job, skeleton=skeleton),
    )
    warnings = tuple(
        f"another layer like {name} took {100 * share:+.0f} % of its time: the machine is busy, "
        "or layers of this kind differ in work"
        for name, share in deviations(results, skeleton).items()
        if abs(share) > SCATTER
    )
    return Profiled(job=job, skeleton=skeleton, measured=measured, warnings=warnings)


def _make_run(
    job: JobConfig, skeleton: ModelSkeleton, *, num_workers: int, import_roots: list[Path]
) -> RunDirectory:
    """A run directory of which no step is ever run."""
    data = job.parallel.data
    if num_workers % data:
        raise PlanError(
            f"{num_workers} workers cannot form {data} replicas of equal size (parallel.data)",
            remedy=f"use a multiple of {data} workers",
        )
    ranks = num_workers // data
    if ranks > len(skeleton.layers):
        raise PlanError(
            f"{ranks} ranks need at least {ranks} layers, the model has {len(skeleton.layers)}",
            remedy=f"profile with --workers {len(skeleton.layers) * data} at most",
        )
    plan = Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in skeleton.layers),
        boundaries=tuple(range(ranks)),
        placement=PlacementKind.LINE,
        schedule="1f1b",
        pipeline_size=ranks,
        data_size=data,
        num_microbatches=max(job.training.microbatches, data),
        num_groups=data,
    )
    changes: dict[str, Any] = {
        "name": f"profile-{job.name}",
        "faults": job.faults.model_copy(
            update={
                "max_restarts": 0,
                "max_host_losses": 0,
                "max_preemptions": 0,
                "max_head_restarts": 0,
                # A layer may take longer than a step's action.
                "hang_after_s": job.faults.step_timeout_s,
                "inject": (),
            }
        ),
        "logging": job.logging.model_copy(update={"tensorboard": False}),
        "checkpoint": job.checkpoint.model_copy(update={"directory": None}),
    }
    job = job.model_copy(update=changes)
    run = RunDirectory(new_run_path(job.name).absolute())
    run.root.mkdir(parents=True)
    write_launch(run, import_roots=import_roots)
    write_json_atomic(run.model, skeleton.to_json())
    write_json_atomic(run.plan, plan.to_json())
    write_text_atomic(run.job, dump_job(job))
    return run


def _raise_failure(status: Mapping[str, Any] | None, run: RunDirectory) -> None:
    """Turn the end of the run into an error, if it is one."""
    if status is None:
        raise WorkersLostError(
            "the profile's supervisor is gone",
            remedy=f"see {run.logs / 'supervisor.log'}, then profile again",
        )
    code = int(status.get("exit_code") or 0)
    if status.get("state") != "failed" and not code:
        return
    error: Mapping[str, Any] = status.get("error") or {}
    culprit: Mapping[str, Any] = error.get("culprit") or {}
    where = ""
    if culprit:
        where = f"rank {culprit.get('rank')} on {culprit.get('host') or 'its host'}: "
    kind = next((own for own in _KINDS if own.exit_code == code), WorkersLostError)
    raise kind(
        f"the profile failed: {where}{culprit.get('message') or error.get('message')}",
        remedy=error.get("remedy") or f"nothing was written; the logs are in {run.logs}",
    )


class _ProgressView:
    """Shows the workers' measurements as one bar."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._seen: dict[int, float] = {}

    def status(self, status: Mapping[str, Any]) -> None:
        """Look at what each worker measures."""
        doing = "starting the workers"
        for worker in status.get("workers", ()):
            action = str(worker.get("action") or "")
            share = _share(action)
            if share is not None:
                rank = int(worker["rank"])
                doing = action if share > self._seen.get(rank, 0.0) else doing
                self._seen[rank] = max(share, self._seen.get(rank, 0.0))
        count = max(1, len(status.get("workers", ())))
        self._tell(doing, sum(self._seen.values()) / count)

    def step(self, record: Mapping[str, Any]) -> None:
        """A profile has no steps."""

    def event(self, record: Mapping[str, Any]) -> None:
        """Events say nothing about measurements."""

    def note(self, text: str) -> None:
        """Pass a remark on."""
        self._tell("stopping", 0.0)

    def close(self) -> None:
        """Nothing is open."""


def _share(action: str) -> float | None:
    """How much of a worker's work is done at its present measurement; None for no measurement."""
    kind, _, place = action.partition(" ")
    begins, part = {"layer": (0.0, 0.7), "link": (0.7, 0.25)}.get(kind, (None, 0.0))
    if action in _LATE:
        return _LATE[action]
    if begins is None or "/" not in place:
        return None
    done, _, total = place.partition("/")
    return begins + part * (int(done) - 1) / int(total)
