"""Which calls of a router repeat a micro-batch that it has seen in this step, and what was chosen then.

A micro-batch that runs again (recomputation, R, a checkpointed block) is counted once, and where routes are
kept, routed once. Does not choose or count.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch

CallKey = tuple[Hashable, int]  # a micro-batch, and the how manieth call in its pass


class RouteMemory:
    """Of one router, for one step."""

    def __init__(self) -> None:
        self._pass: CallKey | None = None
        self._routes: dict[CallKey, torch.Tensor] = {}
        self._counted: set[CallKey] = set()

    def begin_step(self) -> None:
        """Forget the micro-batches of the step before."""
        self._pass = None
        self._routes.clear()
        self._counted.clear()

    def begin_pass(self, key: Hashable) -> None:
        """Say which micro-batch the next calls work on."""
        self._pass = (key, 0)

    def end_pass(self) -> None:
        """The next calls work on nothing that has a name."""
        self._pass = None

    def next_call(self) -> tuple[CallKey | None, bool]:
        """The key of this call, None without a pass; and whether it repeats one that was counted."""
        if _in_backward():
            # A checkpointed block runs its forward again: same tokens, same bias.
            return None, True
        if self._pass is None:
            return None, False
        key = self._pass
        self._pass = (key[0], key[1] + 1)
        again = key in self._counted
        self._counted.add(key)
        return key, again

    def keep(self, key: CallKey, ids_TK: torch.Tensor) -> None:
        """Keep the choices of a call for the one that repeats it."""
        self._routes[key] = ids_TK

    def take(self, key: CallKey | None) -> torch.Tensor | None:
        """The choices that were kept, once."""
        return None if key is None else self._routes.pop(key, None)


def _in_backward() -> bool:
    """Whether autograd is calling: the forward then is a repetition for activation checkpointing."""
    if torch.compiler.is_compiling():  # the compiler runs what counts once
        return False
    return bool(torch._C._current_graph_task_id() != -1)
