"""Many faults at random times and places in one run: same losses, nothing leaks.

    python -m chaos.soak --faults 8 --seed 3

Who is hit, by what, and when comes from the seed. Signals hit workers, spare, agent and head.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chaos.play import NotSeen, Play, strike, wrong_losses
from chaos.reference import losses_of
from chaos.report import describe, end_cleanly_on_signals, progress, say
from deepopt.cluster.process_table import descendants

APART_S = (10.0, 15.0)  # between two faults
STEPS = 1_000_000  # it is stopped after the last fault
ROOM = 8  # open files that a process may have more than in the beginning, whatever happened

# What may happen, and how often among a hundred.
BLOWS = {
    ("worker", signal.SIGKILL): 50,
    ("worker", signal.SIGSTOP): 20,
    ("worker", signal.SIGSEGV): 5,
    ("HeadActor", signal.SIGKILL): 10,
    ("AgentActor", signal.SIGKILL): 10,
    ("spare", signal.SIGKILL): 5,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Blow:
    """One fault to come.

    Args:
        after_s: seconds after the one before.
        target: `worker`, `spare`, or the class of an actor.
        number: the signal.
        rank: of a worker.
    """

    after_s: float
    target: str
    number: signal.Signals
    rank: int


def draw_blows(faults: int, *, seed: int, workers: int) -> list[Blow]:
    """The faults of a seed."""
    chance = random.Random(seed)
    kinds, weights = list(BLOWS), list(BLOWS.values())
    drawn = []
    for _ in range(faults):
        ((target, number),) = chance.choices(kinds, weights)
        after_s, rank = chance.uniform(*APART_S), chance.randrange(workers)
        drawn.append(Blow(after_s=after_s, target=target, number=number, rank=rank))
    return drawn


@dataclass(slots=True, kw_only=True)
class Outcome:
    """What the soak came to.

    Args:
        blows: what was done, in words, with its number.
        totals_s: of the reports.
        steps: lines of steps compared.
        repeated: of them, steps said again.
        before: open files and processes by kind of process in the beginning.
        after: and in the end.
        wrong: what should not be so; empty when all is well.
    """

    blows: Counter[str] = field(default_factory=Counter)
    totals_s: list[float] = field(default_factory=list)
    steps: int = 0
    repeated: int = 0
    before: dict[str, Any] = field(default_factory=dict)
    after: dict[str, Any] = field(default_factory=dict)
    wrong: str = ""

    def text(self) -> str:
        """For people."""
        kinds = ", ".join(f"{count} x {what}" for what, count in sorted(self.blows.items()))
        times = sorted(self.totals_s)
        middle = statistics.median(times) if times else 0.0
        return "\n".join(
            [
                f"soak: {sum(self.blows.values())} faults ({kinds})",
                f"  {len(times)} reports, median {middle:.2f} s, worst {max(times, default=0.0):.2f} s",
                f"  {self.steps} lines of steps, {self.repeated} of them again: "
                + (
                    "FAILED: " + self.wrong
                    if self.wrong
                    else "all losses bit-equal, nothing left"
                ),
                f"  processes and open files before: {json.dumps(self.before)}",
                f"  processes and open files after:  {json.dumps(self.after)}",
            ]
        )


def soak(folder: Path, *, faults: int, seed: int) -> Outcome:
    """Run a job through faults at random.

    Args:
        folder: new, for the run.
        faults: how many.
        seed: which.
    """
    play = Play(
        folder,
        steps=STEPS,
        faults={"spares": 1},
        checkpoint={"every": 20},
        worker={"device": "emulated"},
    )
    outcome = Outcome()
    try:
        play.launch()
        play.steady(steps=20, spares=1)
        play.note_shared_memory()
        outcome.before = _census(play)
        for number, blow in enumerate(draw_blows(faults, seed=seed, workers=play.workers), 1):
            time.sleep(blow.after_s)
            words = _strike(play, blow)
            outcome.blows[words] += 1
            progress(f"   {number}: {words}")
        play.steady(steps=40, spares=1)
        outcome.after = _census(play)
        play.close_cleanly()
    except (NotSeen, subprocess.TimeoutExpired) as error:
        outcome.wrong = str(error)
    finally:
        play.close()
    outcome.totals_s = [
        fault["times_s"]["total"]
        for fault in play.status.get("faults", ())
        if "total" in fault["times_s"]
    ]
    lines = play.losses()
    outcome.steps = len(lines)
    outcome.repeated = len(lines) - len({step for step, _ in lines})
    if lines:
        last = max(step for step, _ in lines)
        missing = set(range(1, last + 1)) - {step for step, _ in lines}
        wrong = wrong_losses(lines, losses_of(play.job, last))
        if wrong:
            outcome.wrong = outcome.wrong or f"the loss of step {wrong[0][0]} differs"
        if missing:
            outcome.wrong = outcome.wrong or f"steps without a line: {sorted(missing)[:5]}"
    outcome.wrong = outcome.wrong or find_leak(outcome, faults=faults)
    if left := play.leftovers():
        outcome.wrong = outcome.wrong or f"left: {'; '.join(left)}"
    return outcome


def _strike(play: Play, blow: Blow) -> str:
    if blow.target == "worker":
        # Whatever the job does just now: also in the middle of a recovery.
        pids = [w["pid"] for w in play.status["workers"] if w["rank"] == blow.rank and w["pid"]]
    elif blow.target == "spare":
        workers = {worker["pid"] for worker in play.status["workers"]}
        pids = sorted(set(play.actors("WorkerActor")) - workers)[:1]
    else:
        pids = play.actors(blow.target)[:1]
    words = f"{blow.number.name} of {blow.target}"
    try:
        for pid in pids:
            strike(pid, blow.number)
    except ProcessLookupError:
        pids = []
    return words if pids else f"{words}: none there"


def _census(play: Play) -> dict[str, Any]:
    """Open files of each kind of process of the job, the most of one; how many there are."""
    found: dict[str, list[int]] = {}
    for process in descendants(play.supervisor()):
        try:
            command = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            files = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
        except OSError:
            continue
        name = command.split("/")[-1].split(".")[0] if command else "gone"
        found.setdefault(name, []).append(files)
    census: dict[str, Any] = {name: [len(f), max(f)] for name, f in sorted(found.items())}
    files = len(list(Path(f"/proc/{play.supervisor()}/fd").iterdir()))
    return {**census, "supervisor": [1, files]}


def find_leak(outcome: Outcome, *, faults: int) -> str:
    room = max(ROOM, faults // 2)  # a leak of one a fault is more
    for name, (count, files) in outcome.after.items():
        count_before, files_before = outcome.before.get(name, (0, 0))
        if count > count_before:
            return f"{count} processes of {name}, {count_before} in the beginning"
        if files > files_before + room:
            return f"{files} open files in {name}, {files_before} in the beginning"
    return ""


def main() -> int:
    """Run the soak alone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--faults", type=int, default=50, help="how many [50]")
    parser.add_argument("--seed", type=int, default=1, help="which [1]")
    options = parser.parse_args()
    end_cleanly_on_signals()
    say("\n".join(describe()))
    with tempfile.TemporaryDirectory(prefix="deepopt-soak-") as folder:
        outcome = soak(Path(folder) / "job", faults=options.faults, seed=options.seed)
    say(outcome.text())
    return int(bool(outcome.wrong))


if __name__ == "__main__":
    sys.exit(main())
