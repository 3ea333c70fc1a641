"""Sums of gradients over groups, copies and replicas, in an order that never changes.

A bucket is a flat range of elements with its terms: for each use of the weights (one, or
several when they are tied) and each group, the rank that holds the term. Its total is the sum
over uses of the sum over groups, both in order, so it has the same bits wherever the terms lie.
Two holders swap their terms. More holders divide the range: each sums one chunk of it and hands
the result round.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from deepopt.pipeline.transport import (
    Channel,
    Kind,
    Pending,
    PendingReceive,
    TensorSpec,
    Transport,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """A range of elements that is summed as one.

    Args:
        index: position among all buckets of the job; both ends of a message use it.
        owners: owners[use][group] is the world rank that holds the term.
        numel: elements of the range.
        terms: terms[use, group] is this rank's flat term [numel], where it is the owner: fp32 for
            gradients, int32 for counts.
        results: flat tensors [numel] of this rank that take the total; a result may be a term.
    """

    index: int
    owners: tuple[tuple[int, ...], ...]
    numel: int
    terms: Mapping[tuple[int, int], torch.Tensor]
    results: tuple[torch.Tensor, ...]

    @property
    def holders(self) -> tuple[int, ...]:
        """Ranks with a term, in the order of their first one."""
        return tuple(dict.fromkeys(rank for use in self.owners for rank in use))

    @property
    def dtype(self) -> torch.dtype:
        """Of the terms; the same on all holders."""
        return next(iter(self.terms.values())).dtype


def channels(holders: Sequence[int], rank: int) -> list[Channel]:
    """The channels a rank needs to reduce with the other holders of a bucket."""
    others = [r for r in holders if r != rank] if rank in holders else []
    return [
        channel
        for other in others
        for channel in (
            Channel(Kind.REDUCTION, rank, other),
            Channel(Kind.REDUCTION, other, rank),
        )
    ]


def _ignore(bucket: Bucket) -> None:
    """Nobody waits for it."""


class Reducer:
    """Sums buckets; communication of one bucket overlaps the computation after `start`.

    Args:
        transport: to the other holders.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._started: list[_Reduction] = []

    def start(self, bucket: Bucket) -> None:
        """Post the exchange of a bucket whose terms are all whole."""
        self._started.append(_Reduction(bucket, self._transport))

    def finish(self, on_whole: Callable[[Bucket], None] = _ignore) -> None:
        """Complete every started bucket, in the order of starting; results are then totals.

        Args:
            on_whole: told of each bucket whose results are totals, while later ones may still be
                under way.
        """
        for reduction in self._started:
            reduction.take_terms()
            reduction.sum_own_part()
            if not reduction.has_second_round:
                on_whole(reduction.bucket)
        for reduction in self._started:
            if reduction.has_second_round:
                reduction.collect_parts()
                on_whole(reduction.bucket)
        self._started.clear()

    def forget(self) -> None:
        """Drop what was started: the group that it went to has ended."""
        self._started.clear()


class _Reduction:
    def __init__(self, bucket: Bucket, transport: Transport) -> None:
        self.bucket = bucket
        self._transport = transport
        self._rank = transport.rank
        holders = bucket.holders
        self._others = [r for r in holders if r != self._rank]
        # With two holders each sums everything; with more, each sums one part.
        self._parts = _split(bucket.numel, len(holders)) if len(holders) > 2 else None
        self._position = holders.index(self._rank)
        self._pending: dict[int, PendingReceive] = {}
        self._sends: list[Pending] = []
        self._terms: dict[tuple[int, int], torch.Tensor] = {}
        own_part = self._part(self._position)
        for rank in self._others:
            keys = self._keys_of(rank)
            spec = TensorSpec((own_part.stop - own_part.start,), bucket.dtype, False)
            self._pending[rank] = transport.receive(
                Channel(Kind.REDUCTION, rank, self._rank), 2 * bucket.index, [spec] * len(keys)
            )
        for rank in self._others:
            part = self._part(holders.index(rank))
            terms = [bucket.terms[key][part] for key in self._keys_of(self._rank)]
            channel = Channel(Kind.REDUCTION, self._rank, rank)
            self._sends.append(transport.send_awaited(channel, 2 * bucket.index, terms))

    @property
    def has_second_round(self) -> bool:
        """Whether holders sum parts and hand them round."""
        return self._parts is not None

    def take_terms(self) -> None:
        """Wait for the other holders' terms of this rank's part, and until its own are out: the sum
        overwrites one of them. Every holder posts the receives of its first rounds before it waits for
        any, so that nobody waits in a circle."""
        part = self._part(self._position)
        self._terms = {key: term[part] for key, term in self.bucket.terms.items()}
        for rank, pending in self._pending.items():
            self._terms.update(zip(self._keys_of(rank), pending.wait(), strict=True))
        self._pending.clear()
        self._finish_sends()

    def sum_own_part(self) -> None:
        """Sum this rank's part of the range and, with more than two holders, hand it round."""
        bucket = self.bucket
        part = self._part(self._position)
        total = _ordered_sum(bucket.owners, self._terms)
        self._terms = {}
        _deliver(bucket, total, part)
        if self._parts is None:
            return
        for rank in self._others:
            other = self._part(bucket.holders.index(rank))
            spec = TensorSpec((other.stop - other.start,), bucket.dtype, False)
            self._pending[rank] = self._transport.receive(
                Channel(Kind.REDUCTION, rank, self._rank), 2 * bucket.index + 1, [spec]
            )
        for rank in self._others:
            channel = Channel(Kind.REDUCTION, self._rank, rank)
            self._sends.append(
                self._transport.send_awaited(channel, 2 * bucket.index + 1, [total])
            )

    def collect_parts(self) -> None:
        """Take the parts that the other holders summed, and wait until the own one is out: totals may be
        scaled from now on."""
        for rank, pending in self._pending.items():
            part = self._part(self.bucket.holders.index(rank))
            (total,) = pending.wait()
            for result in self.bucket.results:
                result[part].copy_(total)
        self._pending.clear()
        self._finish_sends()

    def _finish_sends(self) -> None:
        for send in self._sends:
            send.wait()
        self._sends.clear()

    def _part(self, position: int) -> slice:
        return slice(0, self.bucket.numel) if self._parts is None else self._parts[position]

    def _keys_of(self, rank: int) -> list[tuple[int, int]]:
        return [
            (use, group)
            for use, owners in enumerate(self.bucket.owners)
            for group, owner in enumerate(owners)
            if owner == rank
        ]


def _deliver(bucket: Bucket, total: torch.Tensor, part: slice) -> None:
    for result in bucket.results:
        if result[part].data_ptr() != total.data_ptr():
            result[part].copy_(total)


def _split(numel: int, num_parts: int) -> list[slice]:
    edges = [i * numel // num_parts for i in range(num_parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def _ordered_sum(
    owners: Sequence[Sequence[int]], terms: Mapping[tuple[int, int], torch.Tensor]
) -> torch.Tensor:
    """Sum over uses of the sum over groups, each from left to right; destroys the first term of
    each."""
    total: torch.Tensor | None = None
    for use, groups in enumerate(owners):
        subtotal = terms[use, 0]
        for group in range(1, len(groups)):
            subtotal.add_(terms[use, group])
        total = subtotal if total is None else total.add_(subtotal)
    assert total is not None, "a bucket without terms"
    return total
