"""Why a pipeline's losses of a model with tied weights are not those of a plain loop to the last bit.

T5 uses one matrix three times: as the embedding of the encoder, of the decoder, and as the head. Autograd
adds the gradients of the uses in each micro-batch, and then the micro-batches; a pipeline, whose uses lie
on several ranks, adds the micro-batches of each use, and then the uses. Here plain PyTorch trains a T5 whose
uses are parameters of their own, kept equal, and adds their gradients

- as autograd does: must have the bits of the model as it is;
- as a pipeline does: must have the bits of one worker with one group of micro-batches, which are those of
  any line;
- in each other order of the uses, to see what any order makes;

with AdamW and, to see what the optimizer makes of a last bit, with SGD. Figures are the largest difference of
a loss from the model as it is. No ratio.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _architectures import Make, Size, architectures
from _machine import describe
from _report import progress, say, table
from models import MICROBATCH_SIZE, MICROBATCHES, SEED, Rows, Trained, made, without_cache

from deepopt import convert
from deepopt.datasets.batch_source import build_batch_source
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.step import PipelineStep
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.trainer.data import Reading, read_data
from deepopt.trainer.job import Settings, job_of

USES = ("encoder", "decoder", "head")
# Gradients of the uses, by use, of each micro-batch, to their sum.
Sum = Callable[[Mapping[str, Sequence[torch.Tensor]]], torch.Tensor]
Optimizer = Callable[[Any], torch.optim.Optimizer]


def by_microbatch(order: Sequence[str]) -> Sum:
    """The uses of each micro-batch, then the micro-batches.

    Args:
        order: of the uses.
    """
    return lambda grads: _added(
        [_added([grads[use][m] for use in order]) for m in range(MICROBATCHES)]
    )


def by_use(order: Sequence[str]) -> Sum:
    """The micro-batches of each use, then the uses.

    Args:
        order: of the uses.
    """
    return lambda grads: _added([_added(grads[use]) for use in order])


def _added(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    total = terms[0].clone()
    for term in terms[1:]:
        total.add_(term)
    return total


def train(make: Make, optimizer: Optimizer, add: Sum | None) -> Trained:
    """Train in plain PyTorch.

    Args:
        make: gives the model and its data.
        optimizer: of parameters.
        add: sums the gradients of the uses; None: the weights stay tied.
    """
    model, data = made(make)
    without_cache(model)
    uses: dict[str, torch.nn.Parameter] = {}
    if add is not None:
        uses = _untied(model)
    later = {id(p) for name, p in uses.items() if name != USES[0]}
    updater = optimizer([p for p in model.parameters() if id(p) not in later])
    losses = []
    batches = iter(torch.utils.data.DataLoader(Rows(data), batch_size=MICROBATCH_SIZE))
    for _ in range(len(Rows(data)) // (MICROBATCHES * MICROBATCH_SIZE)):
        updater.zero_grad()
        found: list[float] = []
        grads: dict[str, list[torch.Tensor]] = {use: [] for use in uses}
        for _ in range(MICROBATCHES):
            loss = model(**next(batches)).loss
            (loss / MICROBATCHES).backward()
            found.append(loss.item())
            for use, parameter in uses.items():
                assert parameter.grad is not None, use
                grads[use].append(parameter.grad)
                parameter.grad = None
        if add is not None:
            uses[USES[0]].grad = add(grads)
        updater.step()
        with torch.no_grad():
            for parameter in uses.values():
                parameter.copy_(uses[USES[0]])
        losses.append(math.fsum(found) / MICROBATCHES)
    return Trained(losses=tuple(losses), state={})


def _untied(model: Any) -> dict[str, torch.nn.Parameter]:
    """Give each use of the shared matrix a parameter of its own."""
    for part in (model.encoder, model.decoder):
        part.embed_tokens = copy.deepcopy(model.shared)
    model.lm_head.weight = torch.nn.Parameter(model.shared.weight.detach().clone())
    model.shared = torch.nn.Identity()  # nobody calls it
    return {
        "encoder": model.encoder.embed_tokens.weight,
        "decoder": model.decoder.embed_tokens.weight,
        "head": model.lm_head.weight,
    }


def one_worker(make: Make, optimizer: Optimizer, folder: Path) -> Trained:
    """Train as a worker of a job does that holds all layers.

    Args:
        make: gives the model and its data.
        optimizer: of parameters.
        folder: for what the job brings along.
    """
    model, data = made(make)
    batch_size = MICROBATCHES * MICROBATCH_SIZE
    reading = Reading(
        batch_size=batch_size, microbatches=MICROBATCHES, shuffle=False, seed=SEED
    )
    read = read_data(Rows(data), model=model, reading=reading)
    steps = len(Rows(data)) // batch_size
    settings = Settings(
        device_map=None, workers=1, placement="line", elb={}, loss_fn=None, optimizer_kwargs=None,
        optimizer=lambda named: optimizer([p for _, p in named]), lr_scheduler=None,
        lr_scheduler_kwargs=None, grad_clip=None, groups=1, name="tied", hostfile=None, address=None,
        overrides={"logging": {"peak_flops": 1e9}},
    )  # fmt: skip
    job = job_of(model, read, settings, steps=steps, folder=folder)
    skeleton = convert.describe(job)
    plan = Plan(
        plan_id=1,
        layer_names=tuple(layer.name for layer in skeleton.layers),
        boundaries=(0,),
        placement=PlacementKind.LINE,
        schedule="1f1b",
        pipeline_size=1,
        data_size=1,
        num_microbatches=MICROBATCHES,
        num_groups=1,
    )
    indices, device = range(len(skeleton.layers)), torch.device("cpu")
    layers, loss = convert.build_layers(job, indices, device=device)
    step = PipelineStep(
        job=job,
        plan=plan,
        skeleton=skeleton,
        rank=0,
        layers=dict(zip(indices, layers, strict=True)),
        loss=loss,
        transport=LoneTransport(),
        batches=build_batch_source(job, run_dir=None),
        device=device,
    )
    return Trained(
        losses=tuple(step.run(number).loss for number in range(1, steps + 1)), state={}
    )


def main() -> None:
    """Train in all orders and print how far they are from the model as it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="of each training")
    parser.add_argument("--quick", action="store_true", help="three steps, AdamW alone")
    options = parser.parse_args()
    if options.quick:
        options.steps = 3
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # as the workers
    say("\n".join(describe()))
    samples = options.steps * MICROBATCHES * MICROBATCH_SIZE
    make = architectures(Size(width=64, depth=4, length=16, samples=samples))["T5"]
    say(f"T5, {options.steps} steps of {MICROBATCHES} micro-batches\n")
    optimizers: dict[str, Optimizer] = {
        "AdamW, 1e-3": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3)
    }
    if not options.quick:
        optimizers["SGD, 0.1"] = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    for words, optimizer in optimizers.items():
        progress(words)
        tied = train(make, optimizer, None)
        pipeline = train(make, optimizer, by_use(USES))
        rows = []
        for name, rule in (
            ("uses, then micro-batches", by_microbatch),
            ("micro-batches, then uses", by_use),
        ):
            for order in itertools.permutations(USES):
                found = train(make, optimizer, rule(order))
                rows.append((name, ", ".join(order), _distance(found, tied)))
        say(f"{words}: the last loss is {tied.losses[-1]:.4f}")
        say(table(("added", "uses", "largest difference"), rows) + "\n")
        with tempfile.TemporaryDirectory() as folder:
            worker = one_worker(make, optimizer, Path(folder))
        say(f"one worker from the model as it is: {_distance(worker, tied)}")
        in_order = "micro-batches, then uses (encoder, decoder, head)"
        say(f"one worker from {in_order}: {_distance(worker, pipeline)}\n")


def _distance(found: Trained, other: Trained) -> str:
    same = found.losses == other.losses
    return "bit-equal" if same else f"{found.distance(other):.1e}"


if __name__ == "__main__":
    main()
