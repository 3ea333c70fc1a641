"""Weight gradients that can wait: `linear`, and the queue that holds what was put off.

Backward of a linear map is two products: the gradient of the input, which the stage before
waits for, and the gradient of the weight, which nobody waits for. `WeightGradQueue` lets a
pipeline run the second one later::

    holder = WeightGradHolder()           # one a stage, shared by all its linear maps
    defer_linears(stage, holder)          # once, when the stage is built
    loss = stage(batch)
    queue = WeightGradQueue(holder)
    with queue.capture():
        loss.backward()                   # I: input gradients, and those of small parameters
    queue.flush()                         # W: weight gradients, in the order of queueing

Outside `capture` the same products run at once, so both ways give the same bits, and the same
bits as `nn.Linear`.

Autograd runs backward on a thread of its own for CUDA tensors, so neither a context variable
nor a thread-local could tell it that a capture is on. The holder can: forward keeps it,
backward asks it.

What it does not do: hooks on a weight (`register_hook`, `register_post_accumulate_grad_hook`)
do not see a gradient that was put off; double backward is refused; a weight that is changed
between forward and backward is not noticed, because it is kept on the graph's node and not
among the saved tensors.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class WeightGradHolder:
    """Where the operations of one stage look for the queue that captures now.

    Attributes:
        queue: the capturing queue; None when weight gradients are computed at once.
    """

    def __init__(self) -> None:
        self.queue: WeightGradQueue | None = None


class WeightGradQueue:
    """Weight gradients that were put off, in the order in which backward reached them.

    Args:
        holder: shared with the operations whose weight gradients may wait.
    """

    def __init__(self, holder: WeightGradHolder) -> None:
        self._holder = holder
        self._entries: deque[tuple[torch.Tensor, Callable[[], torch.Tensor]]] = deque()

    def __len__(self) -> int:
        return len(self._entries)

    @contextmanager
    def capture(self) -> Iterator[None]:
        """Put off the weight gradients of every backward inside the `with` block."""
        assert self._holder.queue is None, "two queues capture on one holder at the same time"
        self._holder.queue = self
        try:
            yield
        finally:
            self._holder.queue = None

    def push(self, weight: torch.Tensor, compute: Callable[[], torch.Tensor]) -> None:
        """Put off one gradient; called by operations during backward.

        Args:
            weight: leaf tensor that requires a gradient.
            compute: gives the gradient, shaped like the weight.
        """
        self._entries.append((weight, compute))

    def weights(self) -> list[torch.Tensor]:
        """The weights whose gradients wait, once a use."""
        return [weight for weight, _ in self._entries]

    @torch.no_grad()
    def flush(self) -> None:
        """Compute what was put off, add it to each `weight.grad` as autograd would, and forget
        it.

        A weight used several times inside one backward gets the sum of its uses in one
        addition, because autograd also sums the uses before it touches `weight.grad`.
        """
        entries, self._entries = self._entries, deque()
        left = Counter(id(weight) for weight, _ in entries)
        partial: dict[int, torch.Tensor] = {}
        while entries:
            weight, compute = entries.popleft()  # frees the saved activations one by one
            gradient = compute()
            key = id(weight)
            if key in partial:
                gradient = partial.pop(key) + gradient
            left[key] -= 1
            if left[key]:
                partial[key] = gradient
            elif weight.grad is None:
                weight.grad = gradient
            else:
                weight.grad.add_(gradient)


def produce(
    holder: WeightGradHolder | None,
    weight: torch.Tensor,
    compute: Callable[[], torch.Tensor],
) -> torch.Tensor | None:
    """What a backward should return as weight gradient: None when it was queued.

    Args:
        holder: as forward got it.
        weight: as forward got it; only a leaf can wait, since the gradient of any other tensor
            flows on.
        compute: gives the gradient, shaped like the weight.
    """
    queue = None if holder is None else holder.queue
    if queue is None or not weight.is_leaf:
        return compute()
    queue.push(weight, compute)
    return None


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    holder: WeightGradHolder | None = None,
) -> torch.Tensor:
    """`F.linear` whose weight gradient can wait; the bias gradient never does.

    Args:
        x: [..., in_features].
        weight: [out_features, in_features].
        bias: [out_features].
        holder: asked in backward for a capturing queue; None computes everything at once.

    Returns:
        [..., out_features], same bits as `F.linear`, as are the gradients.
    """
    if x.dim() < 2:
        return F.linear(x, weight, bias)
    out: torch.Tensor = _Linear.apply(x, weight, bias, holder)  # type: ignore[no-untyped-call]
    return out


class DeferringLinear(torch.nn.Linear):
    """`nn.Linear` whose weight gradient can wait; made from one by `defer_linears`."""

    weight_grad_holder: WeightGradHolder

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] to [..., out_features]."""
        return linear(input, self.weight, self.bias, holder=self.weight_grad_holder)


def defer_linears(module: torch.nn.Module, holder: WeightGradHolder) -> None:
    """Let the weight gradients of a module's matrix products wait for `holder`'s queue.

    Every instance of exactly `nn.Linear` becomes a `DeferringLinear`; names and parameters stay
    as they are. Subclasses are left alone, because their forward may be another. Any module
    that has an attribute `weight_grad_holder` gets the holder: that is how a module with an
    operation of its own takes part.

    Args:
        module: searched with all its submodules, itself included.
        holder: of the stage.
    """
    for part in module.modules():
        if type(part) is torch.nn.Linear:
            part.__class__ = DeferringLinear
        elif not hasattr(part, "weight_grad_holder"):
            continue
        part.weight_grad_holder = holder  # type: ignore[assignment]


class _Linear(torch.autograd.Function):
    """The products below are those of autograd's own `addmm` and `mm`, layout by layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        holder: WeightGradHolder | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.weight = weight
        ctx.holder = holder
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[Any, ...]:
        (x,) = ctx.saved_tensors
        weight: torch.Tensor = ctx.weight
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        rows, grad_rows = _as_matrix(x), _as_matrix(grad_out)
        grad_x = grad_weight = grad_bias = None
        if needs_x:
            if rows.stride() == (1, rows.shape[0]):  # column-major in, column-major out
                grad_x = weight.t().mm(grad_rows.t()).t()
            else:
                grad_x = grad_rows.mm(weight)
            grad_x = grad_x.reshape(x.shape)
        if needs_weight:
            grad_weight = produce(
                ctx.holder,
                weight,
                lambda: grad_rows.t().mm(rows),
            )
        if needs_bias:
            # F.linear adds the bias inside the product only if it can view x as a matrix.
            summed = grad_rows if x.dim() == 2 or x.is_contiguous() else grad_out
            grad_bias = summed.sum(tuple(range(summed.dim() - 1)))
        return grad_x, grad_weight, grad_bias, None


def _as_matrix(x: torch.Tensor) -> torch.Tensor:
    # A matrix stays as it is: reshape gives one row or column other strides, by which autograd and
    # then the library of the processor choose their kernels.
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
