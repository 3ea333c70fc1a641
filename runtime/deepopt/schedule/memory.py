"""What micro-batches in flight hold on a rank, and how much a rank can hold. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from deepopt.errors import ScheduleError
from deepopt.schedule.ir import Action, Op, Placement, Schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Sizes and capacities in one unit of the caller's choice: bytes, or stage micro-batches.

    Args:
        kept: of each stage: what one micro-batch holds from the start of its F on.
        full: of each stage: what it holds from the start of R, or of I or B where it has no R, to
            the end of W or B; at least `kept`, and equal where nothing is recomputed.
        caps: of each rank: the most that all its micro-batches may hold; infinite for any amount.
    """

    kept: tuple[float, ...]
    full: tuple[float, ...]
    caps: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.kept) != len(self.full):
            raise ScheduleError(
                f"the memory model has {len(self.kept)} stages in kept, {len(self.full)} in full"
            )
        for stage, (kept, full) in enumerate(zip(self.kept, self.full, strict=True)):
            if not 0 <= kept <= full < float("inf"):
                raise ScheduleError(
                    f"stage {stage} keeps {kept} of {full} per micro-batch",
                    remedy="what F keeps is part of what the backward needs: 0 <= kept <= full",
                )

    @classmethod
    def counted(cls, placement: Placement, *, cap: int | None) -> Memory:
        """Every stage micro-batch counts as one.

        Args:
            placement: stages on ranks.
            cap: most stage micro-batches in flight on a rank; None for any number.
        """
        ones = (1.0,) * placement.num_stages
        most = float("inf") if cap is None else float(cap)
        return cls(kept=ones, full=ones, caps=(most,) * placement.num_ranks)

    @property
    def is_limited(self) -> bool:
        """Whether any rank has a cap."""
        return min(self.caps, default=float("inf")) < float("inf")


def peaks(schedule: Schedule, memory: Memory) -> tuple[float, ...]:
    """The most that each rank holds at once.

    Args:
        schedule: compute actions per rank.
        memory: sizes by stage.
    """
    return tuple(max(held_at(row, memory), default=0.0) for row in schedule.actions)


def held_at(row: Sequence[Action], memory: Memory) -> Iterator[float]:
    """What a rank holds while it runs each of its actions.

    Args:
        row: its compute actions in order.
        memory: sizes by stage.
    """
    held = 0.0
    prepared: set[tuple[int, int | None]] = set()
    for action in row:
        full, kept = memory.full[action.stage], memory.kept[action.stage]
        own = (action.stage, action.microbatch)
        if action.op is Op.F:
            held += kept
        elif action.op is Op.R:
            prepared.add(own)
            held += full - kept
        elif action.op is not Op.W and own not in prepared:
            held += full - kept
        yield held
        if action.op in (Op.W, Op.B):
            held -= full
