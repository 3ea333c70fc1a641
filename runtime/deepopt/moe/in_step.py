"""Feedback inside the step: position chunks that follow the queues of earlier chunks.

Each sequence of a micro-batch is cut into chunks of positions. What the earlier chunks sent to each
device (or expert) tells two things: how long its queue is, which the load formula
1 + alpha x deficit / mean load turns into a bias for the next chunk; and how much more this micro-batch
asks for it than its share, which is taken away at once, so that queues need not grow before anything is
done. The last half of the chunks become shorter and shorter: nothing makes good what the last one does. In
the warm-up, where the step's bias may fit nothing, what the first 1, 2, 4, 8 ... chunks needed becomes the
bias of those after them. Where only the warm-up asks for feedback, chunks end where a bias is set anew and
nowhere else, for each costs as much as the whole choice does without them. No token sees a later one, and
none sees another micro-batch.

Shapes: B sequences, S positions, T = B x S tokens, E experts, K choices a token, N blocks of experts.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from deepopt.moe.balancer import HIGH, LOW
from deepopt.moe.warmup import solve_bias
from deepopt_kernels.elb_select import elb_select

_ROUNDS = 4  # of solving: from the bias of half as many chunks
_FEW_ROUNDS = 2  # where nobody asked for more than loads as even as those of a settled bias
_MOST_DEMAND = math.log(
    8.0
)  # that is taken away: a block that got nothing yet may still be asked for


@dataclass(frozen=True, kw_only=True, slots=True)
class Feedback:
    """How strongly what is fed back.

    Args:
        alpha: gain of the formula.
        chunks: of each sequence.
        blocks: (first, end) of experts whose joint load shall be even; one each at expert level.
        slope_E: change of the bias that multiplies an expert's load by e.
        share_E: target share of each expert; sums to 1.
        solves: set the bias anew from what earlier chunks needed; for equal shares.
        doubles: chunks end after 1, 2, 4, 8 ... of the `chunks` parts of a sequence only: a third of the
            time, and loads as even as with a bias that fits, no more.
    """

    alpha: float
    chunks: int
    blocks: Sequence[tuple[int, int]]
    slope_E: torch.Tensor
    share_E: torch.Tensor
    solves: bool = False
    doubles: bool = False


def select_in_chunks(
    u_TE: torch.Tensor,
    bias_E: torch.Tensor,
    origin_E: torch.Tensor,
    width_E: torch.Tensor,
    *,
    top_k: int,
    num_bins: int,
    counted_T: torch.Tensor | None,
    sequence_length: int,
    feedback: Feedback,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `elb_select`, chunk after chunk.

    Args:
        u_TE: sequence after sequence, each of `sequence_length` tokens.
        bias_E: of the step.
        origin_E: see `elb_select`.
        width_E: see `elb_select`.
        top_k: see `elb_select`.
        num_bins: see `elb_select`.
        counted_T: see `elb_select`.
        sequence_length: S; T is a multiple of it.
        feedback: how strongly what is fed back.
        num_groups: see `elb_select`.
        top_groups: see `elb_select`.
    """
    num_experts = u_TE.shape[1]
    u_BSE = u_TE.view(-1, sequence_length, num_experts)
    counted_BS = None if counted_T is None else counted_T.view(-1, sequence_length)
    cut = doubling_edges if feedback.doubles else chunk_edges
    edges = cut(sequence_length, chunks=feedback.chunks)
    ids_BSK = torch.empty(*u_BSE.shape[:2], top_k, dtype=torch.int64, device=u_TE.device)
    queues = _Queues(feedback, num_experts=num_experts, top_k=top_k, device=u_TE.device)
    total: torch.Tensor | None = None
    for chunk, (start, end) in enumerate(itertools.pairwise(edges)):
        # After 1, 2, 4, 8 ... chunks: each of those that double.
        if feedback.solves and chunk and (feedback.doubles or chunk.bit_count() == 1):
            seen_TE = u_BSE[:, :start].reshape(-1, num_experts)
            counted = None if counted_BS is None else counted_BS[:, :start].reshape(-1)
            rounds = _FEW_ROUNDS if feedback.doubles else _ROUNDS
            bias_E = _solved(seen_TE, bias_E, counted, top_k=top_k, rounds=rounds)
            queues.forget_demand()
        push_E = queues.push(num_tokens=u_BSE.shape[0] * (end - start))
        u_cE = u_BSE[:, start:end].reshape(-1, num_experts)
        counted = None if counted_BS is None else counted_BS[:, start:end].reshape(-1)
        ids, stats = elb_select(
            u_cE,
            bias_E if push_E is None else bias_E + push_E,
            origin_E,
            width_E,
            top_k=top_k,
            num_bins=num_bins,
            counted_T=counted,
            num_groups=num_groups,
            top_groups=top_groups,
        )
        ids_BSK[:, start:end] = ids.view(-1, end - start, top_k)
        queues.add(stats)
        total = stats if total is None else total + stats
    assert total is not None, "a sequence has a position"
    return ids_BSK.view(-1, top_k), total


def chunk_edges(sequence_length: int, *, chunks: int) -> list[int]:
    """Where the chunks of a sequence begin and end: the first half are of one length, those after them
    become shorter by equal steps.

    Args:
        sequence_length: S, at least 1.
        chunks: wanted; short sequences have fewer.
    """
    chunks = min(chunks, sequence_length)
    weights = [min(1.0, 2 * (chunks - chunk) / chunks) for chunk in range(chunks)]
    ends = itertools.accumulate(weights)
    return sorted({0, *(round(sequence_length * end / sum(weights)) for end in ends)})


def doubling_edges(sequence_length: int, *, chunks: int) -> list[int]:
    """Where chunks end that have 1, 1, 2, 4 ... of so many equal parts of a sequence.

    Args:
        sequence_length: S, at least 1.
        chunks: parts; the last chunk takes what is left of them.
    """
    chunks = min(chunks, sequence_length)
    parts = itertools.takewhile(lambda part: part < chunks, (1 << n for n in itertools.count()))
    return sorted(
        {0, *(round(sequence_length * part / chunks) for part in parts), sequence_length}
    )


class _Queues:
    """What the chunks so far sent to each block, and what follows for the next chunk."""

    def __init__(
        self, feedback: Feedback, *, num_experts: int, top_k: int, device: torch.device
    ) -> None:
        self._feedback = feedback
        self._top_k = top_k
        self._num_experts = num_experts
        self._member_EN = _membership(feedback.blocks, num_experts, device)
        self._share_N = feedback.share_E @ self._member_EN
        zeros = torch.zeros_like(self._share_N)
        self._deficit_N = zeros  # choices that a block should have had and had not
        self._aimed_N = self._share_N  # share of a chunk that the push aims at with even demand
        self._got_N, self._expected_N = (
            zeros,
            zeros,
        )  # of the present bias, and with even demand
        self._began = False

    def push(self, *, num_tokens: int) -> torch.Tensor | None:
        """[E] what to add to the bias of the next chunk; None before the first.

        Args:
            num_tokens: of the next chunk.
        """
        if not self._began:
            return None
        due_N = (self._top_k * num_tokens * self._share_N).clamp_min(1e-6)
        factor_N = (1.0 + self._feedback.alpha * self._deficit_N / due_N).clamp(LOW, HIGH)
        # One even chunk more on both sides: few choices tell little.
        demand_N = ((self._got_N + due_N) / (self._expected_N + due_N)).log()
        log_N = factor_N.log() - demand_N.clamp(-_MOST_DEMAND, _MOST_DEMAND)
        aimed_N = self._share_N * log_N.exp()
        self._aimed_N = aimed_N / aimed_N.sum()
        return self._feedback.slope_E * (self._member_EN @ log_N)

    def add(self, stats: torch.Tensor) -> None:
        """Take what a chunk sent.

        Args:
            stats: counts of `elb_select`.
        """
        rest = stats[-(self._num_experts + 2) :]
        load_N = rest[: self._num_experts].float() @ self._member_EN
        choices = self._top_k * rest[self._num_experts].float()
        self._deficit_N = self._deficit_N + choices * self._share_N - load_N
        self._got_N = self._got_N + load_N
        self._expected_N = self._expected_N + choices * self._aimed_N
        self._began = True

    def forget_demand(self) -> None:
        """The bias is another one from here on, and says itself what is asked for."""
        self._got_N = self._expected_N = torch.zeros_like(self._share_N)


def _solved(
    seen_TE: torch.Tensor,
    bias_E: torch.Tensor,
    counted_T: torch.Tensor | None,
    *,
    top_k: int,
    rounds: int,
) -> torch.Tensor:
    """[E] the bias that would have evened out the tokens so far."""
    own_TE = seen_TE if counted_T is None else seen_TE[counted_T]
    own_TE = own_TE[own_TE.isfinite().all(-1)] + bias_E
    return bias_E + solve_bias(own_TE, top_k=top_k, rounds=rounds)


def _membership(
    blocks: Sequence[tuple[int, int]], num_experts: int, device: torch.device
) -> torch.Tensor:
    """[E, N] 1 where an expert belongs to a block."""
    member_EN = torch.zeros(num_experts, len(blocks), device=device)
    for block, (start, end) in enumerate(blocks):
        member_EN[start:end, block] = 1.0
    return member_EN
