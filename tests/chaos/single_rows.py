"""Rows that need a job of their own: the start and the end of one, its disk, its resume."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.matrix import Seen
from chaos.play import LOOK_S, STEP_TIMEOUT_S, NotSeen, Play, strike, wrong_losses
from chaos.reference import losses_of
from chaos.report import Result, progress, sum_of
from support import launcher

STEPS = 40
FULL_S = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleRow:
    """One row with a job to itself.

    Args:
        name: the fault.
        act: launches the job, does it, waits for the end of it.
        limit_s: from the last good sign to the first new step.
        sections: of the job file.
        ends: how the job must end, after its last step unless it failed.
    """

    name: str
    act: Callable[[Play], Seen]
    limit_s: float = 10.0
    sections: dict[str, Any] = field(default_factory=dict)
    ends: str = "finished"


def play_single(row: SingleRow, *, folder: Path) -> Result:
    """Play a row.

    Args:
        row: which.
        folder: for its run.
    """
    name = "".join(c if c.isalnum() else "-" for c in row.name)
    play = Play(folder / name, steps=STEPS, **row.sections)
    result = Result(act="jobs of their own", name=row.name, limit_s=row.limit_s)
    progress(f"== {row.name}")
    try:
        seen = row.act(play)
        status = play.until("its end", lambda s: s["state"] == row.ends)
        result.causes = [fault["cause"] for fault in seen.faults]
        result.times_s, result.note, result.wrong = sum_of(seen.faults), seen.note, seen.wrong
        if row.ends == "finished" and status["step"] != STEPS:
            result.wrong = f"ended at step {status['step']} of {STEPS}"
        if (total_s := result.times_s.get("total", 0.0)) > row.limit_s and not result.wrong:
            result.wrong = f"{total_s:.2f} s, more than {row.limit_s:g} s"
    except (NotSeen, subprocess.TimeoutExpired, OSError) as error:
        result.wrong = str(error)
    finally:
        play.close()
    if lines := play.losses():
        wrong = wrong_losses(lines, losses_of(play.job, STEPS))
        result.losses = not wrong
        if wrong:
            result.wrong = result.wrong or f"losses differ from step {wrong[0][0]} on"
    if left := play.leftovers():
        result.wrong = result.wrong or f"left: {'; '.join(left)}"
    progress(f"   {result.wrong or 'ok'} {dict(result.times_s)}")
    return result


def _wait_for(what: str, look: Callable[[], Any]) -> Any:
    until_s = time.monotonic() + STEP_TIMEOUT_S
    while not (found := look()):
        if time.monotonic() > until_s:
            raise NotSeen(f"no {what} after {STEP_TIMEOUT_S:g} s")
        time.sleep(LOOK_S)
    return found


def _all_gone(play: Play) -> None:
    _wait_for("end of all processes", lambda: not launcher.processes_of(play.run_dir))


def _head_in_the_start(play: Play) -> Seen:
    """The head is killed as soon as the workers' processes are there, before they are ready."""
    play.launch()
    _wait_for("worker processes", lambda: len(play.actors("WorkerActor")) >= play.workers)
    if play.status.get("state") != "starting":
        raise NotSeen(f"the workers were ready too soon: {play.status.get('state')}")
    strike(play.actor("HeadActor"))
    return Seen(faults=play.next_faults())


def _exception(play: Play) -> Seen:
    play.launch()
    status = play.until("its failure", lambda s: s["state"] in ("failed", "finished"))
    culprit = (status["error"] or {}).get("culprit") or {}
    told = f"rank {culprit.get('rank')}: {culprit.get('message')}"
    right = culprit.get("rank") == 1 and "Traceback" in str(culprit.get("traceback"))
    return Seen(note=f"exit {status['exit_code']}; {told}", wrong="" if right else told)


def _supervisor_killed(play: Play) -> Seen:
    play.launch()
    before = play.steady(steps=14)
    strike(play.supervisor())
    began_s = time.monotonic()
    _all_gone(play)
    gone_s = time.monotonic() - began_s
    play.resume()
    play.until("a new step", lambda s: s["state"] == "running" and s["step"] > before["step"])
    total_s = time.monotonic() - began_s
    return Seen(note=f"all gone after {gone_s:.1f} s, resumed; {total_s:.1f} s to a new step")


def _supervisor_told_to_go(play: Play) -> Seen:
    play.launch()
    play.steady(steps=6)
    strike(play.supervisor(), signal.SIGTERM)
    status = play.until("its stop", lambda s: s["state"] == "stopped")
    saved = status["checkpoint_step"] == status["step"]
    _all_gone(play)
    line = (
        "pipeline.placement=line",
        "pipeline.schedule=auto",
    )  # the job names an order for mirror
    play.resume("--workers", 3, *(word for change in line for word in ("--set", change)))
    return Seen(
        note=f"saved at step {status['step']}, resumed on three workers in a line",
        wrong="" if saved else f"step {status['step']} is in no checkpoint",
    )


def _bit_on_disk(play: Play) -> Seen:
    play.launch()
    play.until("two checkpoints", lambda s: s["checkpoint_step"] >= 20)
    launcher.run("stop", play.run_dir)
    _all_gone(play)
    newest = max(
        (path for path in (play.run_dir / "checkpoints").iterdir() if path.is_dir()),
        key=lambda path: (
            (path / "manifest.json").stat().st_mtime_ns
            if (path / "manifest.json").exists()
            else 0
        ),
    )
    shard = max(newest.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    play.resume()
    play.until("a new step", lambda s: s["state"] in ("running", "finished"))
    told = [event["reason"] for event in play.events("checkpoint_failed")]
    return Seen(
        note=told[-1] if told else "", wrong="" if told else "nobody told of the damage"
    )


# --- a full disk ---------------------------------------------------------------------------

DISK_MB = 24  # of the run directory, in a mount namespace that ends with its last process


class SmallDisk:
    """A mount namespace in which a folder is a small file system, kept by a process of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        mount = f'mount -t tmpfs -o size={DISK_MB}m tmpfs "$1" && echo ready && exec cat'
        self._keeper = subprocess.Popen(
            [
                "unshare",
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-ec",
                mount,
                "sh",
                folder,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._keeper.stdout is not None
        if self._keeper.stdout.readline() != b"ready\n":
            raise NotSeen("no file system could be mounted: this row takes root")
        self.seen_from_here = Path(f"/proc/{self._keeper.pid}/root{folder}")

    def command(self, *words: object) -> list[str]:
        """A command that runs inside."""
        namespace = f"--mount=/proc/{self._keeper.pid}/ns/mnt"
        return ["nsenter", namespace, "--wd=/", "--", *map(str, words)]

    def fill(self) -> Path:
        """Write until there is no room; the file that does it."""
        ballast = self.seen_from_here / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))
        return ballast

    def close(self) -> None:
        """Unmount it with all that is in it."""
        assert self._keeper.stdin is not None
        self._keeper.stdin.close()
        self._keeper.wait(STEP_TIMEOUT_S)


def _full_disk(play: Play) -> Seen:
    """The whole run directory has no room for a while: status, journal, metrics, checkpoints."""
    folder, disk = play.run_dir, SmallDisk(play.run_dir)
    play.run_dir = disk.seen_from_here
    command = disk.command(launcher.DEEPOPT, "launch", play.job, "--workers", play.workers)
    log = (play.folder / "launch.log").open("wb")
    launched = subprocess.Popen(
        [*command, "--run-dir", str(folder)], stdout=log, stderr=log, process_group=0
    )
    try:
        play.until("a checkpoint", lambda s: s["checkpoint_step"] >= 10)
        ballast = disk.fill()
        time.sleep(FULL_S)
        ended = launched.poll()
        ballast.unlink()
        if ended is not None:
            raise NotSeen(f"the job ended with {ended} when its disk was full")
        status = play.until("its end", lambda s: s["state"] in ("finished", "failed"))
        code = launched.wait(STEP_TIMEOUT_S)
        said = [event["reason"] for event in play.events("checkpoint_failed")]
        missing = STEPS - len({step for step, _ in play.losses()})
        shutil.copytree(disk.seen_from_here, folder, dirs_exist_ok=True)
        return Seen(
            note=f"told: {said[0] if said else 'nothing'}; {missing} steps have no line in metrics.jsonl",
            wrong="" if (status["state"], code) == ("finished", 0) else f"exit {code}",
        )
    finally:
        play.run_dir = folder
        if launched.poll() is None:
            os.killpg(launched.pid, signal.SIGINT)
            launched.wait(STEP_TIMEOUT_S)
        log.close()
        disk.close()


SINGLE_ROWS = (
    SingleRow(
        name="head killed while workers start",
        act=_head_in_the_start,
        limit_s=60.0,  # it is a start again
    ),
    SingleRow(
        name="the model raises",
        act=_exception,
        sections={"faults": {"inject": [{"raise": {"rank": 1, "step": 5, "op": "F"}}]}},
        ends="failed",
    ),
    SingleRow(name="supervisor: kill -9, resumed", act=_supervisor_killed),
    SingleRow(name="supervisor: SIGTERM, resumed on other stages", act=_supervisor_told_to_go),
    SingleRow(name="a bit of the newest checkpoint flips", act=_bit_on_disk),
    SingleRow(name=f"the run directory is full for {FULL_S:g} s", act=_full_disk),
)
