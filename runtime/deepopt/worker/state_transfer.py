"""Layers' states from worker to worker, over the group that has just formed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

import torch

from deepopt.pipeline.optimizer import LayerOptimizer
from deepopt.pipeline.transport import Channel, Kind, PendingReceive, TensorSpec, Transport
from deepopt.worker.messages import Transfer

State = Mapping[str, torch.Tensor]
"""Tensors by key of `LayerState`."""

_TENSORS_PER_MESSAGE = 32


def transfer(
    transfers: Sequence[Transfer],
    *,
    transport: Transport,
    optimizers: Mapping[str, LayerOptimizer],
    replicas: Mapping[str, State],
    held: Mapping[str, State],
) -> None:
    """Send and take this worker's part of a group's transfers.

    Args:
        transfers: of the whole group, in one order everywhere.
        transport: has joined the group.
        optimizers: of this worker's layers by name; those that it is sent are overwritten.
        replicas: copies of others' layers by name, as after the step that the group starts from.
        held: states of layers that this process had under another plan, by name.

    Raises:
        TransportError: a peer is gone.
        CheckpointError: a state does not fit the layer.
    """
    numbers: dict[Channel, int] = defaultdict(int)  # of messages so far
    awaited: list[tuple[str, list[str], list[PendingReceive]]] = []
    for one in transfers:
        if transport.rank not in (one.source, one.target):
            continue
        if one.source == one.target:  # the copy of a peer's layer that it now trains itself
            optimizers[one.layer].load_state(replicas[one.layer])
            continue
        channel = Channel(Kind.STATE, one.source, one.target)
        if one.target == transport.rank:
            own = optimizers[one.layer].export_state()
            pending = []
            for keys in _portions(own):
                specs = [TensorSpec(tuple(own[k].shape), own[k].dtype, False) for k in keys]
                pending.append(transport.receive(channel, numbers[channel], specs))
                numbers[channel] += 1
            awaited.append((one.layer, [k for keys in _portions(own) for k in keys], pending))
        else:
            state = replicas[one.layer] if one.replica else held.get(one.layer)
            if state is None:
                state = optimizers[one.layer].export_state()
            for keys in _portions(state):
                transport.send(channel, numbers[channel], [state[key].cpu() for key in keys])
                numbers[channel] += 1
    for layer, keys, pending in awaited:
        tensors = [tensor for receive in pending for tensor in receive.wait()]
        arrived = dict(zip(keys, tensors, strict=True))
        optimizers[layer].load_state({**optimizers[layer].export_state(), **arrived})
    transport.finish_sends()


def _portions(state: State) -> Iterator[list[str]]:
    """The keys of a state in messages, in one order everywhere; what is empty is left out."""
    keys = sorted(key for key, tensor in state.items() if tensor.numel())
    for first in range(0, len(keys), _TENSORS_PER_MESSAGE):
        yield keys[first : first + _TENSORS_PER_MESSAGE]
