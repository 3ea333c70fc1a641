"""Scripts with a loop of their own over `BiStreamPipeline`, and what plain PyTorch makes of the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from deepopt import BiStreamPipeline
from deepopt.errors import DeepoptError
from deepopt.models.feed_forward import MoeFeedForward
from deepopt.moe import ElbRouter
from deepopt_kernels.weight_grad import DeferringLinear
from support.forking import fork_context

MICROBATCHES = 5  # the two streams get 2 and 3
SAMPLES = 20
TIED_MICROBATCHES = 8
TIED_GROUPS = 4
TOKENS = 12
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


class ExpertBlock(nn.Module):
    """A residual mixture of experts behind a norm that may be another block's, too."""

    def __init__(self, norm: nn.Module, **options: Any) -> None:
        super().__init__()
        self.norm = norm
        router = ElbRouter(8, num_experts=4, top_k=2, **options)
        self.experts = MoeFeedForward(
            8, router=router, num_experts=4, num_shared_experts=0, hidden=8
        )
        self.experts.reset_parameters(std=0.3, residual_std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = x + self.experts(self.norm(x))
        return out


def make_tied_experts(*, tied: bool = True) -> nn.Sequential:
    """Two blocks of experts under one norm, and a head that is the embedding.

    Args:
        tied: False: the same values without any tie.
    """
    torch.manual_seed(0)
    norm = nn.LayerNorm(8)
    embedding, head = nn.Embedding(TOKENS, 8), nn.Linear(8, TOKENS, bias=False)
    blocks = [ExpertBlock(norm), ExpertBlock(norm if tied else nn.LayerNorm(8))]
    if tied:
        head.weight = embedding.weight
    else:
        head.weight = nn.Parameter(embedding.weight.detach().clone())
    return nn.Sequential(embedding, *blocks, head)


def make_tokens(turn: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of a batch."""
    generator = torch.Generator().manual_seed(turn)
    shape = (2 * TIED_MICROBATCHES, 5)
    inputs, targets = (
        torch.randint(TOKENS, shape, generator=generator, dtype=torch.int64) for _ in range(2)
    )
    return inputs, targets


def token_loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())


def tied_loop(
    rank: int, world_size: int, *, stages: Sequence[int], defer_weights: bool = False
) -> Outcome:
    """Whole steps, then two batches for one update by separate passes; in replicas where there are more
    processes than stages."""
    replicas = max(1, world_size // len(stages))
    model = make_tied_experts()
    pipeline = BiStreamPipeline(
        model,
        stages,
        microbatches=TIED_MICROBATCHES // replicas,
        groups=TIED_GROUPS,
        defer_weights=defer_weights,
    )
    optimizer = torch.optim.AdamW(pipeline.parameters(), lr=0.05)

    def share(turn: int) -> Iterator[torch.Tensor]:
        mine = rank // len(stages)
        return (tensor.chunk(replicas)[mine] for tensor in make_tokens(turn))

    losses = []
    for turn in range(2):
        optimizer.zero_grad()
        losses.append(pipeline.step(*share(turn), loss_fn=token_loss))
        pipeline.update_routers()
        optimizer.step()
    optimizer.zero_grad()
    for turn in (2, 3):
        inputs, targets = share(turn)
        output = pipeline.forward_pass(inputs)
        where = pipeline.output_slice(len(inputs))
        grad = None
        if output is not None:
            parts = TIED_MICROBATCHES // replicas // (1 if world_size == 1 else 2)
            for out, target in zip(
                output.chunk(parts), targets[where].chunk(parts), strict=True
            ):
                (token_loss(out, target) / TIED_MICROBATCHES).backward()
            grad = output.grad
        pipeline.backward_pass(grad)
    pipeline.update_routers()
    grads = grads_of(pipeline.named_parameters())
    optimizer.step()
    return {
        "losses": losses,
        "grads": grads,
        "state": pipeline.state_dict(),
        "defers": type(model[3]) is DeferringLinear,
        "is_tied": model[3].weight is model[0].weight and model[1].norm is model[2].norm,
    }


def plain_tied_loop() -> Outcome:
    """What plain PyTorch makes of `tied_loop`, each use with a gradient of its own: groups add in their
    order, then the uses."""
    model = make_tied_experts(tied=False)
    named = dict(model.named_parameters())
    same = {"3.weight": "0.weight", "2.norm.weight": "1.norm.weight"}
    same["2.norm.bias"] = "1.norm.bias"
    optimizer = torch.optim.AdamW([p for n, p in named.items() if n not in same], lr=0.05)
    routers = [module for module in model.modules() if isinstance(module, ElbRouter)]
    losses: list[float] = []

    def add_batch(turn: int, total: dict[str, torch.Tensor]) -> None:
        chunks = [tensor.chunk(TIED_MICROBATCHES) for tensor in make_tokens(turn)]
        found: dict[str, torch.Tensor] = {}
        mean = 0.0
        per_group = TIED_MICROBATCHES // TIED_GROUPS
        for group in range(TIED_GROUPS):
            model.zero_grad()
            for number in range(group * per_group, (group + 1) * per_group):
                loss = token_loss(model(chunks[0][number]), chunks[1][number])
                mean += loss.item() / TIED_MICROBATCHES
                (loss / TIED_MICROBATCHES).backward()
            for name, grad in grads_of(named.items()).items():
                found[name] = found[name] + grad if name in found else grad
        for use, first in same.items():
            found[first] = found[first] + found.pop(use)
        for name, grad in found.items():
            total[name] = total[name] + grad if name in total else grad
        losses.append(mean)

    total: dict[str, torch.Tensor] = {}
    for turns in ((0,), (1,), (2, 3)):
        total.clear()
        for turn in turns:
            add_batch(turn, total)
        for name, parameter in named.items():
            parameter.grad = total.get(name)
        for router in routers:
            router.update()
        optimizer.step()
        with torch.no_grad():
            for use, first in same.items():
                named[use].copy_(named[first])
    return {"losses": losses[:2], "grads": total, "state": model.state_dict()}


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
