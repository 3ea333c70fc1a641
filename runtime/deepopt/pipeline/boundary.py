"""What a tensor becomes between two layers: contiguous both ways, wherever the cuts are.

Tensors are contiguous where a cut sends them, and the layout of an operand can change the bits
of a product; so they are contiguous between any two layers. Between two layers of one graph a hook
sees to the gradients: it costs less than an autograd Function.
"""

from __future__ import annotations

from typing import Any

import torch


def enter(x: torch.Tensor) -> torch.Tensor:
    """A tensor for the next layer in the same graph.

    Returns:
        The same values. It is no leaf: the layer may write to it, as it may inside one process.
    """
    if not x.requires_grad:
        return x.contiguous()
    if x.is_leaf:
        out: torch.Tensor = _Boundary.apply(x)  # type: ignore[no-untyped-call]
        return out
    x = x.contiguous()
    x.register_hook(_contiguous)  # type: ignore[no-untyped-call]
    return x


def as_leaves(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Tensors where a graph begins; autograd keeps their gradients contiguous, too."""
    return tuple(t.detach().contiguous().requires_grad_(t.requires_grad) for t in tensors)


def _contiguous(grad: torch.Tensor) -> torch.Tensor:
    return grad.contiguous()


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.detach().contiguous()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad.contiguous()
