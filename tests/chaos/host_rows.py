"""Rows with two hosts, made of namespaces of this machine: one is lost, one is cut off and comes back.

Ray, ssh, agents and workers are real; a host is a network, process and mount namespace.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from chaos.matrix import Seen
from chaos.play import LOOK_S, STEP_TIMEOUT_S, NotSeen, Play, wrong_losses
from chaos.reference import losses_of
from chaos.report import Result, progress, sum_of
from support import launcher
from support.hosts import HostGroup, why_not

STEPS = 100_000  # it is stopped before
HEALED_S = (
    3.0  # a cut that is shorter than the lease: the worker there is still alive when it ends
)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRow:
    """One row with two hosts: a worker and a spare on the first, a worker on the second.

    Args:
        name: the fault.
        act: does it to the second host and waits for the end of it.
        limit_s: from the last good sign to the first new step.
    """

    name: str
    act: Callable[[Play, HostGroup], Seen]
    limit_s: float


def why_no_hosts() -> str | None:
    """Why this machine cannot hold hosts; None when it can."""
    reason = why_not()
    return None if reason is None else f"no hosts on this machine: {reason}"


class HostPlay(Play):
    """A job whose commands run on the first host."""

    group: HostGroup

    def launch(self) -> None:
        """Start it over ssh on both hosts and leave it running."""
        hostfile = self.folder / "hosts"
        hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
        command = [launcher.DEEPOPT, "launch", self.job, "--workers", 2, "--detach"]
        command += ["--hostfile", hostfile, "--run-dir", self.run_dir]
        self.on_first(*command)

    def stop(self) -> None:
        """Ask it to stop."""
        self.on_first(launcher.DEEPOPT, "stop", self.run_dir)

    def on_first(self, *words: object) -> None:
        """Run a command on the first host."""
        done = self.group.hosts[0].run(
            list(map(str, words)), timeout_s=STEP_TIMEOUT_S, directory=self.group.shared
        )
        if done.returncode != 0:
            raise NotSeen(f"{words[1]} ended with {done.returncode}: {done.stderr}")


def play_host_row(row: HostRow, *, folder: Path) -> Result:
    """Play a row.

    Args:
        row: which.
        folder: for the hosts.
    """
    name = "".join(c if c.isalnum() else "-" for c in row.name)
    result = Result(act="two hosts", name=row.name, limit_s=row.limit_s)
    progress(f"== {row.name}")
    group = HostGroup(folder / name)
    with group:
        play = HostPlay(
            group.shared / "job",
            steps=STEPS,
            worker={"device": "cpu"},
            emulation={},
            checkpoint={"every": 50},
            faults={"spares": 1},
        )
        play.group = group
        try:
            play.launch()
            play.steady(steps=60, spares=1)
            seen = row.act(play, group)
            play.steady(steps=20)
            play.stop()
            play.until("its stop", lambda s: s["state"] == "stopped")
            result.causes = [fault["cause"] for fault in seen.faults]
            result.times_s, result.note, result.wrong = (
                sum_of(seen.faults),
                seen.note,
                seen.wrong,
            )
            total_s = result.times_s.get("total", 0.0)
            if total_s > row.limit_s and not result.wrong:
                result.wrong = f"{total_s:.2f} s, more than {row.limit_s:g} s"
        except (NotSeen, subprocess.TimeoutExpired) as error:
            result.wrong = str(error)
        lines = play.losses()
        job = play.job.read_text()
    if lines:
        kept = folder / f"{name}.yaml"  # the hosts' folder may be gone
        kept.write_text(job)
        wrong = wrong_losses(lines, losses_of(kept, max(step for step, _ in lines)))
        result.losses = not wrong
        if wrong and not result.wrong:
            result.wrong = f"losses differ from step {wrong[0][0]} on"
    progress(f"   {result.wrong or 'ok'} {dict(result.times_s)}")
    return result


def _lost(play: Play, group: HostGroup) -> Seen:
    group.hosts[1].power_off()
    return Seen(faults=play.next_faults(), wrong=_not_a_host(play))


def _cut(play: Play, group: HostGroup) -> Seen:
    """The cut ends after the other side is back: the worker behind it must find no way in."""
    group.hosts[1].cut_link()
    faults = play.next_faults()
    time.sleep(HEALED_S)
    group.hosts[1].heal_link()
    until_s = time.monotonic() + STEP_TIMEOUT_S
    while any("WorkerActor" in process.command for process in group.hosts[1].processes()):
        if time.monotonic() > until_s:
            raise NotSeen("the worker behind the cut lives on after it")
        time.sleep(LOOK_S)
    refused = len(play.events("message_refused"))
    return Seen(
        faults=faults,
        note=f"the worker behind the cut is gone; {refused} of its messages refused",
        wrong=_not_a_host(play),
    )


def _not_a_host(play: Play) -> str:
    budgets = [fault["budget"] for fault in play.status["faults"]]
    return "" if budgets == ["host"] else f"counted as {budgets}"


HOST_ROWS = (
    HostRow(name="a host is lost", act=_lost, limit_s=10.0),
    HostRow(name="a host is cut off both ways, then healed", act=_cut, limit_s=10.0),
)
