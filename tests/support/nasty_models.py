"""Models that pipelines refuse, each a model factory's target over `[2, 6]` features or bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

WIDTH = 8


class Block(nn.Module):
    """Part of most models below."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class _Blocks(nn.Module):
    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.embed = nn.Linear(6, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(count))
        self.head = nn.Linear(WIDTH, 3)


class Skips(_Blocks):
    """A U-shape: each block of the second half gets what its mirror image made; residuals are in the
    model's own forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        kept = []
        for block in self.blocks[:2]:
            x = x + block(x)
            kept.append(x)
        for block in self.blocks[2:]:
            x = block(x) * 0.5 + kept.pop()
        return self.head(x)


class Noisy(_Blocks):
    """Random numbers in the model's own forward, drawn from what is used again much later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.dropout(self.embed(x), 0.5, self.training)
        gate = torch.rand_like(x)
        for block in self.blocks:
            x = x + block(x) * gate
        return self.head(x + torch.randn_like(x))


class TwoInputs(_Blocks):
    """A mask of booleans that the last block uses first, and an argument that is no tensor."""

    def forward(
        self, x: torch.Tensor, *, mask: torch.Tensor, scale: float = 2.0
    ) -> dict[str, Any]:
        x = self.embed(x)
        hidden = []
        for block in self.blocks:
            x = x + block(x)
            hidden.append(x)
        x = x.masked_fill(mask.unsqueeze(-1), 0.0) * scale
        return {"logits": self.head(x), "hidden": hidden, "note": "as it was"}


@dataclass
class Result:
    logits: torch.Tensor
    pooled: torch.Tensor
    steps: int


class Recurrent(_Blocks):
    """One block three times, a parameter of the model itself, a dataclass as its output."""

    def __init__(self) -> None:
        super().__init__(count=1)
        self.gain = nn.Parameter(torch.full((WIDTH,), 0.5))

    def forward(self, x: torch.Tensor) -> Result:
        x = self.embed(x) * self.gain
        for _ in range(3):
            x = x + self.blocks[0](x) * self.gain
        return Result(logits=self.head(x), pooled=x.mean(0), steps=3)


class Counting(_Blocks):
    """Writes to a buffer of its own and to one in a layer, and to tensors in place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("table", torch.linspace(0.0, 1.0, WIDTH), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(self.norm(x) if block is self.blocks[1] else x)
            x[:, 0] = 0.0
        x += self.table
        return self.head(x)


class _Double(torch.autograd.Function):
    """Its backward is not that of its forward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 2.0

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * 3.0


class Custom(_Blocks):
    """A custom backward between layers, recomputation around one, a hook on another, a frozen one,
    and a part of the forward without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].register_forward_hook(lambda module, args, output: output + args[0])
        self.blocks[2].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = _Double.apply(self.embed(x))
        x = torch.utils.checkpoint.checkpoint(self.blocks[0], x, use_reentrant=False)
        for block in self.blocks[1:]:
            x = block(x)
        with torch.no_grad():
            scale = 1.0 / (1.0 + x.abs().amax())
        return self.head(x * scale), scale


class Branching(_Blocks):
    """Goes another way when the inputs are negative on average."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        negative = x.mean() < 0
        x = self.embed(x)
        for block in self.blocks:
            x = x - block(x) if negative else x + block(x)
        return self.head(x)


class BranchingOnLayers(_Blocks):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            if x.sum() > 0:
                x = block(x)
        return self.head(x)


class Collecting(_Blocks):
    """Takes what a hook has collected inside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.blocks[1].up.register_forward_hook(lambda m, a, output: self.seen.append(output))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.clear()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.seen[0].mean()


class Handing(_Blocks):
    """Hooks hand out what is made inside layers, while the forward asks for it: as libraries collect
    router logits. Between layers: a hook on a tensor, the largest of some, a result cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.sink: list[torch.Tensor] | None = None
        for part in (self.blocks[1].up, self.blocks[2].down):
            part.register_forward_hook(self._hand_out)

    def _hand_out(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.sink is not None:
            self.sink.append(output)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.sink = []
        x = self.embed(x)
        for block in self.blocks:
            largest = x.topk(3, dim=-1)
            x = block(x) + torch.zeros_like(x).scatter(1, largest.indices, largest.values)
            x.register_hook(lambda grad: grad * 2.0)
        apart = x * 0.5
        apart.detach_()
        x = self.head(x + apart) + sum(part.mean() for part in self.sink)
        self.sink = None
        return x


class FrozenFront(_Blocks):
    """The first half learns nothing, and gives no gradient either."""

    def __init__(self) -> None:
        super().__init__()
        for part in (self.embed, *self.blocks[:2]):
            part.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Differentiating(_Blocks):
    """Goes back through its own layers in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        y = self.blocks[0](x)
        (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return self.head(y + grad)


class Compiled(_Blocks):
    """Blocks that `torch.compile` has wrapped; one of them frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[2].requires_grad_(False)
        for index in (0, 2):
            self.blocks[index] = torch.compile(self.blocks[index], backend="eager")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Adapter(nn.Module):
    """A frozen linear layer and a trained correction of low rank, as adapter libraries write it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, base.out_features, bias=False)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A["default"](x)
        return self.base_layer(x) + 2.0 * self.lora_B["default"](low)


class Adapted(nn.Module):
    """Wraps a model of another library: freezes it, puts adapters in, hides its arguments."""

    def __init__(self, model: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.base_model = model.requires_grad_(False)
        for path, part in list(model.named_modules()):
            if path.rpartition(".")[2] in parts and isinstance(part, nn.Linear):
                owner = model.get_submodule(path.rpartition(".")[0])
                setattr(owner, path.rpartition(".")[2], Adapter(part))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Replacing(_Blocks):
    """Puts a new tensor in a buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls = self.calls + 1
        return self.head(self.blocks[0](self.embed(x)))


class SharedMemory(_Blocks):
    """Writes to a view behind a layer while the whole is used later."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        part = x[:, :2]
        y = self.blocks[0](x)
        part.mul_(2.0)
        return self.head(self.blocks[1](y) + x)


class Cache:
    def __init__(self) -> None:
        self.states: list[torch.Tensor] = []


class _Caching(Block):
    def forward(self, x: torch.Tensor, cache: Cache) -> torch.Tensor:  # type: ignore[override]
        cache.states.append(x)
        return super().forward(x + cache.states[0])


class Carrying(_Blocks):
    """Layers speak to each other through an object."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Caching() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cache = Cache()
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, cache)
        return self.head(x)


class Batches:
    """Micro-batches `[4, 6]` for the models above."""

    tokens_per_microbatch = 4

    def __init__(self, mask: bool = False) -> None:
        self.mask = mask

    def batch(self, step: int, microbatch: int) -> tuple[Any, torch.Tensor]:
        generator = torch.Generator().manual_seed(step * 1000 + microbatch)
        x = torch.rand(4, 6, generator=generator)
        targets = torch.randint(0, 3, (4,), generator=generator)
        return ({"x": x, "mask": x[:, 0] > 0.5} if self.mask else x), targets
