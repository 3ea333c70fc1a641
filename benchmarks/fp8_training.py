"""What training loses by linear maps in FP8: a small language model in four formats, losses side by side.

The built-in model in small, all blocks dense so that every matrix of a block is a linear map in FP8: 4
blocks, width 128, 1,024 tokens a step of the Python standard library's sources (bytes), 200 steps of the
project's own step in one process. All formats begin with the same weights and see the same data; the
validation loss is of held-out files. Seeds change both: their spread is what a difference has to be compared
with. On CPUs FP8 is computed by the PyTorch reference: no time is claimed.

    python benchmarks/fp8_training.py                  # 3 seeds; about 15 minutes
    python benchmarks/fp8_training.py --seeds 0 --formats bfloat16 "FP8, rest bfloat16"
    python benchmarks/fp8_training.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _machine import describe
from _report import progress, ratio_line, say, table

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.convert import describe as describe_model
from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.evaluation import with_evaluation_data
from deepopt.datasets.samples import model_inputs
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.stage import Layer, Loss
from deepopt.pipeline.step import PipelineStep
from deepopt.planner.decide import make_plan

FORMATS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": "bfloat16"},
    "FP8, rest float32": {"fp8": "blockwise"},
    "FP8, rest bfloat16": {"dtype": "bfloat16", "fp8": "blockwise"},
}
PLAIN = {"FP8, rest float32": "float32", "FP8, rest bfloat16": "bfloat16"}
BLOCKS = 4
VALIDATION = 32  # micro-batches
LAST = 20  # steps whose mean is the training loss at the end
AIM = 0.0025  # relative difference of losses that DeepSeek-V3 reports (arXiv:2412.19437, section 3.3)
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of one training.

    Args:
        losses: of each step, nats a byte.
        validation: loss of held-out files after the last, nats a byte.
        num_fp8: linear maps in FP8.
    """

    losses: tuple[float, ...]
    validation: float
    num_fp8: int

    @property
    def last(self) -> float:
        """Mean training loss at the end."""
        return statistics.mean(self.losses[-LAST:])


def job_of(precision: dict[str, Any], *, steps: int, seed: int) -> JobConfig:
    """A training with one pipeline stage.

    Args:
        precision: section of the job.
        steps: of the optimizer.
        seed: of weights and order.
    """
    files = sorted(map(str, Path(sysconfig.get_path("stdlib")).glob("*.py")))
    return JobConfig.model_validate(
        {
            "model": {
                "kwargs": {
                    "d_model": 128,
                    "num_blocks": BLOCKS,
                    "num_dense_layers": BLOCKS,
                    "dense_hidden": 384,
                }
            },
            "data": {
                "files": [f for i, f in enumerate(files) if i % 10],
                "sequence_length": 128,
            },
            "evaluation": {"files": files[::10]},
            "training": {"seed": seed, "steps": steps, "microbatches": 2, "microbatch_size": 4},
            "optimizer": {"warmup_steps": min(20, steps - 1), "decay_steps": steps},
            "precision": precision,
            "worker": {"device": "cpu", "count": 1},
        }
    )


def train(job: JobConfig) -> Outcome:
    """Train a job from its start to its end in this process.

    Args:
        job: of one worker.
    """
    skeleton = describe_model(job)
    layers, loss = build_layers(job, range(len(skeleton.layers)), device=CPU)
    step = PipelineStep(
        job=job,
        plan=make_plan(job, skeleton, num_workers=1, plan_id=1).plan,
        skeleton=skeleton,
        rank=0,
        layers=dict(enumerate(layers)),
        loss=loss,
        transport=LoneTransport(),
        batches=build_batch_source(job, run_dir=None),
        device=CPU,
    )
    losses = [step.run(number).loss for number in range(1, job.training.steps + 1)]
    return Outcome(
        losses=tuple(losses),
        validation=_validate(job, layers, loss),
        num_fp8=skeleton.num_fp8,
    )


@torch.no_grad()
def _validate(job: JobConfig, layers: list[Layer], loss: Loss) -> float:
    source = build_batch_source(with_evaluation_data(job), run_dir=None)
    found = []
    for microbatch in range(VALIDATION):
        inputs, targets = source.batch(1, microbatch)
        (x,) = model_inputs(inputs)
        for layer in layers:
            x = layer.module.eval()(x)
        found.append(float(loss(x, targets)))
    return statistics.mean(found)


def main() -> None:
    """Train in all formats and print losses, and what FP8 changes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 steps, one seed")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument(
        "--formats", nargs="*", choices=FORMATS, default=list(FORMATS), help="only these"
    )
    options = parser.parse_args()
    steps, seeds = (4, [0]) if options.quick else (options.steps, options.seeds)
    torch.set_num_threads(1)
    for line in describe():
        say(line)
    found: dict[str, list[Outcome]] = {name: [] for name in options.formats}
    for seed in seeds:
        for name in found:
            outcome = train(job_of(FORMATS[name], steps=steps, seed=seed))
            found[name].append(outcome)
            progress(f"seed {seed}, {name}: {outcome.last:.4f}, {outcome.validation:.4f}")
    marks = [max(1, steps * part // 4) for part in (1, 2, 3)]
    rows = [
        [
            name,
            str(some[0].num_fp8),
            *(f"{statistics.mean(o.losses[mark - 1] for o in some):.4f}" for mark in marks),
            f"{statistics.mean(o.last for o in some):.4f}",
            f"{statistics.mean(o.validation for o in some):.4f}",
            " ".join(f"{o.validation:.4f}" for o in some),
        ]
        for name, some in found.items()
    ]
    say()
    say(f"loss in nats a byte, mean of {len(seeds)} seed(s), {steps} steps")
    titles = [f"step {mark}" for mark in marks]
    say(
        table(["format", "in FP8", *titles, f"last {LAST}", "validation", "of each seed"], rows)
    )
    worst = 0.0
    compared = [(a, b) for a, b in PLAIN.items() if a in found and b in found]
    for name, plain in compared:
        pairs = list(zip(found[name], found[plain], strict=True))
        last = [a.last / b.last - 1 for a, b in pairs]
        held_out = [a.validation / b.validation - 1 for a, b in pairs]
        worst = max(worst, statistics.mean(held_out))
        say(
            f"{name} against {plain}: last {LAST} steps {statistics.mean(last):+.2%} "
            f"({', '.join(f'{x:+.2%}' for x in last)}), validation {statistics.mean(held_out):+.2%} "
            f"({', '.join(f'{x:+.2%}' for x in held_out)})"
        )
    if compared:
        say(ratio_line(1 / (1 + worst), aim=1 / (1 + AIM)))


if __name__ == "__main__":
    main()
