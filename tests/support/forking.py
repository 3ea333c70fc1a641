"""Where test processes are forked from: a server that has imported what they need, and never ran it."""

from __future__ import annotations

import itertools
import multiprocessing
import sys
from multiprocessing.context import ForkServerContext

_ALWAYS = (
    "deepopt.models.moe_transformer",
    "deepopt.own_loop",
    "deepopt.worker.stage_worker",
    # The first backward with gradients imports a part of it, custom autograd functions all: 1 s of CPU.
    "torch._dynamo",
)
_IF_IMPORTED = {  # seconds of CPU, for few tests
    "transformers": tuple(
        f"transformers.models.{name}.modeling_{name}"
        for name in ("deepseek_v3", "gpt2", "llama", "mixtral", "qwen3_moe", "t5")
    )
}


def fork_context() -> ForkServerContext:
    """The context of `multiprocessing` for test processes; all of a session share its server."""
    context = multiprocessing.get_context("forkserver")
    further = (names for library, names in _IF_IMPORTED.items() if library in sys.modules)
    context.set_forkserver_preload([*_ALWAYS, *itertools.chain.from_iterable(further)])
    return context
