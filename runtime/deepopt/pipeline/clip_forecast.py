"""Whether the next step's gradients will be clipped, from how often the last ones were. Pure.

Who runs ahead of the exchange of norms bets that nothing is clipped. All ranks know the same norms,
so all of them make the same bet.
"""

from __future__ import annotations

from dataclasses import dataclass

_MEMORY = 0.9  # of the share: about ten steps
# What a right bet saves, the first forwards of a step, a wrong one costs; and any bet costs a copy
# of the weights. So bet only where losing is rarer than winning by a wide margin.
_RISK_TAKEN = 0.25


@dataclass(frozen=True, slots=True)
class ClipForecast:
    """How often gradients were clipped lately.

    Args:
        share: of the steps before, the newest weighing most; in [0, 1].
        known: whether there was a step before at all.
    """

    share: float = 0.0
    known: bool = False

    def after(self, *, clipped: bool) -> ClipForecast:
        """The forecast after one more step.

        Args:
            clipped: whether its gradients were.
        """
        if not self.known:
            return ClipForecast(float(clipped), True)
        return ClipForecast(_MEMORY * self.share + (1 - _MEMORY) * clipped, True)

    @property
    def is_unlikely(self) -> bool:
        """Whether to bet on it; never without a step to judge by."""
        return self.known and self.share <= _RISK_TAKEN
