"""The ways in which a layer's weight gradients can be computed, and what a trial found of one layer.

Plain data without torch: workers tell it to the head, and the head to whoever takes their place.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self


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
        code: hash of the layer's source files; empty where there are none.
    """

    way: Way
    reason: str = ""
    split: frozenset[str] = frozenset()
    code: str = ""

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return {
            "way": str(self.way),
            "reason": self.reason,
            "split": sorted(self.split),
            "code": self.code,
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """From what `to_json` gave."""
        return cls(
            way=Way(content["way"]),
            reason=content["reason"],
            split=frozenset(content["split"]),
            code=content["code"],
        )


WaysByConditions = Mapping[str, Mapping[str, Verdict]]
"""Verdicts by the conditions of the trial (device, versions, inputs), and by the layer's name."""
