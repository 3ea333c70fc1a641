"""The background writer: one checkpoint at a time, every outcome reported, no dead thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import ShardEntry
from deepopt.checkpoint.store import CheckpointStore
from deepopt.checkpoint.writer import CheckpointWriter
from deepopt.errors import CheckpointError
from support.checkpoints import make_manifest, make_states

TIMEOUT_S = 30.0


class Reports:
    """What a writer reported, and a gate that holds it at its first report."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[ShardEntry, ...]] = {}
        self.failed: dict[int, str] = {}
        self.gate = threading.Event()
        self.gate.set()

    def on_written(self, step: int, shards: tuple[ShardEntry, ...]) -> None:
        assert self.gate.wait(TIMEOUT_S)
        self.written[step] = shards

    def on_failed(self, step: int, reason: str) -> None:
        self.failed[step] = reason


@pytest.fixture
def reports() -> Reports:
    return Reports()


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


@pytest.fixture
def writer(store: CheckpointStore, reports: Reports) -> Iterator[CheckpointWriter]:
    writer = CheckpointWriter(store, 3, reports.on_written, reports.on_failed)
    yield writer
    reports.gate.set()
    assert writer.close(TIMEOUT_S)


def test_a_submitted_checkpoint_is_written_and_can_be_committed(
    store: CheckpointStore, writer: CheckpointWriter, reports: Reports
):
    writer.submit(50, 1, make_states(50))
    assert writer.wait_idle(TIMEOUT_S)
    assert not writer.busy
    shards = reports.written[50]
    assert {entry.writer for entry in shards} == {3}
    store.commit(make_manifest(50, shards=shards))
    assert store.newest_verified() is not None


def test_a_second_checkpoint_is_refused_while_the_first_is_written(
    writer: CheckpointWriter, reports: Reports
):
    reports.gate.clear()
    writer.submit(50, 1, make_states(50))
    assert writer.busy
    assert not writer.wait_idle(0.01)
    with pytest.raises(CheckpointError, match="step 60: step 50 is still being written"):
        writer.submit(60, 1, make_states(60))
    reports.gate.set()
    assert writer.wait_idle(TIMEOUT_S)
    writer.submit(60, 1, make_states(60))
    assert writer.wait_idle(TIMEOUT_S)
    assert list(reports.written) == [50, 60]


def test_a_disk_that_refuses_is_reported_and_the_next_checkpoint_goes_well(
    store: CheckpointStore, writer: CheckpointWriter, reports: Reports
):
    store.root.write_text("a file where the folder should be")
    writer.submit(50, 1, make_states(50))
    assert writer.wait_idle(TIMEOUT_S)
    assert str(store.root) in reports.failed[50]
    store.root.unlink()
    writer.submit(60, 1, make_states(60))
    assert writer.wait_idle(TIMEOUT_S)
    assert list(reports.written) == [60]


def test_an_unforeseen_error_is_reported_and_does_not_end_the_thread(
    writer: CheckpointWriter, reports: Reports
):
    broken = LayerState(layer="x", tensors={"a": torch.empty(2, device="meta")})
    writer.submit(50, 1, [broken])
    assert writer.wait_idle(TIMEOUT_S)
    assert "Error: " in reports.failed[50]
    writer.submit(60, 1, make_states(60))
    assert writer.wait_idle(TIMEOUT_S)
    assert list(reports.written) == [60]


def test_a_report_that_raises_does_not_end_the_thread(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
):
    def raise_(*_: object) -> None:
        raise RuntimeError("the link is down")

    writer = CheckpointWriter(store, 0, raise_, raise_)
    for step in (50, 60):
        writer.submit(step, 1, make_states(step))
        assert writer.wait_idle(TIMEOUT_S)
    assert caplog.text.count("RuntimeError: the link is down") == 2
    assert writer.close(TIMEOUT_S)


def test_closing_finishes_what_is_being_written(store: CheckpointStore, reports: Reports):
    writer = CheckpointWriter(store, 0, reports.on_written, reports.on_failed)
    writer.submit(50, 1, make_states(50))
    assert writer.close(TIMEOUT_S)
    assert writer.close(TIMEOUT_S)
    assert list(reports.written) == [50]
    with pytest.raises(CheckpointError, match="closed"):
        writer.submit(60, 1, make_states(60))


def test_closing_gives_up_when_its_time_is_over(writer: CheckpointWriter, reports: Reports):
    reports.gate.clear()
    writer.submit(50, 1, make_states(50))
    assert not writer.close(0.01)
