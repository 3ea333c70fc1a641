"""`deepopt schedule`: the group of its commands, and `show`."""

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
from deepopt_cli.cmd_schedule_compare import compare
from deepopt_cli.cmd_schedule_try import try_
from deepopt_cli.cmd_schedule_verify import verify
from deepopt_cli.output import ProgressLine, reports_errors, say, say_json, tell
from deepopt_cli.schedule_options import (
    Color,
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

SHOW_EFFORT = 1_000_000

_HELP = """Show, compare, verify and try orders of work.

\b
Examples:
  deepopt schedule compare --ranks 8 --microbatches 16
  deepopt schedule show job.yaml
  deepopt schedule verify order.csv
"""
schedule = typer.Typer(
    name="schedule",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode=None,
)


@reports_errors
def show(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOB.yaml | RUN_DIR | ORDER.csv]",
            help="What to show; without it, the options describe a pipeline.",
        ),
    ] = None,
    ranks: Ranks = None,
    microbatches: Microbatches = None,
    placement: Annotated[
        str, typer.Option(help="line, v, mirror, or auto: the fastest.")
    ] = "auto",
    schedule_name: Annotated[
        str,
        typer.Option("--schedule", metavar="NAME", help="A builder, or auto: searched."),
    ] = "auto",
    stages_per_rank: Annotated[
        int | None, typer.Option(min=1, help="With placement line.", show_default="1")
    ] = None,
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
    effort: Effort = SHOW_EFFORT,
    seed: Seed = 0,
    from_csv: Annotated[
        Path | None,
        typer.Option(help="Show an order in torch's CSV format, whatever its file is called."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Write a drawing.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="Write a trace for ui.perfetto.dev.")
    ] = None,
    csv: Annotated[
        Path | None, typer.Option(help="Write the order in torch's CSV format.")
    ] = None,
    transfers: Annotated[
        bool, typer.Option("--transfers", help="With sends and receives in --csv.")
    ] = False,
    title: Annotated[str, typer.Option(help="Above the drawing of --svg.")] = "",
    full: Annotated[
        bool,
        typer.Option("--full", help="Every label, in as many bands of lines as it takes."),
    ] = False,
    color: Color = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Draw an order of work in time, with its bubble, memory and distance to the lower bound.

    \b
    F forward, I gradient of the input, W gradient of the weights, B both, R prepare a backward.

    \b
    Examples:
      deepopt schedule show
      deepopt schedule show job.yaml
      deepopt schedule show runs/first --svg order.svg
      deepopt schedule show --ranks 8 --microbatches 16 --placement mirror --latency-ms 2
      deepopt schedule show --schedule 1f1b --csv order.csv
      deepopt schedule show --model gpt3-175b --hardware 128xA100 --tensor-parallel 8
      deepopt schedule show order.csv --costs 20/22/16 --rank-factor 1,1,1.6,1
    """
    from deepopt.schedule.csv_order import to_csv
    from deepopt.schedule.draw import MOST_BANDS, draw_text
    from deepopt.schedule.draw_files import draw_svg
    from deepopt.schedule.draw_files import perfetto as perfetto_trace
    from deepopt.schedule.ir import Op
    from deepopt_cli.schedule_source import Choice, shown
    from deepopt_cli.schedule_views import columns, outcome_json, outcome_lines, wants_color

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
    choice = Choice(
        placement=placement,
        schedule=schedule_name,
        stages_per_rank=stages_per_rank,
        effort=effort,
        seed=seed,
    )
    with ProgressLine() as progress:
        found = shown(
            source, from_csv=from_csv, options=options, choice=choice, progress=progress.tell
        )
    outcome = found.outcome
    if json:
        say_json(outcome_json(outcome, has_unit=found.has_unit))
    else:
        say(
            draw_text(
                outcome.timeline,
                width=columns(),
                color=wants_color(color),
                most_bands=None if full else MOST_BANDS,
                axis=found.has_unit,
            )
        )
        say()
        lines = outcome_lines(
            outcome,
            yardstick=found.yardstick,
            has_unit=found.has_unit,
            origin=found.origin,
        )
        say("\n".join(lines))
    order = outcome.schedule
    if csv is not None and any(a.op is Op.R for row in order.actions for a in row):
        tell("note: the order has R, which torch does not know; deepopt reads it back")
    if svg is not None:
        _write(svg, draw_svg(outcome.timeline, title=title))
    if perfetto is not None:
        _write(perfetto, perfetto_trace(outcome.timeline))
    if csv is not None:
        _write(csv, to_csv(order, transfers=transfers))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    tell(f"wrote {path}")


for command in (show, compare, verify):
    schedule.command()(command)
schedule.command("try")(try_)
