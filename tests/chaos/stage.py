"""Performs an act: one job, row after row, then judges each by its report and by its losses."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from chaos.matrix import Act, Row, Seen
from chaos.play import NotSeen, Play, wrong_losses
from chaos.reference import losses_of
from chaos.report import Result, progress, sum_of


def perform(act: Act, *, rows: Sequence[Row], folder: Path) -> list[Result]:
    """Perform an act.

    Args:
        act: which.
        rows: those of its rows that are wanted.
        folder: new, for the run.
    """
    act = replace(act, rows=tuple(rows))
    faults = {"spares": act.spares, "inject": act.inject(), **act.sections.get("faults", {})}
    play = Play(folder, steps=act.steps, **{**act.sections, "faults": faults})
    results: list[Result] = []
    first_steps: list[int] = []
    progress(f"== {act.name}")
    try:
        play.launch()
        play.steady(steps=4 if act.inject() else 8, spares=act.spares)
        play.note_shared_memory()
        for row in act.rows:
            first_steps.append(play.status["step"])
            result = _play(act, row, play)
            results.append(result)
            progress(f"   {row.name}: {result.wrong or 'ok'} {dict(result.times_s)}")
            play.until("running", lambda s: s["state"] == "running")
    except (NotSeen, subprocess.TimeoutExpired) as error:
        done = {result.name for result in results}
        results += [
            Result(act=act.name, name=row.name, wrong=str(error))
            for row in act.rows
            if row.name not in done
        ]
    finally:
        play.close()
    _compare(play, results, first_steps)
    left = play.leftovers()
    freed = Result(act=act.name, name=f"{act.name}: what is left afterwards", note="nothing")
    freed.wrong = f"left: {'; '.join(left)}" if left else ""
    return [*results, freed]


def _play(act: Act, row: Row, play: Play) -> Result:
    result = Result(act=act.name, name=row.name, limit_s=row.limit_s)
    try:
        if row.act is None:
            seen = Seen(faults=play.next_faults())
        else:
            if row.script is None:
                play.steady(steps=4, spares=act.spares)
            seen = row.act(play)
    except NotSeen as error:
        result.wrong = str(error)
        return result
    result.causes = [fault["cause"] for fault in seen.faults]
    result.times_s = sum_of(seen.faults)
    result.note = seen.note
    result.lost = sum(fault["lost_steps"] for fault in seen.faults)
    for fault in seen.faults:
        first, last = fault["replayed_steps"] or (1, 0)
        result.repeated += last - first + 1
    result.wrong = seen.wrong or judge(row, seen, result)
    return result


def judge(row: Row, seen: Seen, result: Result) -> str:
    if row.causes and not seen.faults:
        return "no report"
    if len(row.causes) != len(seen.faults) or any(
        cause not in row.causes for cause in result.causes
    ):
        return f"reported as {', '.join(result.causes)}, not {', '.join(row.causes)}"
    culprits = [fault["culprit"] and fault["culprit"]["rank"] for fault in seen.faults]
    if row.rank is not None and culprits != [row.rank]:
        return f"rank {culprits} is blamed, not {row.rank}"
    if seen.faults[-1:] and seen.faults[-1]["outcome"] != "recovered":
        return f"outcome {seen.faults[-1]['outcome']}"
    total_s = result.times_s.get("total", 0.0)
    if total_s > row.limit_s:
        return f"{total_s:.2f} s, more than {row.limit_s:g} s"
    return ""


def _compare(play: Play, results: Sequence[Result], first_steps: Sequence[int]) -> None:
    """Say of each row whether all losses from its beginning to the next one's are right."""
    lines = play.losses()
    if not lines:
        return
    reference = losses_of(play.job, max(step for step, _ in lines))
    wrong = {step for step, _ in wrong_losses(lines, reference)}
    ends = [*first_steps[1:], max(reference) + 1]
    for result, first, end in zip(results, first_steps, ends, strict=False):
        differ = sorted(step for step in wrong if first <= step < end)
        result.losses = not differ
        if differ and not result.wrong:
            result.wrong = f"losses differ from step {differ[0]} on"
