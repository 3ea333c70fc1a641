"""How a generation begins: which checkpoint, which step, which identities. Decides; starts nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deepopt.checkpoint.verification import Found
from deepopt.config import JobConfig
from deepopt.errors import InputError
from deepopt.head.commits import Committer, Origin
from deepopt.head.generation import Generation, make_members
from deepopt.head.liveness import Liveness, deadlines_of
from deepopt.pipeline.weight_ways import WaysByConditions
from deepopt.planner.plan import Plan
from deepopt.worker.messages import Assignment, InPlace


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a generation takes up the job.

    Args:
        step: steps already done.
        checkpoint: folder of the checkpoint to load; None: initialise from the seed.
        tokens_seen: tokens trained on so far; None when unknown.
        data_fingerprint: hash of the data trained on so far; None when unknown.
        source: where the layers' state comes from: `seed`, `checkpoint`, or as in
            `survivors.Restoration`.
        in_place: how the group goes on from what survivors have; None: from the checkpoint.
    """

    step: int
    checkpoint: str | None
    tokens_seen: int | None
    data_fingerprint: str | None = None
    source: str = "seed"
    in_place: InPlace | None = None


def choose_start(found: Found | None, *, plan: Plan, last_step: int) -> Start:
    """Where to take up the job, given its newest verified checkpoint.

    Args:
        found: None when there is no checkpoint.
        plan: what shall be trained.
        last_step: run through this step.

    Raises:
        InputError: the checkpoint does not fit what shall be trained.
    """
    if found is None:
        return Start(step=0, checkpoint=None, tokens_seen=0)
    manifest = found.manifest
    if manifest.num_groups != plan.num_groups:
        raise InputError(
            f"{found.path} was trained with {manifest.num_groups} gradient groups, the plan has "
            f"{plan.num_groups}",
            remedy=f"set training.groups to {manifest.num_groups}: it is fixed at the first "
            "launch, because it decides the rounding",
        )
    if manifest.step > last_step:
        raise InputError(
            f"{found.path} is at step {manifest.step}, beyond the last step asked for, "
            f"{last_step}",
            remedy=f"ask for {manifest.step} steps or more",
        )
    return Start(
        step=manifest.step,
        checkpoint=str(found.path),
        tokens_seen=manifest.tokens_seen,
        data_fingerprint=manifest.data_fingerprint,
        source="checkpoint",
    )


def is_checkpoint_due(step: int, *, job: JobConfig, last_step: int) -> bool:
    """Whether a checkpoint is written after a step without anybody asking for it.

    Args:
        step: steps done; after step 0 there is nothing to write.
        job: the resolved job.
        last_step: run through this step.
    """
    every = job.checkpoint.every
    return step > 0 and (step == last_step or (every > 0 and step % every == 0))


def open_generation(
    number: int,
    *,
    plan: Plan,
    job: JobConfig,
    job_id: str,
    skeleton_fingerprint: str,
    start: Start,
    now_s: float,
    incarnations: Sequence[str],
    make_committer: Callable[[Origin], Committer],
) -> Generation:
    """A new generation of which no worker has been heard yet.

    Args:
        number: the generation.
        plan: who holds which layers.
        job: the resolved job.
        job_id: its id.
        skeleton_fingerprint: the model's.
        start: where it takes up the job.
        now_s: the time.
        incarnations: a fresh uuid for each rank.
        make_committer: takes what the generation's checkpoints have in common.
    """
    origin = Origin(
        job_id=job_id,
        generation=number,
        num_writers=plan.world_size,
        plan=plan.to_json(),
        plan_fingerprint=plan.fingerprint(),
        skeleton_fingerprint=skeleton_fingerprint,
        seed=job.training.seed,
        num_groups=plan.num_groups,
    )
    return Generation(
        number=number,
        plan=plan,
        start_step=start.step,
        began_s=now_s,
        members=make_members(plan, job_id=job_id, generation=number, incarnations=incarnations),
        liveness=Liveness(deadlines_of(job.faults)),
        committer=make_committer(origin),
    )


def make_assignments(
    generation: Generation,
    *,
    start: Start,
    job: JobConfig,
    run_dir: str,
    store_address: tuple[str, int],
    last_step: int,
    known_ways: WaysByConditions,
) -> Sequence[Assignment]:
    """What each worker of a generation is told, in the order of ranks.

    Args:
        generation: its members and plan.
        start: where it takes up the job.
        job: the resolved job.
        run_dir: the run directory.
        store_address: IP address and port of the rendezvous store.
        last_step: run through this step.
        known_ways: how weight gradients are computed, as far as workers have found it out.
    """
    host, port = store_address
    return [
        Assignment(
            sender=member.sender,
            store_host=host,
            store_port=port,
            job=job,
            plan=generation.plan,
            run_dir=run_dir,
            checkpoint=start.checkpoint,
            start_step=start.step,
            last_step=last_step,
            in_place=start.in_place,
            known_ways=known_ways,
        )
        for member in generation.members
    ]
