"""Layers whose large weights are not exactly nn.Linear's; each maps [2, 6, 16] to the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

WIDTH = 16


class ConvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.second = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x).transpose(1, 2)
        return x + self.second(torch.relu(self.first(y))).transpose(1, 2)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Scaled.apply(x.tanh(), self.weight)
        return out


class LowRankAdapter(nn.Module):
    """A frozen linear and a trained product of two plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH)
        self.base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(4, WIDTH))
        self.up = nn.Parameter(torch.randn(WIDTH, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + F.linear(F.linear(x, self.down), self.up)


class Subclass(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return out


class UsedTwice(nn.Module):
    """One weight at two places, one behind the other, once by its module and once directly."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.linear(x).tanh(), self.linear.weight)


class Nested(nn.Module):
    """One plain weight at two places, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x @ self.weight) @ self.weight


class Hooked(nn.Module):
    """Changes a gradient right where a convolution begins its backward."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.convolution(x.transpose(1, 2))
        if y.requires_grad:
            y.register_hook(lambda grad: None)
        return y.transpose(1, 2)


def attention_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(
        WIDTH, nhead=2, dim_feedforward=32, dropout=0.1, batch_first=True
    )


def linear_block() -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 32),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(32, WIDTH),
    )


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linears": linear_block,
    "convolutions": ConvBlock,
    "attention": attention_layer,
    "custom function": CustomFunction,
    "low-rank adapter": LowRankAdapter,
    "subclass": lambda: Subclass(WIDTH, WIDTH),
    "checkpointed linears": lambda: Checkpointed(linear_block()),
    "checkpointed convolutions": lambda: Checkpointed(ConvBlock()),
    "checkpointed attention": lambda: Checkpointed(attention_layer()),
    "normalised weight": lambda: weight_norm(nn.Linear(WIDTH, WIDTH)),
    "used twice": UsedTwice,
    "nested": Nested,
    "hooked": Hooked,
    "batch norm": lambda: nn.Sequential(nn.BatchNorm1d(6), Subclass(WIDTH, WIDTH)),
}
