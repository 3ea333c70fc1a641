"""Devices and links that are not there: how long they take, and what is said of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deepopt.errors import ClusterError
from deepopt.pipeline import emulated_device
from deepopt.pipeline.emulated_device import EmulatedDevice, action_times_s
from deepopt.pipeline.emulated_transport import EmulatedTransport
from deepopt.pipeline.layer_updates import LayerUpdates
from deepopt.pipeline.lone_transport import LoneTransport
from deepopt.pipeline.transport import Channel, Kind, PendingGather, PendingReceive, TensorSpec
from deepopt.schedule.ir import Action, Op, parse_action
from deepopt.schedule.simulate import CostTable

COSTS = CostTable(
    forward_s=(0.004, 0.005),
    input_s=(0.006, 0.007),
    weight_s=(0.001, 0.002),
    prepare_s=(0.003, 0.003),
    rank_factor=(1.0, 2.0),
)


def program(text: str) -> list[Action]:
    return [parse_action(word) for word in text.split()]


def test_a_rank_takes_its_factor_times_the_table() -> None:
    times_s = action_times_s(program("1F0 1SEND_F0 1R0 1B0"), costs=COSTS, rank=1)
    assert times_s == {
        Action(1, Op.F, 0): pytest.approx(0.010),
        Action(1, Op.R, 0): pytest.approx(0.006),
        Action(1, Op.B, 0): pytest.approx(0.018),
    }


def test_a_backward_that_nobody_prepared_pays_for_it_once() -> None:
    times_s = action_times_s(program("0F0 0F1 0R0 0I0 0W0 0B1"), costs=COSTS, rank=0)
    assert times_s[Action(0, Op.I, 0)] == pytest.approx(0.006)
    assert times_s[Action(0, Op.W, 0)] == pytest.approx(0.001)
    assert times_s[Action(0, Op.B, 1)] == pytest.approx(0.003 + 0.007)


def test_an_action_lasts_as_long_as_its_device_takes_and_its_span_says_so() -> None:
    action = Action(0, Op.F, 0)
    device = EmulatedDevice({action: 0.003})
    device.begin()
    device.end(action)
    (span,) = device.take()
    assert span.busy_ns == 3_000_000
    assert span.end_ns - span.start_ns >= 3_000_000
    assert device.overruns.num_operations == 1
    assert device.overruns.num_overran == 0


def test_work_that_takes_longer_than_the_table_is_counted() -> None:
    device = EmulatedDevice({Action(0, Op.F, 0): 0.0})
    device.begin()
    device.end(Action(0, Op.F, 0))
    assert device.overruns.num_overran == 1
    assert device.overruns.late_s > 0


class FakeClock:
    """Time that passes only when somebody waits or works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ns = 1_000
        monkeypatch.setattr(time, "monotonic_ns", lambda: self.now_ns)
        monkeypatch.setattr(emulated_device, "wait_until", self.work_until)

    def work_until(self, moment_ns: int) -> None:
        self.now_ns = max(self.now_ns, moment_ns)


@pytest.mark.parametrize(("real_ns", "lasts_ns"), [(2, 5), (5, 5), (7, 7)])
def test_updates_last_as_stated_whatever_work_stands_among_them(
    monkeypatch: pytest.MonkeyPatch, real_ns: int, lasts_ns: int
) -> None:
    clock, device = FakeClock(monkeypatch), EmulatedDevice({})
    began_ns = clock.now_ns
    with device.updates():
        clock.work_until(began_ns + real_ns)  # routers' biases, and two layers
        device.take_update(3)
        device.take_update(2)
    assert clock.now_ns - began_ns == lasts_ns
    assert device.overruns.num_operations == 1
    assert device.overruns.num_overran == (real_ns > 5)
    assert device.overruns.late_s == pytest.approx(max(0, real_ns - 5) * 1e-9)


def test_norms_and_counts_taken_before_the_updates_are_part_of_their_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, device = FakeClock(monkeypatch), EmulatedDevice({})
    for _ in range(2):  # what one step has done is no part of the next one's
        with device.before_updates():
            clock.work_until(clock.now_ns + 2)
        clock.work_until(clock.now_ns + 10)  # the exchange
        began_ns = clock.now_ns
        with device.updates():
            device.take_update(5)
        assert clock.now_ns - began_ns == 3


def test_updates_without_a_stated_time_last_as_long_as_they_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, device = FakeClock(monkeypatch), EmulatedDevice({})
    with device.updates():
        clock.work_until(clock.now_ns + 7)
    assert clock.now_ns == 1_007
    assert device.overruns.num_operations == 0


def test_the_routers_biases_are_updated_inside_the_updates_of_their_device() -> None:
    noted: list[str] = []

    @contextmanager
    def on_device() -> Iterator[None]:
        noted.append("begin")
        yield
        noted.append("end")

    experts = SimpleNamespace(update=lambda: noted.append("biases"))
    stage: Any = SimpleNamespace(
        experts=experts, layers=(), gradients=SimpleNamespace(totals=dict)
    )
    updates = LayerUpdates({0: stage}, optimizers={}, tied_names=(), on_device=on_device)
    updates.begin_step()
    updates.update(0.1)
    assert noted == ["begin", "biases", "end"]


def test_waiting_for_a_message_is_no_operation_of_the_device() -> None:
    device = EmulatedDevice({})
    device.begin()
    device.end(Action(1, Op.RECV_F, 0))
    assert device.overruns.num_operations == 0
    assert device.take()[0].busy_ns == 0


class Wire(LoneTransport):
    """Delivers what is sent to whoever asks next; a peer on a host of its own if wanted."""

    world_size = 2

    def __init__(self, *, other_host: bool = False) -> None:
        self.sent: list[Sequence[torch.Tensor]] = []
        self.other_host = other_host

    def send(self, channel: Channel, message: int, tensors: Sequence[torch.Tensor]) -> None:
        self.sent.append(tensors)

    def receive(
        self, channel: Channel, message: int, specs: Sequence[TensorSpec]
    ) -> PendingReceive:
        return Arrived(tuple(self.sent.pop(0)))

    def start_all_gather(self, values: Sequence[float]) -> PendingGather:
        other = [value + self.other_host for value in values]
        return Rows([list(values), other])


class Arrived:
    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self.tensors = tensors

    def wait(self) -> tuple[torch.Tensor, ...]:
        return self.tensors


class Rows:
    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = rows

    def wait(self) -> list[list[float]]:
        return self.rows


ROAD = Channel(Kind.ACTIVATION, 0, 1)


def emulated(wire: Wire, *, transfer_s: float) -> EmulatedTransport:
    return EmulatedTransport(
        wire, latency_s=0.004, transfer_s=lambda channel, message, tensors: transfer_s
    )


def test_messages_of_a_route_wait_for_each_other_and_arrive_a_latency_later() -> None:
    transport = emulated(Wire(), transfer_s=0.003)
    began_s = time.monotonic()
    for message in range(2):
        transport.send(ROAD, message, [torch.tensor([float(message)])])
    for message, earliest_s in ((0, 0.007), (1, 0.010)):
        (tensor,) = transport.receive(ROAD, message, []).wait()
        assert tensor.item() == message
        assert time.monotonic() - began_s >= earliest_s


def test_routes_do_not_wait_for_other_routes() -> None:
    wire = Wire()
    transport = emulated(wire, transfer_s=100.0)
    began_s = time.monotonic()
    transport.send(ROAD, 0, [])
    transport.send(Channel(Kind.ACTIVATION, 0, 2), 0, [])
    first, second = (tensors[-1].item() for tensors in wire.sent)
    assert second - first < 50e9
    transport.send(ROAD, 1, [])
    assert time.monotonic() - began_s < 90, "a send waited for its route"


def test_kinds_of_messages_that_take_no_time_go_the_real_way() -> None:
    wire = Wire()
    transport = EmulatedTransport(
        wire,
        latency_s=100.0,
        transfer_s=lambda channel, message, tensors: 0.0,
        timed=frozenset({Kind.REDUCTION}),
    )
    sent = torch.ones(2)
    transport.send(ROAD, 0, [sent])
    assert len(wire.sent[0]) == 1
    (received,) = transport.receive(ROAD, 0, []).wait()
    assert received is sent


def test_an_exchange_ends_a_latency_after_the_last_rank_and_gives_what_was_given() -> None:
    transport = emulated(Wire(), transfer_s=0.0)
    began_s = time.monotonic()
    assert transport.start_all_gather([1.0, 2.0]).wait() == [[1.0, 2.0], [1.0, 2.0]]
    assert time.monotonic() - began_s >= 0.004


def test_links_between_hosts_cannot_be_emulated() -> None:
    with pytest.raises(ClusterError, match="run on 2 hosts"):
        emulated(Wire(other_host=True), transfer_s=0.0)
