"""Copies in memory of what a worker's layers were after a step: its own, and those of one peer.

For stages that no other worker holds. A thread copies the layers while the next step computes, which
only reads them, and exchanges the copies piece by piece, so that tensors of the step pass in between.
All workers copy after the same steps: after a step at whose exchange all were done with the copy
before. The last two are kept, so that one is whole everywhere at any time.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from deepopt.errors import TransportError
from deepopt.pipeline.transport import Channel, Kind, Store, Transport
from deepopt.planner.plan import Plan
from deepopt.worker.copy_pace import CopyPace
from deepopt.worker.flat_state import FlatState, Layout, State

logger = logging.getLogger(__name__)

# A tensor of the step waits for one piece at most: 2 ms at 1 GB/s. Of half the size they took a third more
# CPU time over gloo on one host, twice the size was no better.
_PIECE_BYTES = 2 << 20
_COPIES_KEPT = 2


def layers_without_copy(plan: Plan, rank: int) -> tuple[str, ...]:
    """The layers of a worker that no other worker holds.

    Args:
        plan: who holds what.
        rank: the worker.
    """
    return tuple(
        plan.layer_names[index]
        for stage in plan.held_stages(rank)
        if len(plan.holders(stage)) == 1
        for index in plan.stage_layers(stage)
    )


def keeps_replicas(plan: Plan, wanted: str) -> bool:
    """Whether the workers of a plan keep copies of each other's layers.

    Args:
        plan: who holds what.
        wanted: `faults.replicas`.
    """
    if plan.world_size == 1 or wanted == "none":
        return False
    return wanted == "peer" or any(
        len(plan.holders(stage)) == 1 for stage in range(plan.num_stages)
    )


class ReplicaKeeper:
    """The copies that one worker keeps.

    Args:
        transport: to the other workers.
        export: gives the states of this worker's layers as after the last step, by layer; they
            do not change before `wait_until_copied` was called.
        sent: names of the layers of which a peer keeps a copy.
        device: where the layers are.
        share: of the time, that copies may take.
        shareable: whether a peer on this host shall read the copies where they lie.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        *,
        transport: Transport,
        export: Callable[[], Mapping[str, State]],
        sent: Sequence[str],
        device: torch.device,
        share: float,
        shareable: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._transport = transport
        self._export = export
        self._sent = tuple(sent)
        self._device = device
        self._pace = CopyPace(share=share)
        self._shareable = shareable
        self._clock = clock
        rank, world_size = transport.rank, transport.world_size
        # Far away in the order of ranks, which is that of hosts: a host's death leaves one of two.
        shift = max(1, world_size // 2)
        self._out = Channel(Kind.STATE, rank, (rank + shift) % world_size)
        self._in = Channel(Kind.STATE, (rank - shift) % world_size, rank)
        self._layout = Layout(())
        self._sent_bytes = 0
        self._ward_layout = Layout(())
        self._own: dict[int, FlatState] = {}
        self._ward: dict[int, FlatState] = {}
        self._whole: set[int] = set()  # steps of which the ward's copy is complete
        self._changed = threading.Condition()
        self._work: tuple[int, Mapping[str, State]] | None = None
        self._copying = False
        self._busy = False
        self._closed = False
        threading.Thread(target=self._run, name="replicas", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether the next copy has to wait: for the one before, or for its share of the time."""
        return self._busy or self._pace.rests(now_s=self._clock())

    @property
    def held(self) -> tuple[int, ...]:
        """Steps that this worker can take its own layers back to."""
        return tuple(sorted(self._own))

    @property
    def replicas(self) -> dict[int, tuple[str, ...]]:
        """Step -> names of the peer's layers of which a whole copy is here."""
        return {step: self._ward_layout.layers for step in sorted(self._whole)}

    def own(self, step: int) -> FlatState:
        """This worker's layers as after a step."""
        return self._own[step]

    def ward(self, step: int) -> FlatState | None:
        """The peer's layers as after a step; None without a whole copy."""
        return self._ward[step] if step in self._whole else None

    def begin(self, store: Store, *, step: int, fresh: bool, timeout_s: float) -> None:
        """Learn what the peer's copy looks like, and take the first one of a generation.

        Args:
            store: of the generation.
            step: after which it begins.
            fresh: whether earlier copies are of no use: the layers come from elsewhere.
            timeout_s: longest wait for a copy of the generation before.

        Raises:
            TransportError: the peer or the store does not answer.
        """
        self.settle(timeout_s=timeout_s)
        states = self._export()
        ordered = [*self._sent, *(name for name in states if name not in self._sent)]
        layout = Layout.of({name: states[name] for name in ordered})
        if layout != self._layout:
            self._own.clear()
        self._layout = layout
        own = Layout(tuple(r for r in self._layout.regions if r.layer in self._sent))
        self._sent_bytes = own.size_bytes
        rank, peer = self._transport.rank, self._in.source
        try:
            store.set(f"replica/{rank}", json.dumps(own.to_json()))
            told = store.get(f"replica/{peer}")
        except RuntimeError as error:
            raise TransportError(f"agreeing on copies with rank {peer}: {error}") from error
        ward = Layout.from_json(json.loads(told))
        if ward != self._ward_layout:
            self._ward.clear()
            self._whole.clear()
        self._ward_layout = ward
        for kept in (self._own, self._ward):
            for other in [s for s in kept if fresh or s > step]:
                del kept[other]
        self._whole &= self._ward.keys()
        self.take(step)

    def take(self, step: int) -> None:
        """Begin to copy the layers as they are after a step, and return at once.

        Args:
            step: the last one done; the copy before is done with on all workers.
        """
        states = self._export()
        with self._changed:
            assert not self._busy, f"copy of step {step} while one is being made"
            self._busy = self._copying = True
            self._work = (step, states)
            self._changed.notify_all()

    def wait_until_copied(self) -> None:
        """Wait until the layers may change again: before an update."""
        if self._copying:
            with self._changed:
                self._changed.wait_for(lambda: not self._copying)

    def settle(self, *, timeout_s: float) -> None:
        """Wait until nothing is being copied or exchanged; the group has been interrupted.

        Args:
            timeout_s: how long at most.

        Raises:
            TransportError: it did not end in time.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: not self._busy, timeout=timeout_s):
                raise TransportError(f"a copy for a peer did not end within {timeout_s:g} s")

    def close(self) -> None:
        """End the thread when it is done with the copy in work; its copies are nobody's any more."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._work is not None or self._closed)
                if self._closed:
                    return
                assert self._work is not None, "what was waited for"
                step, states = self._work
                self._work = None
            began_s = self._clock()
            try:
                own = self._slot(self._own, step, self._layout)
                own.fill(states)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self._own[step] = own
                self._mark(copying=False)
                self._exchange(step, own)
                ended_s = self._clock()
                self._pace.made(took_s=ended_s - began_s, now_s=ended_s)
            except TransportError as error:  # the training thread hears of it as well
                logger.info("the copy of step %d was not exchanged: %s", step, error.message)
            except (
                Exception
            ):  # the thread's edge: without copies, a checkpoint is fallen back to
                logger.exception("copying the layers after step %d failed", step)
            finally:
                del states
                self._mark(copying=False, busy=False)

    def _exchange(self, step: int, own: FlatState) -> None:
        """Send a copy and take the peer's.

        Raises:
            TransportError: the peer is gone.
        """
        ward = self._slot(self._ward, step, self._ward_layout)
        if step not in self._ward:
            self._whole.discard(step)
            self._ward[step] = ward
        out, into = own.memory[: self._sent_bytes], ward.memory
        for first in range(0, max(len(out), len(into)), _PIECE_BYTES):
            pending = []
            if first < len(into):
                piece = into[first : first + _PIECE_BYTES]
                pending.append(self._transport.receive_into(self._in, 0, piece))
            if first < len(out):
                piece = out[first : first + _PIECE_BYTES]
                pending.append(self._transport.send_apart(self._out, 0, piece))
            for one in pending:
                one.wait()
        self._whole.add(step)

    def _slot(self, kept: dict[int, FlatState], step: int, layout: Layout) -> FlatState:
        """Memory for a copy: that of the same step, of the oldest, or new."""
        if step in kept:
            return kept[step]
        if len(kept) >= _COPIES_KEPT:
            oldest = min(kept)
            self._whole -= {oldest} if kept is self._ward else set()
            return kept.pop(oldest)
        return FlatState(
            layout,
            pinned=self._device.type == "cuda",
            shareable=self._shareable and kept is self._own,
        )

    def _mark(self, *, copying: bool, busy: bool | None = None) -> None:
        with self._changed:
            self._copying = copying
            if busy is not None:
                self._busy = busy
            self._changed.notify_all()
