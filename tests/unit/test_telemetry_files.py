"""JSON lines and JSON files survive crashes, cut lines and readers that come at any moment."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deepopt.errors import RunDirectoryError
from deepopt.telemetry.files import (
    JsonLinesTail,
    JsonLinesWriter,
    read_json,
    read_json_lines,
    write_json_atomic,
)
from deepopt.telemetry.metrics import JsonLinesSink, MetricsSinks


@pytest.fixture
def room() -> Iterator[Callable[[int | None], None]]:
    """Limits how far files of this process may grow, as a full disk does; None: no limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size_bytes: int | None) -> None:
        most = before[0] if size_bytes is None else size_bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))

    yield limit
    limit(None)


def test_a_disk_that_takes_a_part_of_a_line_leaves_no_part(
    tmp_path: Path, room: Callable[[int | None], None]
) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLinesWriter(path) as writer:
        writer.write({"step": 1})
        room(path.stat().st_size + 5)
        with pytest.raises(OSError, match="File too large"):
            writer.write({"step": 2})
        room(None)
        writer.write({"step": 3})
    assert read_json_lines(path) == [{"step": 1}, {"step": 3}]


def test_metrics_that_a_full_disk_refused_are_written_when_there_is_room(
    tmp_path: Path, room: Callable[[int | None], None]
) -> None:
    path, warnings = tmp_path / "metrics.jsonl", []
    sinks = MetricsSinks({"file": lambda: JsonLinesSink(path)}, on_warning=warnings.append)
    sinks.write(1, {})
    room(path.stat().st_size + 5)
    sinks.write(2, {})
    sinks.write(3, {})
    room(None)
    sinks.write(4, {})
    sinks.close()
    assert [line["step"] for line in read_json_lines(path)] == [1, 2, 3, 4]
    assert len(warnings) == 1
    assert "metrics sink file cannot write: " in warnings[0].message


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    values = [5.543712139129639, 0.1 + 0.2, 2.0**-1074, 1.7976931348623157e308]
    with JsonLinesWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write({"values": values})
    [record] = read_json_lines(tmp_path / "metrics.jsonl")
    assert [struct.pack("d", v) for v in record["values"]] == [
        struct.pack("d", v) for v in values
    ]


def test_not_a_number_becomes_null_so_that_every_json_reader_accepts_the_line(
    tmp_path: Path,
) -> None:
    with JsonLinesWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"loss": float("nan"), "per_rank": [float("inf"), 1.0]})
    assert (tmp_path / "a.jsonl").read_text() == '{"loss": null, "per_rank": [null, 1.0]}\n'


def test_a_line_is_readable_as_soon_as_write_returns(tmp_path: Path) -> None:
    writer = JsonLinesWriter(tmp_path / "deep" / "a.jsonl")
    writer.write({"step": 1})
    assert read_json_lines(tmp_path / "deep" / "a.jsonl") == [{"step": 1}]
    writer.close()
    writer.close()


@pytest.mark.parametrize("cut", ['{"step": 2, "lo', '{"step": 2', "{", '"text"', "x" * 200_000])
def test_a_cut_last_line_is_ignored_by_readers_and_removed_by_the_next_writer(
    tmp_path: Path, cut: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n' + cut)
    assert read_json_lines(path) == [{"step": 1}]
    with JsonLinesWriter(path) as writer:
        writer.write({"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}')
    with JsonLinesWriter(path) as writer:
        writer.write({"step": 3})
    assert [r["step"] for r in read_json_lines(path)] == [1, 2, 3]


def test_a_file_that_is_one_cut_line_becomes_empty(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step"')
    JsonLinesWriter(path).close()
    assert path.read_bytes() == b""


def test_a_damaged_line_in_the_middle_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(RunDirectoryError, match=r"a\.jsonl:2 is not a JSON object: 'rubbish'"):
        read_json_lines(path)


def test_a_tail_gives_each_line_once_also_when_it_comes_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    tail = JsonLinesTail(path)
    assert tail.read_new() == []
    path.write_text('{"step": 1}\n{"st')
    assert tail.read_new() == [{"step": 1}]
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert tail.read_new() == [{"step": 2}]
    assert tail.read_new() == []


def test_a_tail_that_starts_at_the_end_leaves_out_what_is_there(tmp_path: Path) -> None:
    with JsonLinesWriter(tmp_path / "a.jsonl") as writer:
        writer.write({"step": 1})
        tail = JsonLinesTail(tmp_path / "a.jsonl", at_end=True)
        writer.write({"step": 2})
    assert tail.read_new() == [{"step": 2}]


def test_an_atomic_write_leaves_the_old_file_when_the_value_cannot_be_written(
    tmp_path: Path,
) -> None:
    path = tmp_path / "status.json"
    write_json_atomic(path, {"state": "running"}, durable=True)
    circular: list[object] = []
    circular.append(circular)
    with pytest.raises(RecursionError):
        write_json_atomic(path, circular)
    assert read_json(path) == {"state": "running"}
    assert [p.name for p in tmp_path.iterdir()] == ["status.json"]


def test_a_missing_or_damaged_json_file_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="does not exist"):
        read_json(tmp_path / "status.json")
    (tmp_path / "status.json").write_text(json.dumps([1]))
    with pytest.raises(RunDirectoryError, match="is not a JSON object"):
        read_json(tmp_path / "status.json")
