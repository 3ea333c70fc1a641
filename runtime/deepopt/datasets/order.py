"""In which order samples are seen: a permutation an epoch, computed index by index, without a
table.

The sample at a position depends on (seed, epoch, number of samples) alone, so the cursor of a
run is one number and any worker can find any sample. Pure.
"""

from __future__ import annotations

import hashlib

_ROUNDS = (
    6  # four make a Feistel network pseudo-random; two more, because small domains need them
)


def sample_index(position: int, *, num_samples: int, seed: int) -> int:
    """The sample at a position of the endless sequence of epochs; no sample twice in an epoch.

    Args:
        position: samples seen before this one, since the start of the job.
        num_samples: samples of one epoch, at least 1.
        seed: of the job.
    """
    epoch, offset = divmod(position, num_samples)
    return _permuted(offset, length=num_samples, key=f"{seed}/{epoch}".encode())


def _permuted(index: int, *, length: int, key: bytes) -> int:
    """Where a keyed permutation of range(length) sends an index.

    Source: Feistel network (Luby and Rackoff, 1988) over the next power of four, with cycle
        walking (Black and
    Rogaway, 2002): outside the range, permute again.
    """
    half_bits = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    while True:
        left, right = index >> half_bits, index & mask
        for turn in range(_ROUNDS):
            word = right.to_bytes(8, "little") + bytes([turn])
            digest = hashlib.blake2b(word, key=key, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = (left << half_bits) | right
        if index < length:
            return index
