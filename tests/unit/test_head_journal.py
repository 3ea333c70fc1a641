import json
from pathlib import Path

import pytest

from deepopt.errors import RunDirectoryError
from deepopt.head.journal import History, Journal, read_journal, replay


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.append("job", job_id="j-1")
        journal.append("generation", generation=1, plan_id=2)
        journal.append("checkpoint", step=20, folder="step-00000020")
    return path


def test_decisions_come_back_in_order(path: Path) -> None:
    entries = read_journal(path).entries
    assert [(e.seq, e.kind) for e in entries] == [
        (1, "job"),
        (2, "generation"),
        (3, "checkpoint"),
    ]
    assert entries[1].fields == {"generation": 1, "plan_id": 2}


def test_a_missing_journal_is_empty(tmp_path: Path) -> None:
    assert read_journal(tmp_path / "none").entries == ()


def test_a_line_cut_off_anywhere_is_dropped_and_replaced_by_the_next(
    path: Path,
) -> None:
    whole = path.read_bytes()
    start_of_last = whole[:-1].rfind(b"\n") + 1
    for size in range(start_of_last, len(whole)):
        path.write_bytes(whole[:size])
        assert len(read_journal(path).entries) == 2
        with Journal(path) as journal:
            assert journal.cut_bytes == size - start_of_last
            assert journal.append("stop").seq == 3
        assert [e.kind for e in read_journal(path).entries] == ["job", "generation", "stop"]


@pytest.mark.parametrize(
    "damage", [b"{}", b"garbage", b"[1]", b"", b'{"seq":2,"time":"","kind":']
)
def test_a_damaged_line_in_the_middle_is_refused(path: Path, damage: bytes) -> None:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], damage, lines[2], b""]))
    with pytest.raises(RunDirectoryError, match=r"journal.jsonl:2: .* is damaged"):
        Journal(path)


def test_a_missing_line_is_refused(path: Path) -> None:
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], lines[2], b""]))
    with pytest.raises(RunDirectoryError, match=r":2: .* has seq 3, expected 2"):
        read_journal(path)


def test_a_line_is_on_disk_when_append_returns(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("state", state="running")
    line = json.loads((tmp_path / "journal.jsonl").read_text())
    assert (line["seq"], line["kind"], line["state"]) == (1, "state", "running")
    journal.close()
    journal.close()


def test_a_disk_that_refuses_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="cannot open"):
        Journal(tmp_path / "missing" / "journal.jsonl")


def test_history_is_what_a_resumed_job_needs(path: Path) -> None:
    with Journal(path) as journal:
        journal.append("plan", plan_id=3)
        journal.append("generation", generation=2, plan_id=3)
        journal.append("state", state="stopped")
        history = replay(journal.entries)
    assert history == History(
        job_id="j-1", generation=2, plan_id=3, state="stopped", checkpoint_step=20
    )
    assert replay([]) == History()
