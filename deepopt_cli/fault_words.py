"""Faults of a job in words: one block each, from the JSON of `status.json`; no I/O."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deepopt_cli.output import human_seconds, ranges

TRACEBACK_LINES = 12  # of the end, in the status; the whole is in the log
PARTS = {
    "detect": "detected",
    "decide": "judged",
    "fence": "fenced",
    "rendezvous": "rendezvous",
    "restore": "restored",
    "replay": "replayed",
}
CAUSES = {
    "exit": "process ended",
    "stopped": "process stopped by a signal",
    "held_gil": "Python held: something keeps the GIL",
    "disk": "process waits for a disk or a driver",
    "unreachable": "host out of reach",
    "silent": "silent",
    "stuck": "an operation does not end",
    "collective": "no data moves: all wait for each other",
    "setup": "not ready in time",
    "error": "its own error",
    "device": "its device is gone or broken",
    "peer": "a peer or a link failed",
    "head": "the head's process ended",
}


def fault_lines(faults: Sequence[Mapping[str, Any]], *, most: int) -> list[str]:
    """The newest faults, a block each.

    Args:
        faults: the `faults` of a status.
        most: blocks.
    """
    lines: list[str] = []
    if len(faults) > most:
        lines.append(f"faults      {len(faults)}, the last {most}:")
    for fault in faults[-most:]:
        if lines:
            lines.append("")
        lines += fault_block(fault)
    return lines


def fault_block(fault: Mapping[str, Any]) -> list[str]:
    """One fault: culprit, what it was doing, times, what was lost, what comes next, victims."""
    culprit = fault.get("culprit") or {}
    cause = CAUSES.get(str(fault.get("cause")), str(fault.get("cause")))
    stages = culprit.get("stages") or ()
    held = f", stage{'s' if len(stages) > 1 else ''} {ranges(stages)}" if stages else ""
    who = (
        f"rank {culprit.get('rank')} on {culprit.get('host') or 'an unknown host'} "
        f"(pid {culprit.get('pid')}){held}"
        if culprit.get("rank") is not None
        else "the head"
    )
    lines = [f"fault {fault.get('number')}     {who}: {cause}"]
    if culprit.get("message"):
        lines.append(f"  sign      {culprit['message']}")
    if culprit.get("rank") is not None:
        lines.append(f"  doing     {doing(culprit)}")
    if culprit.get("traceback"):
        shown = str(culprit["traceback"]).rstrip("\n").splitlines()
        if len(shown) > TRACEBACK_LINES:
            lines.append(
                f"  ...       {len(shown) - TRACEBACK_LINES} lines before are in its log"
            )
        lines += [f"            {line}" for line in shown[-TRACEBACK_LINES:]]
    times = fault.get("times_s") or {}
    parts = [f"{word} {_short(times[name])}" for name, word in PARTS.items() if name in times]
    total = f"; {_short(times['total'])} in all" if "total" in times else ""
    if parts:
        lines.append(f"  times     {', '.join(parts)}{total}")
    lines.append(f"  lost      {lost(fault)}")
    outcome = str(fault.get("outcome"))
    following = f"{fault.get('next')}" + ("" if outcome == "open" else f"; {outcome}")
    lines.append(f"  next      {following}")
    victims = fault.get("victims") or ()
    if victims:
        ends = {str(victim.get("message", "")) for victim in victims}
        why = f": {ends.pop()}" if len(ends) == 1 else ""
        several = "s" if len(victims) > 1 else ""
        more = int(fault.get("num_victims", 0)) - len(victims)
        others = f" and {more:,} more" if more > 0 else ""
        lines.append(
            f"  victims   rank{several} {ranges(v['rank'] for v in victims)}{others}{why}"
        )
    return lines


def lost(fault: Mapping[str, Any]) -> str:
    """What a fault has cost, in words."""
    replayed = fault.get("replayed_steps")
    source = fault.get("source") or "the step before"
    if replayed:
        first, last = replayed
        which = f"step {first} was" if first == last else f"steps {first} to {last} were"
        return f"no step: {which} computed again, from the {source} of step {first - 1}"
    return "nothing: the step in work was begun again"


def doing(culprit: Mapping[str, Any]) -> str:
    """What a worker was doing when it failed, in words."""
    from deepopt.errors import ScheduleError
    from deepopt.schedule.ir import parse_action

    step = culprit.get("step")
    when = f"step {step}" if step else "before the first step"
    try:
        action = parse_action(str(culprit.get("action")))
    except ScheduleError:
        stages = culprit.get("stages") or ()
        several = "s" if len(stages) > 1 else ""
        held = f"; it holds stage{several} {ranges(stages)}" if stages else ""
        return f"{when}, between actions{held}"
    microbatch = "" if action.microbatch is None else f", micro-batch {action.microbatch}"
    return f"{when}, stage {action.stage}, op {action.op}{microbatch}"


def _short(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds < 100 else human_seconds(seconds)
