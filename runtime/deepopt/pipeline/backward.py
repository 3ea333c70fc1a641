"""One pass of autograd's engine, without the checks that torch makes before each.

`torch.autograd.backward` compares shapes as if they might be symbols before it enters the engine: 30
of the 80 us of a small backward, and a stage runs one or two a micro-batch. What a stage passes has been
compared already (stages tell each other their shapes), and the engine itself refuses gradients of
another shape. The same engine runs, so gradients have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.autograd.graph import (
    GradientEdge,
    _engine_run_backward,  # what every entry of torch.autograd ends in
)

Roots = Sequence[torch.Tensor] | Sequence[GradientEdge]
_PLAIN = (torch.Tensor, GradientEdge)  # others may have a backward of their own


def add_gradients(roots: Roots, grads: Sequence[torch.Tensor | None]) -> None:
    """Add to `grad` of every leaf behind some roots, as `torch.autograd.backward` does.

    Args:
        roots: outputs of a graph that require a gradient, or their edges.
        grads: one for each root, shaped like it; of a scalar None may stand for one. Empty: for all.

    Raises:
        RuntimeError: a gradient has another shape than its root.
    """
    if not _all_plain(roots, grads):
        torch.autograd.backward(roots, list(grads) or None)
        return
    _engine_run_backward(
        tuple(roots),
        tuple(grads),
        False,  # the graph is freed
        False,  # and none is made
        (),
        allow_unreachable=True,
        accumulate_grad=True,
    )


def gradient_at(root: torch.Tensor, inner: torch.Tensor, *, grad: torch.Tensor) -> torch.Tensor:
    """The gradient at a tensor inside a graph; the graph up to it is freed, no leaf takes anything.

    Args:
        root: what a gradient is known of.
        inner: on the way from `root` to the leaves.
        grad: of the root, shaped like it.

    Raises:
        RuntimeError: the root does not depend on the tensor.
    """
    if not _all_plain((root, inner), (grad,)):
        (found,) = torch.autograd.grad(root, inner, grad)
        return found
    (found,) = _engine_run_backward(
        (root,), (grad,), False, False, (inner,), allow_unreachable=False, accumulate_grad=False
    )
    return found


def _all_plain(roots: Roots, grads: Sequence[torch.Tensor | None]) -> bool:
    return (
        bool(grads)
        and all(type(root) in _PLAIN for root in roots)
        and all(type(grad) is torch.Tensor for grad in grads)
    )
