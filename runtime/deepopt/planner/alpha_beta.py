"""Fits a cost that has a fixed part and a part per byte: alpha + bytes x beta. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deepopt.errors import PlanError


@dataclass(frozen=True, slots=True, kw_only=True)
class AlphaBeta:
    """A line through times of messages.

    Args:
        alpha_s: what a message of no bytes takes.
        beta_s: what each byte adds.
        error: the largest relative distance of a measured point from the line.
    """

    alpha_s: float
    beta_s: float
    error: float

    def seconds(self, num_bytes: float) -> float:
        """What a message takes.

        Args:
            num_bytes: its size.
        """
        return self.alpha_s + num_bytes * self.beta_s

    @property
    def bytes_per_s(self) -> float | None:
        """The rate of long messages; None for no limit."""
        return 1 / self.beta_s if self.beta_s > 0 else None


def fit(sizes_bytes: Sequence[float], *, times_s: Sequence[float]) -> AlphaBeta:
    """The line that lies nearest to the points, in relative terms, with no negative part.

    Each point is weighted by 1 / time^2: a latency of microseconds counts as much as a transfer of
    milliseconds.

    Args:
        sizes_bytes: of the messages; at least two different ones.
        times_s: seconds of each, positive.

    Raises:
        PlanError: too few points.
    """
    if len(sizes_bytes) != len(times_s) or len(set(sizes_bytes)) < 2:
        raise PlanError(
            f"{len(times_s)} times of messages of {len(set(sizes_bytes))} size(s) do not show a "
            "latency and a rate",
            remedy="measure at least two sizes, each once or more",
        )
    floor_s = 1e-9  # a clock may tick between two readings
    points = [
        (size, max(time, floor_s)) for size, time in zip(sizes_bytes, times_s, strict=True)
    ]
    weights = [1 / time**2 for _, time in points]
    total = sum(weights)
    mean_size = sum(w * size for w, (size, _) in zip(weights, points, strict=True)) / total
    mean_time = sum(w * time for w, (_, time) in zip(weights, points, strict=True)) / total
    square = sum(
        w * (size - mean_size) ** 2 for w, (size, _) in zip(weights, points, strict=True)
    )
    product = sum(
        w * (size - mean_size) * (time - mean_time)
        for w, (size, time) in zip(weights, points, strict=True)
    )
    beta = max(0.0, product / square)
    alpha = mean_time - beta * mean_size
    if alpha < 0:  # the best line through the origin instead
        alpha = 0.0
        beta = sum(
            w * size * time for w, (size, time) in zip(weights, points, strict=True)
        ) / sum(w * size**2 for w, (size, _) in zip(weights, points, strict=True))
    error = max(abs(alpha + beta * size - time) / time for size, time in points)
    return AlphaBeta(alpha_s=alpha, beta_s=beta, error=error)
