"""Signs of life through the store in which the workers meet: no call of the head for each of them.

A call of an actor costs milliseconds of CPU time on both sides, a key of the store some tens of
microseconds; twice a second and worker that is felt where training has few cores. The head reads
all keys of a generation at once. Where the store cannot be had, the sign goes by mailbox.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Protocol

from deepopt.worker.messages import Heartbeat, Sender

logger = logging.getLogger(__name__)

Address = tuple[str, int]
"""IP address and port of a store."""

STORE_ERRORS = (RuntimeError, ConnectionError)  # torch raises DistError, a RuntimeError


class BeatStore(Protocol):
    """What is used of a store that is prefixed with a generation."""

    def set(self, key: str, value: str) -> None:
        """Set a key, and wait for no answer."""
        ...

    def append(self, key: str, value: str) -> None:
        """Add to a key, which begins empty."""
        ...

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Values of keys that are there."""
        ...


class BeatSender:
    """One worker's signs of life, in one generation.

    Args:
        address: where the head's store is now; another one when the head was replaced.
        connect: opens a store, prefixed with the generation.
    """

    def __init__(
        self, *, address: Callable[[], Address], connect: Callable[[Address], BeatStore]
    ) -> None:
        self._address = address
        self._connect = connect
        self._store: BeatStore | None = None
        self._tried: Address | None = None
        self._number = 0

    def send(self, beat: Heartbeat) -> bool:
        """Leave a sign of life in the store.

        Args:
            beat: the sign.

        Returns:
            False when the store cannot be had; it is not tried again before it has moved.
        """
        address = self._address()
        try:
            if address != self._tried:
                self._store, self._tried = None, address
                self._store = self._connect(address)
            if self._store is None:
                return False
            self._number += 1
            self._store.set(_key(beat.sender.rank), _encode(beat, number=self._number))
        except STORE_ERRORS as error:
            logger.warning(
                "the head's store at %s:%d takes no signs of life, they go by mailbox: %s",
                *address,
                str(error).splitlines()[0],
            )
            self._store = None
            return False
        return True


class BeatReader:
    """The signs of life of all workers, as the head finds them.

    Args:
        open_store: the store, prefixed with a generation.
    """

    def __init__(self, open_store: Callable[[int], BeatStore]) -> None:
        self._open_store = open_store
        self._store: BeatStore | None = None
        self._generation = 0
        self._seen: list[bytes] = []

    def read(self, generation: int, world_size: int) -> list[Heartbeat]:
        """What has come since the last call; of several signs of a worker the last one.

        Args:
            generation: of the workers.
            world_size: how many they are.
        """
        keys = [_key(rank) for rank in range(world_size)]
        if self._store is None or generation != self._generation:
            self._store, self._generation = self._open_store(generation), generation
            self._seen = [b""] * world_size
            for key in keys:  # reading one that is not there would wait for it
                self._store.append(key, "")
        found = self._store.multi_get(keys)
        fresh = [new for new, old in zip(found, self._seen, strict=True) if new != old]
        self._seen = found
        return [beat for beat in map(_decode, fresh) if beat is not None]


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _encode(beat: Heartbeat, *, number: int) -> str:
    """A sign of life as text; the number makes it differ from the one before."""
    return json.dumps({"number": number, **asdict(beat)})


def _decode(text: bytes) -> Heartbeat | None:
    """A sign of life from its text; None where it is none: anybody can write to the store."""
    try:
        content = json.loads(bytes(text))
        evaluation = content["evaluation"]
        return Heartbeat(
            sender=Sender(**content["sender"]),
            step=int(content["step"]),
            progress=int(content["progress"]),
            action=str(content["action"]),
            action_s=float(content["action_s"]),
            evaluation=None if evaluation is None else (int(evaluation[0]), int(evaluation[1])),
        )
    except (ValueError, LookupError, TypeError) as error:
        logger.warning("what stands for a sign of life is none: %s", error)
        return None
