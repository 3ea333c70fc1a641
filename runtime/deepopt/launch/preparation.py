"""From a checked job to what can start: workers counted, model described, plan made and verified.

Everything that can be wrong is found here, before a folder is made or a process started. Imports
torch, because a model can only be described by building it (without memory).
"""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepopt.config import JobConfig
from deepopt.errors import ClusterError, InputError, ScheduleError
from deepopt.import_path import without_collections
from deepopt.planner.decide import FILE
from deepopt.planner.host_cores import places_shared
from deepopt.planner.plan import Plan
from deepopt.planner.skeleton import ModelSkeleton

if TYPE_CHECKING:
    from deepopt.planner.decide import Planned
    from deepopt.planner.layer_costs import LayerCosts
    from deepopt.planner.microbatch_count import TriedCount
    from deepopt.planner.prediction import Prediction
    from deepopt.run_directory import RunDirectory
    from deepopt.schedule.ir import Schedule
    from deepopt.schedule.simulate import Timeline

CPU_WORKERS = 4  # enough to see a pipeline; a laptop has as many cores
SMALL_DATA_BYTES = 32 << 20  # so much text is read and cut in a fraction of a second


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A job that can start.

    Args:
        job: with groups, number of workers and absolute paths resolved.
        skeleton: the model.
        planned: who holds which layers, in which order they work, and why.
        timeline: the first replica's schedule, simulated with the planner's costs.
        prediction: what a step will take; None where the costs are no seconds.
        source: the data in words.
        tried_counts: numbers of micro-batches that this one was chosen from; none where the job says it.
        plan_file: the plan file that stages, order and costs are from; None where they were decided here.
    """

    job: JobConfig
    skeleton: ModelSkeleton
    planned: Planned
    timeline: Timeline
    prediction: Prediction | None
    source: str
    tried_counts: tuple[TriedCount, ...] = ()
    plan_file: Path | None = None

    @property
    def plan(self) -> Plan:
        """Who holds which layers."""
        return self.planned.plan


def import_from(roots: Sequence[Path], *, job: JobConfig) -> None:
    """Let the import paths of a job start in some folders, here and in the processes of the job.

    As `python -m` does it with the working directory. A job that names nothing outside deepopt
    changes nothing.

    Args:
        roots: absolute folders, the first one first.
        job: names the factories.
    """
    paths = (
        job.model.factory,
        job.model.loss,
        job.data.dataset,
        job.evaluation.dataset,
        job.optimizer.factory,
        job.optimizer.scheduler,
    )
    if all(path is None or _is_own(path) for path in paths):
        return
    new = [str(root) for root in dict.fromkeys(roots) if str(root) not in sys.path]
    sys.path[:0] = new
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([*new, *([inherited] if inherited else [])])


def _is_own(path: str) -> bool:
    """Whether an import path leads into deepopt alone; what a script carried may need more."""
    return path.startswith("deepopt.") and not path.startswith("deepopt.carried:")


def with_absolute_paths(job: JobConfig) -> JobConfig:
    """The job with paths that mean the same from every working directory."""

    def absolute(path: str) -> str:
        return str(Path(path).expanduser().absolute())

    update: dict[str, dict[str, Any]] = {
        "data": {"files": tuple(map(absolute, job.data.files))},
        "evaluation": {"files": tuple(map(absolute, job.evaluation.files))},
        "checkpoint": {
            "directory": job.checkpoint.directory and absolute(job.checkpoint.directory)
        },
        "cluster": {"hostfile": job.cluster.hostfile and absolute(job.cluster.hostfile)},
    }
    if (order := given_order_path(job)) is not None:
        update["pipeline"] = {"schedule": FILE + absolute(str(order))}
    return _updated(job, update)


def given_order_path(job: JobConfig) -> Path | None:
    """The file of the order that a job brings along; None where it names a schedule."""
    name = job.pipeline.schedule
    return Path(name.removeprefix(FILE)) if name.startswith(FILE) else None


def _given_order(job: JobConfig) -> Schedule | None:
    """The order that a job brings along, verified."""
    path = given_order_path(job)
    if path is None:
        return None
    from deepopt.planner.order_files import find_order_fault, read_order

    order = read_order(path)
    if (fault := find_order_fault(order, memory_cap=None, buffers=1)) is not None:
        raise ScheduleError(
            f"pipeline.schedule: {path}: {fault.message}",
            remedy=f"deepopt schedule verify {path} draws the fault",
        )
    return order.schedule


def resolved(job: JobConfig) -> JobConfig:
    """The job with its groups and its number of workers.

    Args:
        job: with absolute paths.

    Raises:
        DeepoptError: they do not fit, or cannot be known.
    """
    from deepopt.planner.decide import resolve_groups

    _check_factors(job)
    return _updated(
        job,
        {
            "training": {"groups": resolve_groups(job)},
            "worker": {"count": count_workers(job)},
        },
    )


def prepare(
    job: JobConfig,
    *,
    plan_id: int,
    run: RunDirectory | None = None,
    plan_file: Path | None = None,
) -> Prepared:
    """Check everything that a start needs and decide the plan.

    Args:
        job: with absolute paths; its import paths can be imported.
        plan_id: number of the plan in the job.
        run: of a job that has run before, for what it measured and searched.
        plan_file: to take stages, order and costs from, instead of deciding.

    Raises:
        DeepoptError: what does not fit, with the values.
    """
    if find_spec("ray") is None:
        raise ClusterError("ray is not installed", remedy="pip install ray")
    source = _check_data(job, field="data")
    if job.evaluation.is_wanted:
        from deepopt.datasets.evaluation import with_evaluation_data

        _check_data(with_evaluation_data(job), field="evaluation")

    with without_collections():  # of torch, above all
        from deepopt.convert import describe
        from deepopt.convert.vocabulary import check_vocabulary
        from deepopt.launch.batch_choice import with_microbatches
        from deepopt.pipeline.stage_experts import layers_with_routers
        from deepopt.pipeline.update_rule import make_rule
        from deepopt.planner.decide import make_plan
        from deepopt.planner.orders import known_orders
        from deepopt.planner.prediction import predict
        from deepopt.schedule.simulate import simulate
        from deepopt.schedule.verify import verify

    make_rule(job.optimizer)  # its import paths lead somewhere
    check_vocabulary(job)
    num_workers = count_workers(job)
    job, tried_counts = with_microbatches(
        job,
        num_workers=num_workers,
        cores=shared_cores(job, num_workers),
        plan_file=plan_file,
    )
    asked, job = job, resolved(job)
    skeleton = describe(job)
    cores = shared_cores(job, num_workers)
    if plan_file is not None:
        from deepopt.launch.plan_use import use_plan_file

        job, planned = use_plan_file(
            plan_file, asked=asked, job=job, skeleton=skeleton, plan_id=plan_id
        )
    else:
        planned = make_plan(
            job,
            skeleton,
            num_workers=num_workers,
            plan_id=plan_id,
            costs=_known_costs(job, skeleton, num_workers=num_workers, run=run)
            or _estimated_costs(job, skeleton),
            cores=cores,
            given=_given_order(job),
            known=None if run is None else known_orders(run.schedules),
        )
    for schedule in dict.fromkeys(planned.schedules):
        verify(schedule)
    plan = planned.plan
    table = plan.stage_costs(planned.costs)
    per_replica = None if cores is None else max(1, cores // plan.data_size)
    return Prepared(
        job=job,
        skeleton=skeleton,
        planned=planned,
        timeline=simulate(planned.schedules[0], table, cores=per_replica),
        prediction=predict(
            replace(
                _on_this_host(
                    planned.costs, job=job, skeleton=skeleton, num_workers=num_workers
                ),
                counted=layers_with_routers(skeleton),
            ),
            plan=plan,
            schedules=planned.schedules,
            cores=cores,
            overlap=job.pipeline.overlap_steps,
        ),
        source=source,
        tried_counts=tried_counts,
        plan_file=plan_file,
    )


def count_workers(job: JobConfig) -> int:
    """The number of workers: as the job says, else one a slot or GPU, else a few.

    Raises:
        InputError: it cannot be known without asking a running cluster.
    """
    if job.worker.count is not None:
        return job.worker.count
    if job.parallel.pipeline is not None:
        return job.parallel.pipeline * job.parallel.data
    if job.cluster.hostfile is not None:
        from deepopt.cluster.hostfile import read_hostfile

        return sum(host.slots for host in read_hostfile(Path(job.cluster.hostfile)))
    if job.cluster.address is not None:
        raise InputError(
            f"how many workers the cluster at {job.cluster.address} shall run is not said",
            remedy="add --workers N",
        )
    if job.worker.device in ("auto", "cuda"):
        import torch

        if num_gpus := torch.cuda.device_count():
            return num_gpus
    return CPU_WORKERS


def _check_factors(job: JobConfig) -> None:
    """Refuse to slow workers that cannot be slowed."""
    factors, worker, cluster = job.emulation.rank_factor, job.worker, job.cluster
    if not factors or worker.device == "emulated":
        return
    on_cpus = worker.device == "cpu"
    if worker.device == "auto" and cluster.address is None and cluster.hostfile is None:
        import torch

        on_cpus = not torch.cuda.is_available()
    ranks = count_workers(job) // job.parallel.data
    if not on_cpus:
        raise InputError(
            f"emulation.rank_factor slows workers on CPUs, and worker.device is {worker.device}",
            remedy="set worker.device to cpu or emulated, or leave the factors out",
        )
    if worker.threads > 1:
        raise InputError(
            f"emulation.rank_factor slows workers of one thread, and worker.threads is {worker.threads}",
            remedy="set worker.threads to 1, or worker.device to emulated",
        )
    if min(factors) < 1:
        raise InputError(
            f"emulation.rank_factor has {min(factors):g}, and a real worker cannot be faster than it is",
            remedy="give factors of at least 1, or set worker.device to emulated",
        )
    if len(factors) != ranks:
        raise InputError(
            f"emulation.rank_factor has {len(factors)} figures, a pipeline has {ranks} ranks",
            remedy="give one figure for each rank, or none",
        )


def _updated(job: JobConfig, update: dict[str, dict[str, Any]]) -> JobConfig:
    sections = {
        name: getattr(job, name).model_copy(update=fields) for name, fields in update.items()
    }
    return job.model_copy(update=sections)


def _check_data(job: JobConfig, *, field: str) -> str:
    """Find out cheaply whether there is data; the data in words."""
    data = job.data
    if data.dataset is not None:
        from deepopt.import_path import import_object

        import_object(data.dataset, field=f"{field}.dataset")
        return data.dataset
    if not data.files:
        return "sources of the Python standard library"
    found: set[str] = set()
    for pattern in data.files:
        matches = [name for name in _matches(pattern) if Path(name).is_file()]
        if not matches:
            raise InputError(
                f"{field}.files: {pattern!r} matches no file",
                remedy="check the path; a folder needs a glob, for example folder/**/*.txt",
            )
        found.update(matches)
    size_bytes = sum(Path(name).stat().st_size for name in found)
    if size_bytes <= SMALL_DATA_BYTES and data.tokenizer == "bytes":
        from deepopt.datasets.batch_source import build_batch_source

        return build_batch_source(job, run_dir=None).description
    return f"{len(found)} files, {size_bytes / 1e6:,.1f} MB, tokenizer {data.tokenizer}"


def _matches(pattern: str) -> list[str]:
    # Path.glob refuses absolute patterns.
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207
    return [*names, pattern] if Path(pattern).exists() else names


def _known_costs(
    job: JobConfig, skeleton: ModelSkeleton, *, num_workers: int, run: RunDirectory | None
) -> LayerCosts | None:
    """What the layers cost, from the run's own times or a trial; None to estimate it."""
    searched = job.pipeline.schedule == "auto" and num_workers > job.parallel.data
    if not searched or job.worker.device == "emulated":
        return None
    from deepopt.planner.estimate import estimated_costs

    if run is not None and run.report.is_file():
        from deepopt.planner.measured import measured_costs
        from deepopt.telemetry.files import read_json

        report = read_json(run.report)
        found = measured_costs(  # slowed workers have their factors in their times
            report.get("op_times_s", {}).values(),
            plan=Plan.from_json(read_json(run.plan)),
            prior=estimated_costs(job, skeleton),
            update_s=report.get("update_s") or 0.0,
        )
        if found is not None:
            return found
    elsewhere = job.cluster.address is not None or job.cluster.hostfile is not None
    if elsewhere or not job.pipeline.calibrate or not _has_small_text(job):
        return None
    from deepopt.datasets.batch_source import build_batch_source
    from deepopt.worker.calibrate import calibrate
    from deepopt.worker.company import company, num_companions
    from deepopt.worker.device import choose_device

    device = choose_device(job)
    others = num_companions(num_workers, threads=job.worker.threads)
    with company(others if device.type == "cpu" else 0):
        found = calibrate(
            job, skeleton, batches=build_batch_source(job, run_dir=None), device=device
        )
    if found is None:
        return None
    found = replace(found, rank_factor=job.emulation.rank_factor)  # tried on what is not slowed
    return _with_messages(found, job=job, num_workers=num_workers)


def _estimated_costs(job: JobConfig, skeleton: ModelSkeleton) -> LayerCosts:
    """What the layers cost in proportion, on workers that the job may slow."""
    from deepopt.planner.estimate import estimated_costs

    return replace(estimated_costs(job, skeleton), rank_factor=job.emulation.rank_factor)


def _on_this_host(
    costs: LayerCosts, *, job: JobConfig, skeleton: ModelSkeleton, num_workers: int
) -> LayerCosts:
    """Costs with all that workers do on this machine beside what they compute on their devices."""
    costs = _with_messages(costs, job=job, num_workers=num_workers)
    emulated = job.worker.device == "emulated" and costs.source == "emulated"
    if not emulated or not job.pipeline.calibrate or not _has_small_text(job):
        return costs
    from deepopt.datasets.batch_source import build_batch_source
    from deepopt.worker.calibrate import with_host_work

    return with_host_work(
        costs,
        job=job,
        skeleton=skeleton,
        batches=build_batch_source(job, run_dir=None),
        num_workers=num_workers,
        cores=len(os.sched_getaffinity(0)),
    )


def _with_messages(costs: LayerCosts, *, job: JobConfig, num_workers: int) -> LayerCosts:
    """Costs with what messages between the workers of this machine take, where nobody has measured it."""
    elsewhere = job.cluster.address is not None or job.cluster.hostfile is not None
    known = costs.message_s > 0 or costs.source == "estimated"
    if elsewhere or known or not job.pipeline.calibrate:
        return costs
    from deepopt.worker.calibrate import with_messages

    cores = shared_cores(job, num_workers)
    return with_messages(costs, job=job, num_workers=num_workers, cores=cores)


def _has_small_text(job: JobConfig) -> bool:
    """Whether batches can be had in a fraction of a second, and from no code of the user's."""
    if job.data.dataset is not None or job.data.tokenizer != "bytes":
        return False
    found = {name for pattern in job.data.files for name in _matches(pattern)}
    return sum(Path(name).stat().st_size for name in found) <= SMALL_DATA_BYTES


def shared_cores(job: JobConfig, num_workers: int) -> int | None:
    """Cores that the workers share; None where each has a device, or cores of its own and some are left.

    Args:
        job: the resolved job.
        num_workers: of the job.
    """
    cluster = job.cluster
    if cluster.address is not None or cluster.hostfile is not None:
        return None  # of other machines: not known here
    if job.worker.device == "emulated":
        return None
    if job.worker.device != "cpu":
        import torch

        if torch.cuda.is_available():
            return None
    return places_shared(
        num_workers, threads=job.worker.threads, cores=len(os.sched_getaffinity(0))
    )
