"""What a step was said to take, and to hold, before it ran: against what it took, in twelve settings.

Each setting is launched as a user launches it (`deepopt launch`), on emulated devices: real processes,
messages and arithmetic of small models; operations and links take times, and layers have sizes, that are
drawn at random by a seed for each setting. Nothing is fitted to them. Predicted: `prediction.json`,
written before the workers start. Measured: the median `step_time_s` of `metrics.jsonl` without the first
two steps; and the most that the micro-batches in flight of a rank hold, counted over the actions of a
traced step in the order in which they ran, with the stated sizes of layers (no device's own memory).

ratio: the aim over the error, for the median (aim 2 %) and the worst (aim 5 %) of the step times and of
the memory of the fullest rank; the least of the four. At least 1.00: all four are within their aims.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _machine import describe
from _processes import end_cleanly_on_signals, started
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.job_file import dump_job
from deepopt.planner.plan import Plan
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json

WARM_UP_STEPS = 2  # as the closing report leaves out
AIM_MEDIAN, AIM_WORST = 0.02, 0.05
EXACT = 1e-6  # errors below count as this, so that the ratio stays finite
LAUNCH_LIMIT_S = 120.0
MEGABYTE = 1e6
BUILT_IN = {"d_model": 16, "num_heads": 2, "num_experts": 4, "expert_hidden": 16}


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What is launched; times and sizes are drawn.

    Args:
        name: of the setting.
        layers: of the model.
        ranks: of a pipeline.
        microbatches: of a step, of each replica.
        placement: of stages on ranks.
        schedule: a builder's name, or `auto` for the search.
        built_in: the built-in transformer instead of the stand-in of tiny layers.
        spread: layers take from 1/spread to spread times the middle.
        unlike: devices of other speeds, drawn between 1 and this.
        links: messages take drawn time, too.
        replicas: of the pipeline.
        pipeline: further keys of the section.
    """

    name: str
    layers: int
    ranks: int
    microbatches: int
    placement: str
    schedule: str = "auto"
    built_in: bool = False
    spread: float = 1.25
    unlike: float = 1.0
    links: bool = False
    replicas: int = 1
    pipeline: dict[str, Any] = field(default_factory=dict)


SETTINGS = (
    Setting(
        name="line 1f1b", layers=8, ranks=4, microbatches=8, placement="line", schedule="1f1b"
    ),
    Setting(
        name="gpipe", layers=8, ranks=2, microbatches=4, placement="line", schedule="gpipe"
    ),
    Setting(name="line searched", layers=12, ranks=3, microbatches=6, placement="line"),
    Setting(name="v searched", layers=16, ranks=4, microbatches=8, placement="v"),
    Setting(name="mirror searched", layers=8, ranks=4, microbatches=8, placement="mirror"),
    Setting(
        name="transformer, mirror",
        layers=8,
        ranks=4,
        microbatches=4,
        placement="mirror",
        built_in=True,
    ),
    Setting(
        name="transformer, v", layers=8, ranks=2, microbatches=6, placement="v", built_in=True
    ),
    Setting(
        name="uneven layers",
        layers=16,
        ranks=4,
        microbatches=8,
        placement="auto",
        spread=4.0,
    ),
    Setting(
        name="unlike devices",
        layers=16,
        ranks=4,
        microbatches=8,
        placement="line",
        unlike=2.0,
    ),
    Setting(
        name="unlike and uneven, links",
        layers=16,
        ranks=4,
        microbatches=6,
        placement="mirror",
        spread=3.0,
        unlike=1.7,
        links=True,
    ),
    Setting(
        name="recompute, links",
        layers=12,
        ranks=4,
        microbatches=6,
        placement="v",
        links=True,
        pipeline={"recompute": "full"},
    ),
    Setting(
        name="two replicas, links",
        layers=8,
        ranks=2,
        microbatches=6,
        placement="line",
        schedule="1f1b",
        links=True,
        replicas=2,
    ),
)
QUICK = ("gpipe", "transformer, v")


def drawn_job(setting: Setting, *, seed: int, steps: int) -> JobConfig:
    """The job of a setting, with costs drawn at random.

    Args:
        setting: what is fixed.
        seed: of the draw; each setting has a draw of its own.
        steps: to train; the last is traced.
    """
    draw = random.Random(f"{seed} {setting.name}")
    count = setting.layers

    def around(middle: float, spread: float) -> list[float]:
        return [round(middle * spread ** draw.uniform(-1, 1), 3) for _ in range(count)]

    forward = around(draw.uniform(12, 24), setting.spread)
    emulation: dict[str, Any] = {
        "forward_ms": forward,
        "input_ms": [round(time * draw.uniform(0.9, 1.3), 3) for time in forward],
        "weight_ms": [round(time * draw.uniform(0.6, 1.0), 3) for time in forward],
        "update_ms": around(draw.uniform(2, 6), 1.5),
        "activation_mb": around(draw.uniform(20, 200), setting.spread),
        "state_mb": around(draw.uniform(50, 400), setting.spread),
        "output_mb": round(draw.uniform(1, 10), 3),
    }
    if setting.unlike > 1:
        factors = [round(draw.uniform(1, setting.unlike), 3) for _ in range(setting.ranks)]
        emulation["rank_factor"] = factors
    if setting.links:
        emulation["latency_ms"] = round(draw.uniform(0.5, 3), 3)
        emulation["rate_gb_per_s"] = round(draw.uniform(1, 4), 3)
        emulation["gradient_mb"] = around(draw.uniform(2, 20), setting.spread)
    fields: dict[str, Any] = {
        "training": {
            "steps": steps,
            "microbatches": setting.microbatches * setting.replicas,
            "microbatch_size": 1,
        },
        "parallel": {"data": setting.replicas},
        "pipeline": {
            "placement": setting.placement,
            "schedule": setting.schedule,
            **setting.pipeline,
        },
        "worker": {"device": "emulated", "count": setting.ranks * setting.replicas},
        "emulation": emulation,
        "logging": {"trace_steps": [steps]},
    }
    if setting.built_in:  # its embedding and its head are layers, too
        fields["model"] = {"kwargs": {"num_blocks": count - 2, **BUILT_IN}}
        fields["data"] = {"sequence_length": 16}
    else:
        fields["model"] = {
            "factory": "deepopt.models.stand_in:build",
            "kwargs": {"num_layers": count},
        }
        fields["data"] = {
            "dataset": "deepopt.models.stand_in:batches",
            "sequence_length": 1,
        }
    return JobConfig.model_validate(fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A setting that has run.

    Args:
        stages: of its plan, with the placement.
        predicted_s: a step.
        measured_s: the median of `metrics.jsonl`.
        predicted_bytes: of the fullest rank.
        held_bytes: the same, counted over the actions that ran.
        others_cores: that other programs kept busy meanwhile.
        cause: the part that the closing report names first.
    """

    stages: str
    predicted_s: float
    measured_s: float
    predicted_bytes: float
    held_bytes: float
    others_cores: float
    cause: str

    @property
    def step_error(self) -> float:
        """Measured / predicted - 1."""
        return self.measured_s / self.predicted_s - 1

    @property
    def memory_error(self) -> float:
        """The same of the memory of the fullest rank."""
        return self.held_bytes / self.predicted_bytes - 1


def launch(job: JobConfig, folder: Path) -> Outcome:
    """Train a job and compare.

    Args:
        job: to train.
        folder: empty; takes the run directory and the log.

    Raises:
        RuntimeError: the launch failed; the end of its log is in the message.
    """
    job_file, run = folder / "job.yaml", RunDirectory(folder / "run")
    job_file.write_text(dump_job(job))
    deepopt = str(Path(sys.executable).parent / "deepopt")
    command = (deepopt, "launch", str(job_file), "--json", "--run-dir", str(run.root))
    with started(command, log=folder / "log") as running:
        running.wait(timeout_s=LAUNCH_LIMIT_S)
    prediction = read_json(run.prediction)
    plan = Plan.from_json(read_json(run.plan))
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    held = held_bytes(run, plan=plan, job=job)
    report = read_json(run.report)
    causes, parts = report["prediction_causes"], report["step_parts_s"]
    measured_s = statistics.median(line["step_time_s"] for line in lines[WARM_UP_STEPS:])
    return Outcome(
        stages=f"{plan.num_stages} {plan.placement}",
        predicted_s=prediction["step_s"],
        measured_s=measured_s,
        predicted_bytes=max(prediction["memory_bytes"]),
        held_bytes=max(held.values()),
        others_cores=statistics.fmean(own["others_cpu_s"] for own in parts) / measured_s,
        cause=f"{causes[0]['share']:+.1%} {causes[0]['what']}" if causes else "-",
    )


def held_bytes(run: RunDirectory, *, plan: Plan, job: JobConfig) -> dict[int, float]:
    """The most bytes that each worker held in the traced step, of layers of the stated sizes.

    A micro-batch holds the activations of a stage from F to the end of W or B; with recomputation the
    stage's inputs alone, until R, or the backward that repeats the forward, begins.

    Args:
        run: the run directory.
        plan: who holds what.
        job: states the sizes.
    """
    section = job.emulation

    def of_layer(value: float | tuple[float, ...], layer: int) -> float:
        return MEGABYTE * (value[layer] if isinstance(value, tuple) else value)

    edges = (*plan.boundaries, len(plan.layer_names))

    def of_stage(value: float | tuple[float, ...], stage: int) -> float:
        return sum(of_layer(value, layer) for layer in range(edges[stage], edges[stage + 1]))

    recompute = job.pipeline.recompute == "full"
    peaks: dict[int, float] = {}
    for path in run.traces.glob("step-*.rank-*.json"):
        rank = int(path.name.split(".rank-")[1].removesuffix(".json"))
        own = plan.held_stages(rank)
        states = sum(of_stage(section.state_mb, stage) for stage in own)
        held: Counter[tuple[int, int]] = Counter()
        peak = 0.0
        events = [e for e in read_json(path)["traceEvents"] if e.get("cat") == "compute"]
        for event in sorted(events, key=lambda event: event["ts"]):
            action = event["args"]
            stage, op, key = (
                action["stage"],
                action["op"],
                (action["stage"], action["microbatch"]),
            )
            full = of_stage(section.activation_mb, stage)
            kept = min(full, of_stage(section.output_mb, stage)) if recompute else full
            held[key] = kept if op == "F" else full  # type: ignore[assignment]
            peak = max(peak, sum(held.values()))
            if op in ("W", "B"):
                del held[key]
        peaks[rank] = states + peak
    if not peaks:
        raise RuntimeError(f"no trace in {run.traces}")
    return peaks


def main() -> None:
    """Launch, compare and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="settings with this in the name"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the costs [0]")
    parser.add_argument("--steps", type=int, help="of each setting [9, quick: 5]")
    parser.add_argument("--quick", action="store_true", help="two settings: does it run?")
    options = parser.parse_args()
    steps = options.steps or (5 if options.quick else 9)
    if steps <= WARM_UP_STEPS:
        parser.error(f"--steps {steps}: the first {WARM_UP_STEPS} are left out; take more")
    wanted = options.only or (QUICK if options.quick else [""])
    settings = [one for one in SETTINGS if any(word in one.name for word in wanted)]
    if not settings:
        names = "; ".join(one.name for one in SETTINGS)
        parser.error(f"--only {' '.join(wanted)}: no such setting; there are: {names}")
    end_cleanly_on_signals()
    say("\n".join(describe()))
    say(f"emulated: costs drawn with seed {options.seed}; {steps} steps of each setting\n")
    found: dict[str, Outcome] = {}
    for setting in settings:
        progress(setting.name)
        with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
            job = drawn_job(setting, seed=options.seed, steps=steps)
            found[setting.name] = launch(job, Path(folder))
    rows = [
        (
            setting.name,
            f"{setting.ranks}" + (f" x {setting.replicas}" if setting.replicas > 1 else ""),
            str(setting.microbatches),
            one.stages,
            f"{one.predicted_s * 1e3:.1f}",
            f"{one.measured_s * 1e3:.1f}",
            f"{one.step_error:+.2%}",
            f"{one.predicted_bytes / MEGABYTE:,.0f}",
            f"{one.held_bytes / MEGABYTE:,.0f}",
            f"{one.memory_error:+.2%}",
            f"{one.others_cores:.2f}",
            one.cause,
        )
        for setting in settings
        for one in (found[setting.name],)
    ]
    header = (
        *("setting", "p", "m", "stages", "predicted ms", "measured ms", "error"),
        *("predicted MB", "held MB", "error", "others' cores", "largest part of the step's"),
    )
    say(table(header, rows) + "\n")
    ratios = []
    for what, errors in (
        ("step time", [abs(one.step_error) for one in found.values()]),
        ("memory", [abs(one.memory_error) for one in found.values()]),
    ):
        middle, worst = statistics.median(errors), max(errors)
        say(
            f"{what}: median error {middle:.2%} (aim {AIM_MEDIAN:.0%}), worst {worst:.2%} "
            f"(aim {AIM_WORST:.0%})"
        )
        ratios += [AIM_MEDIAN / max(middle, EXACT), AIM_WORST / max(worst, EXACT)]
    say(ratio_line(min(ratios), aim=1.0))


if __name__ == "__main__":
    main()
