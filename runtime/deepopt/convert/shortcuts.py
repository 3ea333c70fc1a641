"""Questions to the inputs whose answer no is right for every micro-batch: may this mask be left out?

`transformers` makes no attention mask where nothing is padded. A mask that is made all the same gives the
same attention up to rounding: so a forward that was recorded with a mask serves both.
"""

from __future__ import annotations

import sys

_MODULE = "transformers.masking_utils"
_FUNCTIONS = frozenset(
    [
        "_ignore_causal_mask_sdpa",
        "_ignore_bidirectional_mask_sdpa",
        "_can_skip_bidirectional_mask_xpu",
        "flash_attention_mask",
    ]
)
REMEDY = (
    "the first micro-batch had no padding and this one has: give example inputs with padding (a job takes "
    "a padded micro-batch of its first step, if there is one), leave the mask out where nothing is padded, "
    'or make the model with attn_implementation="eager"'
)


def asks_whether_a_mask_is_needed() -> bool:
    """Whether the code that runs now is one of `transformers`' that skip a mask without padding."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        if (
            frame.f_code.co_name in _FUNCTIONS
            and frame.f_globals.get("__name__", "") == _MODULE
        ):
            return True
        frame = frame.f_back
    return False
