"""The ways in which a layer's weight gradients can be computed, and what a trial found of one layer.

Plain data without torch: workers tell it to the head, and the head to whoever takes their place.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class Way(enum.StrEnum):
    """When a layer's large weight gradients are computed.

    `deferred`: nn.Linear and operations with a `WeightGradHolder` queue theirs until W.
    `split`: other large weights wait, too, by a backward in two parts.
    `fused`: all come with the input gradient.
    """

    DEFERRED = "deferred"
    SPLIT = "split"
    FUSED = "fused"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The way of one layer.

    Args:
        way: the choice.
        reason: why none better, or which weights do not wait; empty when there is nothing to say.
        split: names of the weights that wait by a split graph.
    """

    way: Way
    reason: str = ""
    split: frozenset[str] = frozenset()


WaysByDevice = Mapping[str, Mapping[str, Verdict]]
"""Verdicts by product name of the device that the trial ran on, and by the layer's name."""
