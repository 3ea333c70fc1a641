"""What deepopt costs where it has nothing to do: one worker against a plain PyTorch loop.

The default job on both sides, but with plain top-k routing, because the loop would never update the
biases of ELB: same model, initial values, batches, optimizer, clipping and thread count; the losses
must agree. Two measurements:
- the whole: `deepopt launch --workers 1`, with its Ray, head, heartbeats and TensorBoard files, and the
  loop as a script, in time slices. The ratio is of this one.
- the step alone: `PipelineStep` and the loop in this process, step by step in turns, in CPU time of the
  thread.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from _contenders import deepopt, measure_slices, parse_slices, plain_loop, say_job, slice_table
from _machine import describe
from _peer_loop import PlainLoop
from _processes import end_cleanly_on_signals
from _report import progress, ratio_line, say
from _time_slices import check_same_training

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.convert import describe as describe_model
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.job_file import dump_job, load_job
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.planner.decide import make_plan

AIM = 0.95
OURS, PEER = "deepopt launch --workers 1", "plain loop"


def main() -> None:
    """Measure both and print the table and the ratio."""
    options = parse_slices(__doc__)
    end_cleanly_on_signals()
    say("\n".join(describe()))
    small = ["model.kwargs={d_model: 64, expert_hidden: 32}"] if options.quick else []
    job = load_job(None, ["checkpoint.every=0", "elb.mode=none", *small])
    say_job(job, workers=1, options=options)
    with tempfile.TemporaryDirectory(prefix="deepopt-bench-") as folder:
        job_file = Path(folder) / "job.yaml"
        job_file.write_text(dump_job(job))
        contenders = {OURS: deepopt(job_file, workers=1), PEER: plain_loop(job_file)}
        measured = measure_slices(contenders, job=job, options=options)
    pairs = _step_alone(
        job, warm_up=options.warm_up, steps=options.warm_up + 2 * options.cycles
    )
    say("\n" + slice_table(measured, job=job) + "\n")
    say(f"the step alone: {pairs:.3f} of the loop's speed, median of neighbouring pairs")
    rates = {name: one.steps / one.wall_s for name, one in measured.items()}
    say(ratio_line(rates[OURS] / rates[PEER], aim=AIM))


def _step_alone(job: JobConfig, *, warm_up: int, steps: int) -> float:
    """The loop's CPU time of a step over that of `PipelineStep`, in this process."""
    progress(f"measuring {steps} steps in one process")
    torch.set_num_threads(job.worker.threads)
    batches = build_batch_source(job, run_dir=None)
    pipeline, loop = _make_pipeline(job, batches), PlainLoop(job, batches)
    sides = {
        OURS: lambda step: pipeline.run(step).loss,
        PEER: lambda step: loop.step(step)[0],
    }
    losses: dict[str, list[float]] = {name: [] for name in sides}
    cpu_s: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(1, steps + 1):
        # In reverse every second time: neither side always runs into the other's caches.
        for name in sides if step % 2 else reversed(sides):
            began = time.thread_time()
            losses[name].append(sides[name](step))
            cpu_s[name].append(time.thread_time() - began)
    check_same_training({name: values[:warm_up] for name, values in losses.items()})
    pairs = list(zip(cpu_s[PEER], cpu_s[OURS], strict=True))[warm_up:]
    return statistics.median(peer_s / ours_s for peer_s, ours_s in pairs)


def _make_pipeline(job: JobConfig, batches: BatchSource) -> PipelineStep:
    skeleton = describe_model(job)
    device = torch.device("cpu")
    layers, loss = build_layers(job, range(len(skeleton.layers)), device=device)
    return PipelineStep(
        job=job,
        plan=make_plan(job, skeleton, num_workers=1, plan_id=1).plan,
        skeleton=skeleton,
        rank=0,
        layers=dict(enumerate(layers)),
        loss=loss,
        transport=LoneTransport(),
        batches=batches,
        device=device,
    )


if __name__ == "__main__":
    main()
