"""The transport over torch.distributed.

One code path for gloo and NCCL. Gloo keeps messages apart by tag. NCCL ignores tags, so each
channel (pair, direction, kind) has a communicator of its own, where the order of sends is the
order of receives; `schedule.verify` has checked that both ends agree on it.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from deepopt.errors import TransportError
from deepopt.pipeline.gloo_links import GlooLinks
from deepopt.pipeline.posted import (
    BACKEND_ERRORS,
    EXCHANGE,
    Posted,
    PostedGather,
    PostedReceive,
    PostedSend,
    as_transport_error,
    transport_error,
)
from deepopt.pipeline.receive_buffers import ReceiveBuffers
from deepopt.pipeline.send_waits import SendWaits
from deepopt.pipeline.transport import (
    Channel,
    Kind,
    Pending,
    PendingGather,
    PendingReceive,
    Store,
    TensorSpec,
)

_TENSORS_PER_MESSAGE = 64  # the lowest six bits of the tag
_FIRST_PAUSE_S = 0.0005  # between two looks for a key; doubled each time up to the longest
_LONGEST_PAUSE_S = 0.004  # of a few workers; a thousand, who all ask one store, pause 24 ms
_PAUSE_PER_WORKER_S = 20e-6


class ProcessGroupTransport:
    """Transport over torch.distributed: gloo for CPU tensors, NCCL for CUDA tensors.

    Layers' states travel over gloo in either case.

    Args:
        rank: this worker's rank in the world.
        world_size: workers in the world.
        device: where tensors live; `cuda` means NCCL.
        timeout_s: longest wait for a peer, in seconds (`pipeline.timeout_s`).
        form_timeout_s: longest forming of the group, in seconds (`faults.setup_timeout_s`).
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        timeout_s: float,
        form_timeout_s: float,
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._timeout = timedelta(seconds=timeout_s)
        self._form_timeout_s = form_timeout_s
        self._channels: dict[Channel, None] = {}
        self._roads: dict[Channel, _Road] = {}
        self._sends: deque[tuple[dist.Work, torch.Tensor]] = deque()
        # Received tensors come on a stream of their own: on that of the computation a receive that is
        # posted ahead would begin only after all that was launched before it.
        self._aside: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._computing: torch.cuda.Stream | None = None  # the stream that uses them
        self._buffers = ReceiveBuffers(allocate=self._allocate, mark=self._moment)
        self._links = GlooLinks()
        self._send_waits = SendWaits()
        self._lock = threading.Lock()  # of the next three
        self._generation = 0
        self._ended_generation = 0  # the newest that was interrupted
        self._interrupted = threading.Event()

    @property
    def rank(self) -> int:
        """This worker's rank in the world."""
        return self._rank

    @property
    def world_size(self) -> int:
        """Workers in the world."""
        return self._world_size

    def open(self, channels: Iterable[Channel]) -> None:
        """Make one communicator a channel under NCCL; gloo needs none, it has tags. Channels of
        layers' states need not be opened."""
        # Sorted, so that both ends of every channel make their communicators in the same order.
        for channel in sorted(channels, key=lambda c: (c.kind, c.source, c.target)):
            self._channels[channel] = None
            group = _world()
            if self._device.type == "cuda":
                with as_transport_error(f"communicator of {channel} did not form"):
                    group = dist.new_group(
                        [channel.source, channel.target],
                        timeout=self._timeout,
                        backend="nccl",
                        use_local_synchronization=True,
                    )
            other = channel.source if channel.target == self._rank else channel.target
            self._roads[channel] = _Road(group, dist.get_group_rank(group, other))

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        """Post a receive and return at once."""
        assert len(specs) <= _TENSORS_PER_MESSAGE, f"{len(specs)} tensors in one message"
        if self._aside is None or channel.kind is Kind.STATE:
            return self._post(channel, message, specs)
        self._computing = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._aside):
            return self._post(channel, message, specs)

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        """Post a send and return at once; the tensors must not be written to afterwards."""
        assert len(tensors) <= _TENSORS_PER_MESSAGE, f"{len(tensors)} tensors in one message"
        road, tag = self._road(channel), _tag(channel, message)
        try:
            for i, tensor in enumerate(tensors):
                whole = tensor.detach().contiguous()
                self._sends.append((road.group.send([whole], road.peer, tag + i), whole))
        except BACKEND_ERRORS as error:
            raise transport_error(f"send to rank {channel.target}", error) from error
        if self._device.type == "cuda":  # gloo's work tells its end only to who waits for it
            while self._sends and self._sends[0][0].is_completed():
                self._sends.popleft()

    def send_awaited(
        self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]
    ) -> Pending:
        """Post a send that is waited for by itself."""
        assert len(tensors) <= _TENSORS_PER_MESSAGE, f"{len(tensors)} tensors in one message"
        road, tag = self._road(channel), _tag(channel, message)
        what = f"send to rank {channel.target}"
        wholes = [tensor.detach().contiguous() for tensor in tensors]
        with as_transport_error(what):
            works = [
                road.group.send([whole], road.peer, tag + i) for i, whole in enumerate(wholes)
            ]
        return PostedSend(
            what, works, wholes, None if self._device.type == "cuda" else self._send_waits
        )

    def finish_sends(self) -> None:
        """Block until every posted send is out."""
        what = "a posted send"
        with as_transport_error(what):
            if self._device.type == "cuda":  # only makes this thread's stream wait
                for work, _ in self._sends:
                    work.wait()
            else:
                self._send_waits.wait([work for work, _ in self._sends], what)
        self._sends.clear()

    def send_apart(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Post a send of a CPU tensor that `finish_sends` does not wait for. From any thread."""
        road, tag = self._road(channel), _tag(channel, message)
        what = f"send to rank {channel.target}"
        with as_transport_error(what):
            work = road.group.send([tensor], road.peer, tag)
        return PostedSend(what, [work], [tensor], self._send_waits)

    def receive_into(self, channel: Channel, message: int, tensor: torch.Tensor) -> Pending:
        """Post a receive into a contiguous CPU tensor. From any thread."""
        road, tag = self._road(channel), _tag(channel, message)
        with as_transport_error(f"receive from rank {channel.source}"):
            work = road.group.recv([tensor], road.peer, tag)
        return Posted(f"receive from rank {channel.source}", work, tensor)

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        """Post an exchange of every rank's values and return at once; all give the same number
        of them, and post their exchanges in one order."""
        own = torch.tensor(values, dtype=torch.float64)
        rows = [torch.empty_like(own) for _ in range(self._world_size)]
        with as_transport_error(EXCHANGE):
            work = dist.all_gather(rows, own, async_op=True)
        assert work is not None, "every rank is in the default group"
        return PostedGather(work, own, rows)

    def publish(self, key: str, specs: Sequence[TensorSpec]) -> None:
        """Tell whoever asks under this key what the tensors will look like."""
        plain = [(s.shape, str(s.dtype).removeprefix("torch."), s.requires_grad) for s in specs]
        with as_transport_error(f"publishing the shapes of {key}"):
            self._store.set(key, json.dumps(plain))

    def look_up(self, key: str) -> tuple[TensorSpec, ...]:
        """Block until the key was published."""
        what = f"waiting for the shapes of {key}"
        self._await_key(key, what, timeout_s=self._timeout.total_seconds())
        with as_transport_error(what):
            plain = json.loads(self._store.get(key))
        return tuple(
            TensorSpec(tuple(shape), getattr(torch, dtype), requires_grad)
            for shape, dtype, requires_grad in plain
        )

    def join(self, store: Store, *, generation: int) -> None:
        """Form the group of a generation; of a later one, again, with the same channels.

        Args:
            store: prefixed with the generation.
            generation: which; higher than the one before.

        Raises:
            TransportError: the group did not form in time, or was interrupted.
        """
        self._roads.clear()
        self._sends.clear()
        self._buffers.forget()
        if dist.is_initialized():  # not so after NCCL's abort
            dist.destroy_process_group()
        self._store = store
        with self._lock:
            self._generation = generation
            self._interrupted.clear()
            self._send_waits.begin()
            if self._ended_generation >= generation:
                self._interrupted.set()
                self._send_waits.end()
        self._form()
        self.open(self._channels)

    def interrupt(self, generation: int) -> None:
        """Make every wait in a generation fail at once, here and at the peers. From any thread.

        Args:
            generation: which; nothing happens to a later one.
        """
        with self._lock:
            self._ended_generation = max(self._ended_generation, generation)
            if self._generation > generation or self._interrupted.is_set():
                return
            self._interrupted.set()
            self._links.cut()
            self._send_waits.end()
            if self._device.type == "cuda" and dist.is_initialized():
                # All communicators together, or one waits for another.
                dist.distributed_c10d._abort_process_group()

    def cut(self) -> None:
        """Break all connections to the peers, as a network does that fails: nobody is told. For
        drills; NCCL's connections stay."""
        self._links.cut()

    def close(self) -> None:
        """Leave the process group."""
        self._send_waits.close()
        if dist.is_initialized():
            dist.destroy_process_group()

    def _form(self) -> None:
        """Meet all others, then connect."""
        what = "forming the process group"
        with as_transport_error(what):
            if self._store.add("arrived", 1) == self._world_size:
                self._store.set("all-arrived", "")
        self._await_key("all-arrived", what, timeout_s=self._form_timeout_s)
        cuda = self._device.type == "cuda"
        learning = self._links.watch(self._store, rank=self._rank, world_size=self._world_size)
        with as_transport_error(what), learning:
            # After `learning` has begun: an interrupt from now on ends what this waits for. One that
            # came before has ended nothing, and a peer that had arrived may be dead by now.
            self._refuse_if_interrupted(what)
            # torch counts a group that did not form and puts the count into its keys: a new process,
            # which has none behind it, would wait for keys that nobody writes.
            dist.distributed_c10d._world.group_count = 0
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if cuda else "gloo",
                store=self._store,
                rank=self._rank,
                world_size=self._world_size,
                timeout=self._timeout,
                device_id=self._device if cuda else None,
            )
            # It may look formed: with connections that were made in the place of dead peers.
            self._refuse_if_interrupted(what)
        if self._interrupted.is_set():  # while the links were not all known
            # No error yet: whoever waits for a peer from now on gets one, and a worker that has come as
            # far as its layers until then takes them along into the next generation.
            self._links.cut()

    def _refuse_if_interrupted(self, what: str) -> None:
        if self._interrupted.is_set():
            raise TransportError(f"{what} was interrupted")

    def _post(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        road, tag = self._road(channel), _tag(channel, message)
        tensors = [self._memory(channel.kind, spec) for spec in specs]
        try:
            # The group's own methods: `dist.irecv` looks the group up and logs each time.
            works = [
                road.group.recv([tensor], road.peer, tag + i)
                for i, tensor in enumerate(tensors)
            ]
        except BACKEND_ERRORS as error:
            raise transport_error(f"receive from rank {channel.source}", error) from error
        return PostedReceive(channel.source, works, tensors)

    def _memory(self, kind: Kind, spec: TensorSpec) -> torch.Tensor:
        """Where a tensor is received. What comes with every micro-batch has buffers; the rest would only
        hold memory between the steps."""
        if kind is Kind.STATE:
            return torch.empty(spec.shape, dtype=spec.dtype)
        if kind is Kind.REDUCTION:
            return self._allocate(spec)
        tensor, free_from = self._buffers.take(spec)
        if self._aside is not None and free_from is not None:
            self._aside.wait_event(free_from)
        return tensor

    def _allocate(self, spec: TensorSpec) -> torch.Tensor:
        """Memory on the device; on a GPU, of the stream aside."""
        tensor = torch.empty(spec.shape, dtype=spec.dtype, device=self._device)
        if (
            self._computing is not None
        ):  # not to be given away before the computation has used it
            tensor.record_stream(self._computing)
        return tensor

    def _moment(self) -> torch.cuda.Event | None:
        """The present moment of the computation's stream."""
        return None if self._computing is None else self._computing.record_event()

    def _road(self, channel: Channel) -> _Road:
        if channel.kind is not Kind.STATE:
            return self._roads[channel]
        other = channel.source if channel.target == self._rank else channel.target
        return _Road(_world(), other)

    def _await_key(self, key: str, what: str, *, timeout_s: float) -> None:
        """Wait for a key of the store; unlike the store's own wait, an interrupt ends it."""
        until_s = time.monotonic() + timeout_s
        pause_s = _FIRST_PAUSE_S
        longest_s = _LONGEST_PAUSE_S + _PAUSE_PER_WORKER_S * self._world_size
        with as_transport_error(what):
            while not self._store.check([key]):
                if self._interrupted.wait(pause_s):
                    raise TransportError(f"{what} was interrupted")
                if time.monotonic() > until_s:
                    raise TransportError(f"{what} failed: no {key} after {timeout_s:g} s")
                pause_s = min(2 * pause_s, longest_s)


def _world() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "a channel before join()"
    return group


class _Road(NamedTuple):
    """How a channel is travelled: its communicator, and the other end's rank in it."""

    group: dist.ProcessGroup
    peer: int


def _tag(channel: Channel, message: int) -> int:
    """The tag of a message's first tensor; the others' follow."""
    return (message * len(Kind) + channel.kind) * _TENSORS_PER_MESSAGE
