"""Scripts with a loop of their own over `BiStreamPipeline`, and what plain PyTorch makes of the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepopt import BiStreamPipeline
from deepopt.errors import DeepoptError
from support.forking import fork_context

MICROBATCHES = 5  # the two streams get 2 and 3
SAMPLES = 20
_TIMEOUT_S = 90.0

Outcome = dict[str, Any]


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16),
        nn.LayerNorm(16),
        nn.GELU(),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 3),
    )


def make_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((SAMPLES, 6), (SAMPLES, 3))
    inputs, targets = (torch.randn(*shape, generator=generator) for shape in shapes)
    return inputs, targets


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


def grads_of(parameters: Any) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def plain(
    *, loss: Callable[[torch.Tensor, int], torch.Tensor]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Outputs and gradients of the model by itself: micro-batches add in each half, then the halves.

    Args:
        loss: of a micro-batch's output and its number.
    """
    model, (inputs, _) = make_model(), make_batch()
    outputs, halves = [], []
    chunks = inputs.chunk(MICROBATCHES)
    for half in (range(2), range(2, MICROBATCHES)):
        model.zero_grad()
        for number in half:
            output = model(chunks[number])
            outputs.append(output.detach())
            loss(output, number).backward()
        halves.append(grads_of(model.named_parameters()))
    first, second = halves
    return torch.cat(outputs), {name: first[name] + second[name] for name in first}


def own_loop(rank: int, world_size: int) -> Outcome:
    """Passes, twice, then a whole step and an update, on one rank."""
    pipeline = BiStreamPipeline(make_model(), world_size, microbatches=MICROBATCHES)
    inputs, targets = make_batch()
    state = torch.get_rng_state()
    outcome: Outcome = {"where": pipeline.output_slice(SAMPLES)}
    for turn in ("once", "twice"):
        output = pipeline.forward_pass(inputs)
        grad = None if output is None else targets[outcome["where"]]
        pipeline.backward_pass(grad)
        outcome["output"] = output
        outcome[turn] = grads_of(pipeline.named_parameters())
    pipeline.forward_pass(inputs)  # forgotten by the step
    optimizer = torch.optim.SGD(pipeline.parameters(), lr=0.1)
    optimizer.zero_grad()
    outcome["loss"] = pipeline.step(inputs, targets, loss_fn=mean_square)
    outcome["step"] = grads_of(pipeline.named_parameters())
    outcome["kept"] = torch.equal(torch.get_rng_state(), state)
    optimizer.step()
    outcome["state"] = pipeline.state_dict()
    return outcome


def two_seeds(rank: int, world_size: int) -> Outcome:
    """Ranks that begin with other weights, then ranks that are too few."""
    said = []
    for stages in (world_size, world_size + 1):
        model = make_model()
        with torch.no_grad():
            model[0].bias.add_(rank)
        try:
            BiStreamPipeline(model, stages)
        except DeepoptError as error:
            said.append(str(error))
    return {"said": said}


def run_ranks(
    script: Callable[[int, int], Outcome], *, world_size: int, folder: Path
) -> list[Outcome]:
    """What a script's processes found, by rank; the first failure fails the test."""
    folder.mkdir(exist_ok=True)
    processes = [
        fork_context().Process(
            target=_rank, args=(script, rank, world_size, folder), daemon=True
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_TIMEOUT_S)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(
    script: Callable[[int, int], Outcome], rank: int, world_size: int, folder: Path
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    torch.save(script(rank, world_size), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
