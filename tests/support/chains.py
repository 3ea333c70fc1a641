"""Byte-level models with unusual layers, each a model factory's target."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_BYTES = 256


class _InPlace(nn.Module):
    """Changes its input, so that a second run over it would give something else."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(0.5).add_(0.1)


def in_place() -> nn.Sequential:
    return nn.Sequential(
        nn.Embedding(_BYTES, 32),
        nn.Linear(32, 16),
        _InPlace(),
        nn.Dropout(0.1, inplace=True),
        nn.Linear(16, _BYTES),
    )


class _MaskAndEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(_BYTES, 16)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embedded = self.embed(ids)
        return (ids % 2).float().unsqueeze(-1).expand(embedded.shape), embedded


class _Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(16, 16)

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return mask, x + mask * self.body(x)


class _MaskedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, _BYTES)

    def forward(self, mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.head(mask * x)


def masked() -> nn.Sequential:
    """Passes on a mask of the shape of the activations, without a gradient, before them."""
    return nn.Sequential(_MaskAndEmbedding(), _Masked(), _Masked(), _MaskedHead())


class _Turn(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


def turned() -> nn.Sequential:
    """Linear maps over positions and over features in turn; sequences of 32."""
    return nn.Sequential(
        nn.Embedding(_BYTES, 33),
        _Turn(),
        nn.Linear(32, 32),
        _Turn(),
        nn.Linear(33, 37),
        _Turn(),
        nn.Linear(32, 32),
        _Turn(),
        nn.Linear(37, _BYTES),
    )


class _Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.body = nn.Linear(32, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(self.norm(x))


def shared_norm() -> nn.Sequential:
    """Two layers hold one module with parameters."""
    norm = nn.LayerNorm(32)
    return nn.Sequential(
        nn.Embedding(_BYTES, 32), _Residual(norm), _Residual(norm), nn.Linear(32, _BYTES)
    )


class _Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.convolution(x.transpose(1, 2)).relu().transpose(1, 2)


class _Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.t(), x.flatten(0, -2).t() @ grad.flatten(0, -2)


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 32) / 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = _Doubled.apply(x, self.weight)
        return out


def mixed() -> nn.Sequential:
    """Layers whose weight gradients wait in different ways, or cannot."""
    encoder = nn.TransformerEncoderLayer(32, nhead=2, dim_feedforward=64, batch_first=True)
    return nn.Sequential(
        nn.Embedding(_BYTES, 32), _Convolved(), encoder, _Custom(), nn.Linear(32, _BYTES)
    )
