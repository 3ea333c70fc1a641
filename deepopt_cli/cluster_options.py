"""Options for a model on a cluster that nobody has measured yet: `--model gpt3-175b --hardware 128xA100`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from deepopt.planner.layer_costs import LayerCosts

DEFAULT_EFFICIENCY = 0.725
"""Of the vendor's rates: what docs/scale.md solves from a published run of 175B on A100s."""

Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="A GPT-like model whose costs follow from its shape (gpt3-175b, gpt-14.6b, ...), with "
        "--hardware.",
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(metavar="NxKIND", help="GPUs that train --model: 128xA100, 8xH100, 64xH200."),
]
Efficiency = Annotated[
    float,
    typer.Option(help="With --hardware: the reached part of the vendor's rates, up to 1."),
]
TensorParallel = Annotated[
    int,
    typer.Option(min=1, help="With --hardware: neighbouring GPUs that work as one rank."),
]
MicrobatchSize = Annotated[
    int, typer.Option(min=1, help="With --hardware: sequences of a micro-batch.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """A model on a cluster.

    Args:
        model: a name in `transformer_costs.MODELS`.
        hardware: `128xA100`.
        efficiency: reached part of the vendor's rates.
        tensor_parallel: GPUs of a rank.
        microbatch_size: sequences of a micro-batch.
    """

    model: str
    hardware: str
    efficiency: float
    tensor_parallel: int
    microbatch_size: int

    @property
    def num_ranks(self) -> int:
        """Ranks of the pipeline.

        Raises:
            PlanError: there is no such hardware.
        """
        from deepopt.planner.hardware import parse_cluster

        return max(1, parse_cluster(self.hardware).num_gpus // self.tensor_parallel)

    def layers(self) -> LayerCosts:
        """The costs of the model's layers on this cluster: analytic, not measured.

        Raises:
            PlanError: there is no such model or hardware, or sizes do not divide.
        """
        from deepopt.planner.hardware import parse_cluster
        from deepopt.planner.transformer_costs import model_shape, transformer_costs

        return transformer_costs(
            model_shape(self.model),
            cluster=parse_cluster(self.hardware),
            efficiency=self.efficiency,
            microbatch_size=self.microbatch_size,
            tensor_parallel=self.tensor_parallel,
        )


def cluster_options(
    *,
    model: str | None,
    hardware: str | None,
    efficiency: float,
    tensor_parallel: int,
    microbatch_size: int,
) -> ClusterOptions | None:
    """What was typed, checked for halves.

    Args:
        model: None where not said.
        hardware: None where not said.
        efficiency: reached part of the vendor's rates.
        tensor_parallel: GPUs of a rank.
        microbatch_size: sequences of a micro-batch.

    Returns:
        None where neither model nor hardware is said.

    Raises:
        InputError: one of them without the other.
    """
    from deepopt.errors import InputError

    if model is None and hardware is None:
        defaults = (efficiency, tensor_parallel, microbatch_size)
        if defaults != (DEFAULT_EFFICIENCY, 1, 1):
            raise InputError(
                "--efficiency, --tensor-parallel and --microbatch-size describe a model on a cluster",
                remedy="add --model gpt3-175b --hardware 128xA100, or leave them out",
            )
        return None
    if model is None or hardware is None:
        said, lacks = ("--hardware", "--model") if model is None else ("--model", "--hardware")
        raise InputError(
            f"{said} was given without {lacks}",
            remedy="give both, for example --model gpt3-175b --hardware 128xA100",
        )
    return ClusterOptions(
        model=model,
        hardware=hardware,
        efficiency=efficiency,
        tensor_parallel=tensor_parallel,
        microbatch_size=microbatch_size,
    )
