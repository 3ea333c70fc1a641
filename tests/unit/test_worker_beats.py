"""Signs of life through the store in which the workers meet."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace

from deepopt.worker.beats import Address, BeatReader, BeatSender
from deepopt.worker.messages import Heartbeat, Sender

HERE, ELSEWHERE = ("127.0.0.1", 1), ("127.0.0.1", 2)


@dataclass
class Store:
    values: dict[str, bytes] = field(default_factory=dict)
    is_broken: bool = False

    def set(self, key: str, value: str) -> None:
        if self.is_broken:
            raise RuntimeError("Broken pipe\nException raised from somewhere")
        self.values[key] = value.encode()

    def append(self, key: str, value: str) -> None:
        self.values[key] = self.values.get(key, b"") + value.encode()

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


def beat(rank: int = 0, *, progress: int = 0, generation: int = 1) -> Heartbeat:
    sender = Sender(
        job_id="job", generation=generation, plan_id=1, rank=rank, incarnation=f"uuid-{rank}"
    )
    return Heartbeat(sender=sender, step=3, progress=progress, action="2F5")


def sender_to(stores: dict[Address, Store], *, address: list[Address]) -> BeatSender:
    return BeatSender(address=lambda: address[0], connect=lambda at: stores[at])


def test_the_head_reads_the_last_sign_of_each_worker_once() -> None:
    store = Store()
    reader = BeatReader(lambda _: store)
    assert reader.read(1, 3) == []
    for rank in (2, 0):
        sender = sender_to({HERE: store}, address=[HERE])
        sender.send(beat(rank))
        sender.send(beat(rank, progress=1))
    assert reader.read(1, 3) == [beat(0, progress=1), beat(2, progress=1)]
    assert reader.read(1, 3) == []


def test_the_head_reads_all_that_a_sign_says() -> None:
    store = Store()
    reader, sender = BeatReader(lambda _: store), sender_to({HERE: store}, address=[HERE])
    said = replace(beat(progress=7), action_s=1.5, evaluation=(3, 8))
    assert all(getattr(said, f.name) != f.default for f in fields(said))
    sender.send(said)
    assert reader.read(1, 1) == [said]


def test_a_worker_inside_one_long_operation_still_gives_signs() -> None:
    store = Store()
    reader, sender = BeatReader(lambda _: store), sender_to({HERE: store}, address=[HERE])
    sender.send(beat())
    reader.read(1, 1)
    sender.send(beat())
    assert reader.read(1, 1) == [beat()]


def test_a_sign_that_is_there_before_the_head_looks_is_not_lost() -> None:
    store = Store()
    sender_to({HERE: store}, address=[HERE]).send(beat())
    assert BeatReader(lambda _: store).read(1, 1) == [beat()]


def test_each_generation_has_signs_of_its_own() -> None:
    stores = {1: Store(), 2: Store()}
    reader = BeatReader(stores.__getitem__)
    sender_to({HERE: stores[1]}, address=[HERE]).send(beat())
    reader.read(1, 1)
    assert reader.read(2, 2) == []
    sender_to({HERE: stores[2]}, address=[HERE]).send(beat(1, generation=2))
    assert reader.read(2, 2) == [beat(1, generation=2)]


def test_what_is_no_sign_of_life_is_left_out() -> None:
    store = Store()
    reader = BeatReader(lambda _: store)
    store.set("beat/0", "not JSON")
    store.set("beat/1", '{"sender": {"rank": 1}}')
    sender_to({HERE: store}, address=[HERE]).send(beat(2))
    assert reader.read(1, 3) == [beat(2)]


def test_a_worker_whose_store_breaks_asks_for_another_way_until_the_store_has_moved() -> None:
    broken, moved, address = Store(), Store(), [HERE]
    sender = sender_to({HERE: broken, ELSEWHERE: moved}, address=address)
    assert sender.send(beat())
    broken.is_broken = True
    assert not sender.send(beat())
    broken.is_broken = False
    assert not sender.send(beat())
    address[0] = ELSEWHERE
    assert sender.send(beat(progress=7))
    assert BeatReader(lambda _: moved).read(1, 1) == [beat(progress=7)]


def test_a_store_that_cannot_be_reached_is_tried_once() -> None:
    tries = []

    def refuse(address: Address) -> Store:
        tries.append(address)
        raise RuntimeError("no answer")

    sender = BeatSender(address=lambda: HERE, connect=refuse)
    assert not sender.send(beat())
    assert not sender.send(beat())
    assert tries == [HERE]
