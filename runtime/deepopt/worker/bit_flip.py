"""A flipped bit in a gradient, for drills: what a faulty memory or core does to a number."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from deepopt.pipeline.stage import Layer

_HIGHEST_EXPONENT_BIT = 1 << 30  # of fp32: what lay below 2 becomes 2^128 times as large


def flip_a_bit(layers: Iterable[Layer]) -> bool:
    """Invert a bit of the largest element of the first gradient that is there.

    Args:
        layers: in whose fp32 gradients, as far as backwards have added them up, it is looked for.

    Returns:
        False when there is no gradient that is not zero.
    """
    for layer in layers:
        for parameter in layer.trainable.values():
            gradient = parameter.grad
            if gradient is None or gradient.dtype is not torch.float32 or not gradient.any():
                continue
            flat = gradient.view(-1)
            place = int(flat.abs().argmax())
            flat[place : place + 1].view(torch.int32).bitwise_xor_(_HIGHEST_EXPONENT_BIT)
            return True
    return False
