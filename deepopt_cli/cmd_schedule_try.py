"""`deepopt schedule try`: run a plan on emulated devices, and see whether it takes what was predicted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepopt_cli.output import ProgressLine, reports_errors, say, say_json

if TYPE_CHECKING:
    from deepopt_cli.schedule_trial import Trial


@reports_errors
def try_(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.yaml | RUN_DIR", help="Whose plan, and whose `emulation` section."
        ),
    ],
    workers: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With a job file: workers.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to measure, after one warm-up.")] = 5,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Set a key of the job; repeatable."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Run the plan of a job on emulated devices of this host: predicted against measured.

    A stand-in with as many layers takes the place of the model, so a large model's costs fit a
    laptop. Processes, messages, order, autograd and update are real; operations and links take what
    the job's `emulation` section says. Nothing is written.

    \b
    Examples:
      deepopt schedule try job.yaml --workers 8
      deepopt schedule try job.yaml --set emulation.latency_ms=4 --set pipeline.placement=mirror
      deepopt schedule try runs/first --set 'emulation.rank_factor=[1, 1, 1.6, 1]' --json
    """
    from deepopt_cli.schedule_trial import find_trial, run_trial, trial_json

    with ProgressLine() as progress:
        progress.tell("planning")
        trial = find_trial(source, workers=workers, overrides=overrides or ())
        progress.tell(f"running {steps + 1} steps on {trial.plan.world_size} emulated devices")
        found = run_trial(trial, steps=steps)
    content = trial_json(trial, found)
    if json:
        say_json(content)
        return
    say("\n".join(_lines(trial, content)))


def _lines(trial: Trial, content: dict[str, Any]) -> list[str]:
    from deepopt_cli.output import human_percent, ranges, table

    plan, predicted, measured = trial.plan, content["predicted"], content["measured"]
    share = predicted["step_s"] / measured["step_s"]
    overruns = content["emulated"]
    replicas = f" x {plan.data_size} replicas" if plan.data_size > 1 else ""
    rows = [
        (
            rank["rank"],
            ranges(rank["stages"]),
            _ms(rank["predicted_busy_s"]),
            _ms(rank["measured_busy_s"]),
            human_percent(1 - rank["predicted_busy_s"] / predicted["step_s"]),
            human_percent(1 - rank["measured_busy_s"] / measured["step_s"]),
        )
        for rank in content["ranks"]
    ]
    header = ("rank", "stages", "busy ms predicted", "measured", "bubble predicted", "measured")
    return [
        f"plan        {plan.pipeline_size} ranks{replicas}, placement {plan.placement}, schedule "
        f"{plan.schedule}, {plan.num_microbatches} micro-batches, {len(plan.layer_names)} layers",
        f"step        predicted {_ms(predicted['step_s'])} ms, measured "
        f"{_ms(measured['step_s'])} ms on emulated devices, median of "
        f"{len(measured['steps_s'])}: {human_percent(share)} of the prediction reached",
        f"bubble      predicted {human_percent(predicted['bubble'])}, measured "
        f"{human_percent(measured['bubble'])}",
        f"emulated    {overruns['overran']:,} of {overruns['operations']:,} operations overran, "
        f"{_ms(overruns['late_s'])} ms in all",
        "",
        table(header, rows),
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.1f}"
