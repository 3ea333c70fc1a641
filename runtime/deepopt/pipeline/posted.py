"""Sends, receives and exchanges of a process group that are under way, and what its errors say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist

from deepopt.errors import TransportError
from deepopt.pipeline.send_waits import SendWaits

BACKEND_ERRORS = (RuntimeError, ConnectionError)  # torch raises DistError, a RuntimeError
EXCHANGE = "exchange of norms and losses at the end of the step"


class Posted:
    """A receive into a tensor of the caller's.

    Args:
        what: is waited for, in an error.
        work: of the backend.
        tensor: lives until it is over.
    """

    def __init__(self, what: str, work: dist.Work, tensor: torch.Tensor) -> None:
        self._what = what
        self._work = work
        self._tensor = tensor  # must live until it is done

    def wait(self) -> None:
        """Block until it is done."""
        with as_transport_error(self._what):
            self._work.wait()


class PostedSend:
    """A send that is waited for by itself.

    Args:
        what: is waited for, in an error.
        works: of the backend, one a tensor.
        tensors: live until it is over.
        waits: of the transport, so that an interrupt ends the wait; None where a wait only makes
            the current stream wait.
    """

    def __init__(
        self,
        what: str,
        works: Sequence[dist.Work],
        tensors: Sequence[torch.Tensor],
        waits: SendWaits | None,
    ) -> None:
        self._what = what
        self._works = works
        self._tensors = tensors  # must live until it is done
        self._waits = waits

    def wait(self) -> None:
        """Block until it is done."""
        with as_transport_error(self._what):
            if self._waits is not None:
                self._waits.wait(self._works, self._what)
            else:
                for work in self._works:
                    work.wait()


class PostedGather:
    """An exchange of every rank's values.

    Args:
        work: of the backend.
        own: values of this rank; live until it is over.
        rows: take those of every rank.
    """

    def __init__(self, work: dist.Work, own: torch.Tensor, rows: list[torch.Tensor]) -> None:
        self._work = work
        self._own = own  # must live until the exchange is over
        self._rows = rows

    def wait(self) -> list[list[float]]:
        """Every rank's values by rank, as exact fp64."""
        with as_transport_error(EXCHANGE):
            self._work.wait()
        return [row.tolist() for row in self._rows]


class PostedReceive:
    """A message that is to come.

    Args:
        source: rank that sends it.
        works: of the backend, one a tensor; under NCCL a wait makes the current stream wait, not the
            thread.
        tensors: that take it.
    """

    def __init__(
        self, source: int, works: Sequence[dist.Work], tensors: Sequence[torch.Tensor]
    ) -> None:
        self._source = source
        self._works = works
        self._tensors = tensors

    def wait(self) -> tuple[torch.Tensor, ...]:
        """Block until all tensors are here."""
        try:
            for work in self._works:
                work.wait()
        except BACKEND_ERRORS as error:
            raise transport_error(f"receive from rank {self._source}", error) from error
        return tuple(self._tensors)


@contextmanager
def as_transport_error(what: str) -> Iterator[None]:
    """Errors of the backend in here become a TransportError.

    Args:
        what: was done.
    """
    try:
        yield
    except BACKEND_ERRORS as error:
        raise transport_error(what, error) from error


def transport_error(what: str, error: Exception) -> TransportError:
    """What a backend says, as the error that the pipeline knows.

    Args:
        what: was done.
        error: of the backend.
    """
    return TransportError(f"{what} failed: {_reason(error)}")


def _reason(error: Exception) -> str:
    """What a backend says, without the place in its sources and its advice."""
    first, *_ = str(error).strip().splitlines() or [repr(error)]
    return re.sub(r"^\[\S+:\d+\] ", "", first).partition(" This is typically")[0].rstrip(".")
