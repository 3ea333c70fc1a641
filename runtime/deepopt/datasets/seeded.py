"""Random numbers of a user's data code: a function of what is read, not of who reads it.

Inputs are read by the worker with the first layers, targets by the one with the last: augmentation
and masking have to come out alike in both, and must not meddle with dropout.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def seeded(*key: int | str) -> Iterator[None]:
    """Seed the global generators of Python, numpy and torch (CPU) inside; restore them after.

    Args:
        key: the same key gives the same numbers.
    """
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    seed = int.from_bytes(digest, "little") >> 1  # torch takes it as signed
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - what users' code draws from
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
