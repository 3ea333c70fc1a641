"""The live view shows progress, workers and the last events, and never more often than it should."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from deepopt_cli.job_picture import NUM_EVENTS
from deepopt_cli.live import LiveView
from support.fake_supervisor import metrics, status, worker


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


class Screen:
    """A live view on a terminal that is a string."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.terminal = io.StringIO()
        console = Console(file=self.terminal, force_terminal=True, width=120, color_system=None)
        self.view = LiveView(title="tiny  runs/a", console=console, clock=self.clock)

    def text(self) -> str:
        console = Console(file=io.StringIO(), width=120, color_system=None)
        with console.capture() as captured:
            console.print(self.view.render())
        return captured.get()


@pytest.fixture
def screen() -> Screen:
    return Screen()


def test_a_job_that_has_only_begun_is_shown(screen: Screen) -> None:
    assert "tiny  runs/a  starting" in screen.text()
    screen.view.close()


def test_everything_that_matters_is_on_the_screen(screen: Screen) -> None:
    silent = {**worker(0, stages=[0, 3]), "heartbeat_age_s": 7200}
    screen.view.status(status(restarts=1, workers=[silent]))
    screen.view.step(metrics(4))
    text = screen.text()
    screen.view.close()
    for expected in (
        "running",
        "generation 1",
        "mirror, bi_stream",
        "step 4/5",  # newer than the status
        "ETA 12 s",
        "loss 4.5000",
        "16.4k tokens/s",
        "8.19k tokens/s a worker",
        "MFU 12.5 %",
        "bubble 25 %",
        "1 restarts",
        "checkpoint 2",
        "75 %",
        "1F2",
        "0, 3",
        "2:00:00",  # heartbeat
        "host-a",
        "Ctrl-C stops the job with a checkpoint",
    ):
        assert expected in text, expected


def test_after_a_restart_the_step_goes_back(screen: Screen) -> None:
    screen.view.step(metrics(4))
    screen.view.status(status(step=2, generation=2))
    assert "step 2/5" in screen.text()
    screen.view.close()


def test_only_the_last_events_are_kept(screen: Screen) -> None:
    for number in range(NUM_EVENTS + 2):
        screen.view.event({"time": "", "kind": "warning", "message": f"number {number}"})
    screen.view.event({"time": "", "kind": "message_refused"})
    shown = [line.strip() for line in screen.text().splitlines() if "number" in line]
    assert shown == [f"warning: number {n}" for n in range(2, NUM_EVENTS + 2)]
    screen.view.close()


def test_the_screen_is_drawn_four_times_a_second_and_at_once_when_the_state_changes(
    screen: Screen,
) -> None:
    def drawn_by(seconds: float, **changes: object) -> bool:
        screen.clock.now_s += seconds
        before = screen.terminal.tell()
        screen.view.status(status(**changes))
        return screen.terminal.tell() > before

    assert drawn_by(1.0)
    assert not drawn_by(0.1)
    assert drawn_by(0.2)
    assert drawn_by(0.01, state="stopping")
    screen.view.close()
