"""The stages that a worker holds under one plan, and how their layers come to the step where a
generation begins: from the seed, from a checkpoint, from a peer, or from where they are.

It outlives the generations of its plan. What one generation does with it is `generation_run`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepopt.checkpoint.layer_files import read_manifest
from deepopt.convert import build_layers
from deepopt.datasets.batch_source import BatchSource
from deepopt.pipeline.step import PipelineStep
from deepopt.pipeline.step_result import Agreement, StepResult
from deepopt.pipeline.transport import Transport
from deepopt.pipeline.update_rule import make_rule
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker import agreements, rendezvous
from deepopt.worker.estate import Estate, in_host_memory
from deepopt.worker.flat_state import State
from deepopt.worker.layer_checkpoint import LayerCheckpointer
from deepopt.worker.messages import Assignment, InPlace, Standing
from deepopt.worker.replicas import ReplicaKeeper
from deepopt.worker.state_transfer import transfer


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldStages:
    """The stages of one rank, ready to train.

    Args:
        device: where the layers are.
        skeleton: the whole model.
        transport: to the ranks that hold the other stages.
        batches: the data; None where neither the first nor the last stage is held.
        reads_stream: whether the data has a position of its own, which cannot go back a step.
        pipeline: the layers, and the step that trains them.
        keeper: of copies for peers and of theirs; None where nobody keeps any.
    """

    device: torch.device
    skeleton: ModelSkeleton
    transport: Transport
    batches: BatchSource | None
    reads_stream: bool
    pipeline: PipelineStep
    keeper: ReplicaKeeper | None

    def load(
        self,
        assignment: Assignment,
        *,
        checkpointer: LayerCheckpointer,
        estate: Estate | None,
        is_new: bool,
    ) -> None:
        """Bring the layers to where a generation starts.

        Args:
            assignment: of this worker in it.
            checkpointer: reads a checkpoint.
            estate: what this process has of the plan before; None: nothing.
            is_new: whether the layers have their initial values, and no generation trained them.

        Raises:
            TransportError: a peer or the store did not answer.
            CheckpointError: a shard is damaged.
        """
        checkpoint, in_place = assignment.checkpoint, assignment.in_place
        if in_place is None:
            if checkpoint is not None:
                self._seek(checkpointer.load(Path(checkpoint)))
            elif not is_new:
                self._initialise(assignment)
            self.pipeline.begin_at(assignment.start_step)
            self._begin_copies(assignment, fresh=True)
            return
        copies = None if self.keeper is None else self.keeper.ward(assignment.start_step)
        had = estate or Estate(
            step=assignment.start_step, replicas={} if copies is None else copies.states
        )
        for name in had.layers.keys() & self.pipeline.optimizers.keys():
            self.pipeline.optimizers[name].load_state(had.layers[name])
        transfer(
            in_place.transfers,
            transport=self.transport,
            optimizers=self.pipeline.optimizers,
            replicas=had.replicas,
            held=had.layers,
        )
        if is_new:
            if self.reads_stream and checkpoint is not None:  # spares reading it all again
                self._seek(read_manifest(Path(checkpoint)).data_state)
            self.pipeline.begin_at(assignment.start_step)
        self._begin_copies(assignment, fresh=False)

    def roll(self, assignment: Assignment) -> None:
        """Make the layers those after the step where a generation goes on in place, with the exchange
        of that step from another worker if needed.

        Args:
            assignment: of this worker in that generation.

        Raises:
            TransportError: that exchange cannot be had.
        """
        in_place, to = assignment.in_place, assignment.start_step
        assert in_place is not None, "a roll to a checkpoint"
        if to < self.pipeline.version:
            assert self.keeper is not None, f"from step {self.pipeline.version} to {to}"
            copy = self.keeper.own(to)
            for name, optimizer in self.pipeline.optimizers.items():
                optimizer.load_state(copy.states[name])
            self.pipeline.begin_at(to)
            return
        agreement = None
        if to > self.pipeline.version:
            agreement = _find_agreement(assignment, in_place)
        self.pipeline.roll(to, agreement=agreement)

    def result(self, assignment: Assignment) -> StepResult:
        """What the last step of the generation before came to.

        Args:
            assignment: of this worker in a generation that goes on in place after that step.

        Raises:
            TransportError: its exchange cannot be had.
        """
        in_place = assignment.in_place
        assert in_place is not None, "a step of a group that is forgotten"
        agreement = self.pipeline.agreement or _find_agreement(assignment, in_place)
        return self.pipeline.result_of(agreement)

    def hand_over(self, assignment: Assignment) -> Estate:
        """Bring the layers to where a group with another plan begins, and give them away.

        Args:
            assignment: of this process in that group.

        Raises:
            TransportError: the exchange of the last step cannot be had.
        """
        step, in_place = assignment.start_step, assignment.in_place
        layers: dict[str, State] = {}
        copies, result = None, None
        if in_place is not None:
            self.roll(assignment)
            layers = in_host_memory(self.pipeline.optimizers)
            copies = None if self.keeper is None else self.keeper.ward(step)
            if in_place.report and assignment.sender.rank == 0:
                result = self.result(assignment)
        if self.keeper is not None:
            self.keeper.close()
        return Estate(
            step=step,
            layers=layers,
            replicas={} if copies is None else copies.states,
            result=result,
            skeleton=self.skeleton,
            batches=None if self.reads_stream else self.batches,
        )

    def standing(self) -> Standing:
        """What can go on in another generation."""
        return Standing(
            version=self.pipeline.version,
            ready=self.pipeline.ready,
            layers=tuple(self.pipeline.optimizers),
            replicas={} if self.keeper is None else self.keeper.replicas,
            held=() if self.keeper is None else self.keeper.held,
        )

    def _seek(self, data_state: dict[str, Any] | None) -> None:
        if data_state is not None and self.batches is not None:
            self.batches.load_state_dict(data_state)

    def _begin_copies(self, assignment: Assignment, *, fresh: bool) -> None:
        if self.keeper is not None:
            self.keeper.begin(
                rendezvous.open_store(assignment),
                step=assignment.start_step,
                fresh=fresh,
                timeout_s=assignment.job.faults.survivor_timeout_s,
            )

    def _initialise(self, assignment: Assignment) -> None:
        """Give the layers the values that they began with."""
        job, indices = assignment.job, held_layers(assignment)
        layers, _ = build_layers(job, indices, device=self.device)
        for layer in layers:
            fresh = make_rule(job.optimizer).optimizer(layer)
            self.pipeline.optimizers[layer.name].load_state(fresh.export_state())


def held_layers(assignment: Assignment) -> list[int]:
    """Indices of the layers that a worker holds, stage by stage.

    Args:
        assignment: of the worker.
    """
    plan = assignment.plan
    stages = plan.held_stages(assignment.sender.rank)
    return [i for stage in stages for i in plan.stage_layers(stage)]


def _find_agreement(assignment: Assignment, in_place: InPlace) -> Agreement:
    """The exchange of the last step, as a worker of the generation before has told it.

    Args:
        assignment: of this worker in a generation that goes on after that step.
        in_place: how it goes on.

    Raises:
        TransportError: nobody has told it in time.
    """
    store = rendezvous.open_store(assignment, generation=in_place.previous_generation)
    return agreements.look_up(
        store, assignment.start_step, timeout_s=assignment.job.faults.setup_timeout_s
    )
