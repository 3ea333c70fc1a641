"""Options that the commands of `deepopt schedule` share, and what they mean as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from deepopt_cli.cluster_options import ClusterOptions

if TYPE_CHECKING:
    from deepopt.planner.layer_costs import LayerCosts
    from deepopt.planner.sketch import Pipeline

DEFAULT_RANKS = 4
DEFAULT_MICROBATCHES = 8
DEFAULT_COSTS = "20/22/16"  # the measured F : I : W of a transformer layer
MOST_STAGES_PER_RANK = 4  # of placement line, where none is asked for
_OPS = (3, 4)  # F/I/W or F/I/W/R

Ranks = Annotated[
    int | None,
    typer.Option(min=1, show_default=str(DEFAULT_RANKS), help="Ranks of the pipeline."),
]
Microbatches = Annotated[
    int | None,
    typer.Option(
        min=1, show_default=str(DEFAULT_MICROBATCHES), help="Micro-batches of a step."
    ),
]
Costs = Annotated[
    str | None,
    typer.Option(
        metavar="F/I/W[/R][,...]",
        show_default=DEFAULT_COSTS,
        help="Milliseconds of forward, input gradient, weight gradient (and prepare) for one "
        "micro-batch: once for a rank's share of the layers, or for each layer, with commas.",
    ),
]
RankFactor = Annotated[
    str | None,
    typer.Option(
        metavar="X,X,...", help="Multiplies the times of each rank: 1,1,1.6,1 has a slow one."
    ),
]
Latency = Annotated[
    float, typer.Option("--latency-ms", min=0, help="From one rank to another, one way.")
]
Transfer = Annotated[
    float,
    typer.Option("--transfer-ms", min=0, help="How long a tensor occupies its route."),
]
Update = Annotated[
    float,
    typer.Option("--update-ms", min=0, help="Optimizer update of a rank's share of layers."),
]
Exchange = Annotated[
    float,
    typer.Option(
        "--exchange-ms",
        min=0,
        help="Exchange of a rank's share of gradients between two copies (mirror).",
    ),
]
MemoryCap = Annotated[
    float | None,
    typer.Option(
        min=0,
        help="Most micro-batches whose activations a rank can hold, on its share of the "
        "layers: 1F1B holds as many as there are ranks.",
    ),
]
Effort = Annotated[
    int,
    typer.Option(min=1, help="Work of each search, in actions; a million take seconds."),
]
Seed = Annotated[int, typer.Option(help="Of the random choices of a search.")]
Color = Annotated[
    bool | None,
    typer.Option("--color/--no-color", help="Colours; default: on a terminal."),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineOptions:
    """What was typed about a pipeline.

    Args:
        ranks: None where not said.
        microbatches: None where not said.
        costs: as typed; None where not said.
        cluster: a model on a cluster, instead of costs; None where not said.
        rank_factor: as typed; None for equal ranks.
        latency_ms: one way.
        transfer_ms: of one tensor.
        update_ms: of a rank's share.
        exchange_ms: of a rank's share.
        memory_cap: in micro-batches of a rank's share; None for any number.
    """

    ranks: int | None
    microbatches: int | None
    costs: str | None
    cluster: ClusterOptions | None
    rank_factor: str | None
    latency_ms: float
    transfer_ms: float
    update_ms: float
    exchange_ms: float
    memory_cap: float | None

    def pipeline(self, *, stages_per_rank: int) -> Pipeline:
        """The pipeline that the options describe by themselves.

        Args:
            stages_per_rank: the most that a placement will have.

        Raises:
            DeepoptError: the options do not fit together.
        """
        if self.cluster is not None:
            return self._on_cluster(self.cluster)
        return self.pipeline_of(
            num_ranks=self.ranks or DEFAULT_RANKS,
            num_microbatches=self.microbatches or DEFAULT_MICROBATCHES,
            stages_per_rank=stages_per_rank,
        )

    def pipeline_of(
        self, *, num_ranks: int, num_microbatches: int, stages_per_rank: int
    ) -> Pipeline:
        """The pipeline of given sizes with the costs of the options.

        Args:
            num_ranks: ranks.
            num_microbatches: micro-batches of a step.
            stages_per_rank: the most that a placement will have.

        Raises:
            DeepoptError: the options do not fit together.
        """
        from deepopt.planner.sketch import Pipeline, two_groups

        return Pipeline(
            num_ranks=num_ranks,
            replicas=two_groups(num_microbatches),
            layers=self._layers(num_ranks=num_ranks, stages_per_rank=stages_per_rank),
            memory_cap=self.memory_cap,
        )

    def _on_cluster(self, cluster: ClusterOptions) -> Pipeline:
        """A known model on hardware that has a table; activations have to fit its memory."""
        from deepopt.errors import InputError
        from deepopt.planner.sketch import Pipeline, two_groups

        asked = [option for option, value in self._given().items() if value]
        if asked or self.costs is not None or self.memory_cap is not None:
            other = [*asked, "--costs", "--memory-cap"][0 if asked else self.costs is None]
            raise InputError(
                f"{other} was given with --model and --hardware, which say what layers, links and "
                "memory are",
                remedy=f"leave out {other}, or --model and --hardware",
            )
        if self.ranks not in (None, cluster.num_ranks):
            raise InputError(
                f"--ranks {self.ranks} was given, --hardware {cluster.hardware} with "
                f"--tensor-parallel {cluster.tensor_parallel} has {cluster.num_ranks}",
                remedy="leave out --ranks",
            )
        return Pipeline(
            num_ranks=cluster.num_ranks,
            replicas=two_groups(self.microbatches or DEFAULT_MICROBATCHES),
            layers=cluster.layers(),
        )

    def _given(self) -> dict[str, object]:
        """Options that say what layers and links cost, beside `--costs`."""
        return {
            "--latency-ms": self.latency_ms,
            "--transfer-ms": self.transfer_ms,
            "--update-ms": self.update_ms,
            "--exchange-ms": self.exchange_ms,
            "--rank-factor": self.rank_factor,
        }

    def refuse_without_costs(self, *, of: str) -> None:
        """A job has links and devices of its own; figures of others go with costs of others.

        Args:
            of: a job file or run directory.

        Raises:
            InputError: times or factors are given without `--costs`.
        """
        from deepopt.errors import InputError

        if self.cluster is not None:
            raise InputError(
                f"the costs of {of} are its own; --model and --hardware have others",
                remedy=f"leave out {of}, or --model and --hardware",
            )
        asked = [option for option, value in self._given().items() if value]
        if asked and self.costs is None:
            raise InputError(
                f"the costs of {of} are its own: {', '.join(asked)} would change what it has",
                remedy="add --costs F/I/W in milliseconds",
            )

    def _layers(self, *, num_ranks: int, stages_per_rank: int) -> LayerCosts:
        from deepopt.planner.sketch import layers_of_ops

        return layers_of_ops(
            parse_costs(self.costs or DEFAULT_COSTS),
            num_ranks=num_ranks,
            stages_per_rank=stages_per_rank,
            rank_factor=parse_factors(self.rank_factor),
            latency_s=self.latency_ms / 1e3,
            transfer_s=self.transfer_ms / 1e3,
            update_s=self.update_ms / 1e3,
            exchange_s=self.exchange_ms / 1e3,
        )


def parse_costs(text: str) -> list[tuple[float, ...]]:
    """Seconds of F, I, W (and R) from `20/22/16` or `20/22/16,24/25/18`.

    Args:
        text: milliseconds.

    Raises:
        InputError: it is not of this form.
    """
    from deepopt.errors import InputError

    entries = []
    for entry in text.split(","):
        try:
            times = [float(part) for part in entry.split("/")]
        except ValueError:
            times = []
        if len(times) not in _OPS or not all(0 <= time < float("inf") for time in times):
            raise InputError(
                f"--costs: {entry.strip()!r} is not F/I/W or F/I/W/R in milliseconds",
                remedy="for example --costs 20/22/16, or --costs 20/22/16,24/25/18 for two layers",
            )
        entries.append(tuple(time / 1e3 for time in times))
    return entries


def parse_factors(text: str | None) -> Sequence[float]:
    """Factors of ranks from `1,1,1.6,1`; empty for None.

    Args:
        text: as typed.

    Raises:
        InputError: it is not a list of positive numbers.
    """
    from deepopt.errors import InputError

    if text is None:
        return ()
    try:
        factors = tuple(float(part) for part in text.split(","))
    except ValueError:
        factors = ()
    if not factors or not all(0 < factor < float("inf") for factor in factors):
        raise InputError(
            f"--rank-factor: {text!r} is not a list of positive numbers",
            remedy="one for each rank, for example --rank-factor 1,1,1.6,1",
        )
    return factors
