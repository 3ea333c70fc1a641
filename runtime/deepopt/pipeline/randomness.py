"""Random numbers that do not depend on where a layer lives.

Each forward of a layer starts from a seed that is a function of (seed, step, micro-batch,
layer), so dropout and router noise are the same on one process, on eight, after a resume, and
in a recomputation.
"""

from __future__ import annotations

import hashlib

import torch

_MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 64-bit seed from integers; each word changes all bits.

    Source: the finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014), applied to each word
        in turn.
    """
    state = 0x9E3779B97F4A7C15
    for word in words:
        state = (state + (word & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def name_seed(seed: int, name: str) -> int:
    """A 64-bit seed from the job's seed and a name, for example of a layer to initialise."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return mix(seed, int.from_bytes(digest, "little"))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed the default generator of the CPU, and of the device if it is a GPU with its index."""
    # torch.manual_seed would walk over every backend: 97 us against 1 us (docs/architecture.md,
    # numerics).
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)
