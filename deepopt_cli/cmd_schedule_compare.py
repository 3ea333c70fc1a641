"""`deepopt schedule compare`: every placement and order for one pipeline in a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deepopt_cli.cluster_options import (
    DEFAULT_EFFICIENCY,
    Efficiency,
    Hardware,
    MicrobatchSize,
    Model,
    TensorParallel,
    cluster_options,
)
from deepopt_cli.output import ProgressLine, reports_errors, say, say_json, table, tell
from deepopt_cli.schedule_options import (
    MOST_STAGES_PER_RANK,
    Costs,
    Effort,
    Exchange,
    Latency,
    MemoryCap,
    Microbatches,
    PipelineOptions,
    RankFactor,
    Ranks,
    Seed,
    Transfer,
    Update,
)

COMPARE_EFFORT = 300_000  # six searches in the time of a few breaths


@reports_errors
def compare(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB.yaml | RUN_DIR]",
            help="Whose sizes to take; without it, the options describe a pipeline.",
        ),
    ] = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    stages_per_rank: Annotated[
        int, typer.Option(min=1, help="The most of placement line that is tried.")
    ] = MOST_STAGES_PER_RANK,
    costs: Costs = None,
    model: Model = None,
    hardware: Hardware = None,
    efficiency: Efficiency = DEFAULT_EFFICIENCY,
    tensor_parallel: TensorParallel = 1,
    microbatch_size: MicrobatchSize = 1,
    rank_factor: RankFactor = None,
    latency_ms: Latency = 0.0,
    transfer_ms: Transfer = 0.0,
    update_ms: Update = 0.0,
    exchange_ms: Exchange = 0.0,
    memory_cap: MemoryCap = None,
    search: Annotated[
        bool, typer.Option("--search/--no-search", help="Search an order on each placement.")
    ] = True,
    effort: Effort = COMPARE_EFFORT,
    seed: Seed = 0,
    csv: Annotated[Path | None, typer.Option(help="Write the table as CSV.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Table every placement and builder, and a searched order on each placement; fastest first.

    \b
    vs 1F1B      how many times as fast as 1F1B
    to bound     above the lower bound of the placement
    activations  most micro-batches in flight on a rank, in its share of the layers
    copies       of the weights; a second one costs --update-ms and --exchange-ms too

    \b
    Examples:
      deepopt schedule compare
      deepopt schedule compare job.yaml
      deepopt schedule compare --ranks 8 --microbatches 16 --costs 20/22/16 --latency-ms 2
      deepopt schedule compare --model gpt-14.6b --hardware 8xA100 --microbatches 24
      deepopt schedule compare --rank-factor 1,1,1.6,1 --memory-cap 4 --json
    """
    from deepopt_cli.schedule_subject import compared, subject
    from deepopt_cli.schedule_views import comparison_csv, comparison_json, comparison_table

    options = PipelineOptions(
        ranks=ranks,
        microbatches=microbatches,
        costs=costs,
        cluster=cluster_options(
            model=model,
            hardware=hardware,
            efficiency=efficiency,
            tensor_parallel=tensor_parallel,
            microbatch_size=microbatch_size,
        ),
        rank_factor=rank_factor,
        latency_ms=latency_ms,
        transfer_ms=transfer_ms,
        update_ms=update_ms,
        exchange_ms=exchange_ms,
        memory_cap=memory_cap,
    )
    about = subject(source, options=options, stages_per_rank=stages_per_rank)
    with ProgressLine() as progress:
        found = compared(
            about,
            stages_per_rank=stages_per_rank,
            with_search=search,
            effort=effort,
            seed=seed,
            progress=progress.tell,
        )
    if json:
        say_json(comparison_json(found, has_unit=about.has_unit))
    else:
        say(f"{about.words}\n")
        say(comparison_table(found, has_unit=about.has_unit))
        if found.left_out:
            rows = [(c.shape, c.schedule, reason) for c, reason in found.left_out]
            say("\ndoes not fit:\n" + table(("placement", "schedule", "reason"), rows))
    if csv is not None:
        csv.write_text(comparison_csv(found, has_unit=about.has_unit), encoding="utf-8")
        tell(f"wrote {csv}")
