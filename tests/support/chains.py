"""Byte-level models with unusual layers, each a model factory's target."""

from __future__ import annotations

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
