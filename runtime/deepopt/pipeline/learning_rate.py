"""The learning rate of a step: linear warm-up, then constant or cosine. Pure."""

from __future__ import annotations

import math

from deepopt.config import OptimizerConfig


def learning_rate(step: int, config: OptimizerConfig) -> float:
    """The learning rate used in a step.

    Args:
        step: 1-based.
        config: `decay_steps` is the horizon of the cosine, counted from step 1; None means
            constant after the warm-up. The number of steps to train does not enter, so stopping
            early changes nothing.
    """
    peak = config.learning_rate
    if step <= config.warmup_steps:
        return peak * step / config.warmup_steps
    if config.decay_steps is None:
        return peak
    done = (step - config.warmup_steps) / max(1, config.decay_steps - config.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return peak * (config.min_ratio + (1.0 - config.min_ratio) * cosine)
