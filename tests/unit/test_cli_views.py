"""Steps are shown as often as asked, with the time that is left from that step on."""

from __future__ import annotations

import json

import pytest

from deepopt_cli.views import JsonView, PlainView
from support.fake_supervisor import metrics, status


def test_the_first_and_the_last_step_and_every_nth_are_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    view = PlainView(every=4)
    view.status(status(last_step=10))
    for step in range(1, 11):
        view.step(metrics(step))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0].split()[1] for line in shown] == ["1", "4", "8", "10"]


def test_the_time_left_is_that_of_the_shown_step(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every=1)
    view.step(metrics(1))  # before the first status
    view.status(status(step=2, last_step=10, eta_s=80.0))
    for step in (3, 10):
        view.step(metrics(step))
    ends = [line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["bubble 25 %", "ETA 1:10", "bubble 25 %"]


def test_events_for_machines_only_are_not_lines(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView(every=1)
    view.event({"time": "", "kind": "worker_ready", "rank": 0})
    view.event({"time": "", "kind": "warning", "message": "slow disk"})
    assert capsys.readouterr().out == "warning: slow disk\n"


def test_json_keeps_words_off_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    view = JsonView()
    view.status(status())
    view.step(metrics(1))
    view.event({"time": "", "kind": "warning", "message": "slow disk"})
    view.event({"time": "", "kind": "checkpoint", "step": 1, "path": "x"})
    view.note("stopping")
    shown = capsys.readouterr()
    assert json.loads(shown.out) == metrics(1)
    assert shown.err == "warning: slow disk\nstopping\n"
