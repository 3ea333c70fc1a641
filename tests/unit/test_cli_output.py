"""What the terminal shows is readable, and errors say the next step."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from deepopt.errors import ClusterError, JobFileError
from deepopt_cli import output


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (None, "-"),
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (42.4, "42 s"),
        (187, "3:07"),
        (7387, "2:03:07"),
        (90000, "1 d 01:00"),
    ],
)
def test_durations_are_short(seconds: float | None, words: str) -> None:
    assert output.human_seconds(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0"),
        (950, "950"),
        (999.7, "1.00k"),
        (12345, "12.3k"),
        (4_560_000, "4.56M"),
        (7_000_000_000, "7.00B"),
    ],
)
def test_counts_have_three_digits(value: float, words: str) -> None:
    assert output.human_count(value) == words


@pytest.mark.parametrize(
    ("numbers", "words"),
    [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2, 5"), ([4, 1, 1, 2, 0], "0-2, 4")],
)
def test_numbers_fold_into_ranges(numbers: list[int], words: str) -> None:
    assert output.ranges(numbers) == words


def test_a_table_lines_up_and_shows_what_is_missing() -> None:
    assert output.table(("name", "size"), [("a", 5), ("long name", None)]).splitlines() == [
        "name       size",
        "a             5",
        "long name     -",
    ]


def run_failing(error: BaseException) -> int:
    @output.reports_errors
    def command() -> None:
        raise error

    with pytest.raises(typer.Exit) as ended:
        command()
    return int(ended.value.exit_code)


def test_a_users_mistake_is_an_error_a_blank_line_and_a_hint(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = JobFileError(
        "job.yaml:3: training.stepz: unknown key", remedy="did you mean steps?"
    )
    assert run_failing(error) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (
        "error: job.yaml:3: training.stepz: unknown key\n\nhint: did you mean steps?\n"
    )


def test_an_error_without_a_remedy_has_no_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_failing(ClusterError("port 6379 is taken")) == 3
    assert capsys.readouterr().err == "error: port 6379 is taken\n"


def test_an_interrupt_is_130() -> None:
    assert run_failing(KeyboardInterrupt()) == 130


def test_a_refused_file_is_named_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run_failing(PermissionError(13, "Permission denied", "/root/x")) == 1
    assert capsys.readouterr().err == (
        "error: /root/x: Permission denied\n\n"
        "hint: check who may read and write there, or name another path\n"
    )


def test_a_bug_is_one_line_and_its_traceback_is_kept_in_a_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert run_failing(ZeroDivisionError("division by zero")) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: unexpected ZeroDivisionError at test_cli_output.py:")
    assert "Traceback" not in shown
    [kept] = tmp_path.iterdir()
    assert str(kept) in shown
    assert "ZeroDivisionError: division by zero" in kept.read_text()


def test_the_traceback_is_printed_on_wish(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv(output.TRACEBACK_VARIABLE, "1")
    run_failing(ZeroDivisionError("division by zero"))
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_shadowed_package_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    error = ModuleNotFoundError("No module named 'deepopt.errors'", name="deepopt.errors")
    assert run_failing(error) == 1
    shown = capsys.readouterr().err
    assert "cannot import deepopt.errors" in shown
    assert "Python finds 'deepopt' at" in shown
