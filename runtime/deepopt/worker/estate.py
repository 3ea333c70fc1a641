"""What a worker hands over to the one that takes its process over, with another plan or rank.

State belongs to a layer and not to a rank: whoever holds a layer in the next plan takes it from here, or
is sent it from here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deepopt.datasets.batch_source import BatchSource
from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.step_result import StepResult, Wish
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker.flat_state import State


@dataclass(frozen=True, slots=True, kw_only=True)
class Estate:
    """The state of some layers in host memory, and what else need not be made again.

    Args:
        step: steps done.
        layers: states by layer that the process has trained.
        replicas: copies of a peer's layers.
        result: of the step, where it is still to be reported; None elsewhere.
        wishes: that nobody has acted on yet.
        skeleton: the model; None: nobody has described it.
        batches: the data; None where none was needed, or where it cannot go back.
    """

    step: int
    layers: Mapping[str, State] = field(default_factory=dict)
    replicas: Mapping[str, State] = field(default_factory=dict)
    result: StepResult | None = None
    wishes: Wish = Wish.NONE
    skeleton: ModelSkeleton | None = None
    batches: BatchSource | None = None


def in_host_memory(optimizers: Mapping[str, LayerOptimizer]) -> dict[str, State]:
    """The states of layers, without a copy where they are in host memory already.

    Args:
        optimizers: by layer; of no further use.
    """
    return {
        name: {key: tensor.to("cpu") for key, tensor in optimizer.export_state().items()}
        for name, optimizer in optimizers.items()
    }
