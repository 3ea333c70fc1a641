"""A job in words and tables: status, steps, plans, failures. From plain JSON data to text, no I/O."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepopt.errors import InputError
from deepopt_cli.expert_words import expert_lines
from deepopt_cli.fault_words import doing
from deepopt_cli.output import human_count, human_percent, human_seconds, ranges, table

_WORTH_NAMING = 0.05  # a prediction that is off by more names the causes


def step_line(record: Mapping[str, Any], *, last_step: int | None, eta_s: float | None) -> str:
    """A line of `metrics.jsonl` in words.

    Args:
        record: the line.
        last_step: where the job stops; None when unknown.
        eta_s: predicted seconds to there; None when unknown.
    """
    step = record.get("step", 0)
    width = len(str(last_step or step))
    total = f"/{last_step}" if last_step else ""
    parts = [f"step {step:>{width}}{total}", f"loss {_number(record.get('loss'), '.4f')}"]
    for key, name, form in (
        ("grad_norm", "grad norm", ".3f"),
        ("learning_rate", "lr", ".2e"),
    ):
        if record.get(key) is not None:
            parts.append(f"{name} {_number(record[key], form)}")
    if (rate := record.get("tokens_per_s")) is not None:
        parts.append(f"{human_count(rate)} tokens/s")
    if record.get("val_loss") is not None:
        parts.insert(2, f"val loss {_number(record['val_loss'], '.4f')}")
    if (share := record.get("mfu")) is not None:
        parts.append(f"MFU {100 * share:.1f} %")
    if (max_vio := record.get("max_vio")) is not None:
        parts.append(f"MaxVio {max_vio:.2f}")
    if (share := record.get("bubble")) is not None:
        parts.append(f"bubble {human_percent(share)}")
    if eta_s is not None:
        parts.append(f"ETA {human_seconds(eta_s)}")
    return "  ".join(parts)


def event_line(record: Mapping[str, Any]) -> str:
    """A line of `events.jsonl` in words, with its time of day (UTC)."""
    from deepopt.telemetry.events import headline

    day, _, clock = str(record.get("time", "")).partition("T")
    return f"{clock[:8] or day} {headline(record)}".strip()


def worker_table(status: Mapping[str, Any], *, age_s: float = 0.0) -> str:
    """The workers of a status as a table.

    Args:
        status: the content of `status.json`.
        age_s: seconds since it was written; added to the ages of heartbeats.
    """
    busy = status.get("stage_busy") or {}
    rows = [
        (
            worker["rank"],
            worker["host"],
            worker["pid"],
            ranges(worker["stages"]),
            worker.get("device") or None,
            worker.get("state"),
            worker.get("step"),
            worker.get("action") or None,
            human_percent(busy.get(str(worker["rank"]))),
            heartbeat_age(worker, age_s=age_s),
        )
        for worker in status.get("workers") or ()
    ]
    header = [
        "rank",
        "host",
        "pid",
        "stages",
        "device",
        "state",
        "step",
        "action",
        "busy",
        "heartbeat",
    ]
    return table(header, rows)


def heartbeat_age(worker: Mapping[str, Any], *, age_s: float) -> str:
    """How long ago a worker was heard.

    Args:
        worker: an entry of `workers`.
        age_s: seconds since the status was written.
    """
    heard_s = worker.get("heartbeat_age_s")
    return "-" if heard_s is None else human_seconds(heard_s + age_s)


def status_lines(
    status: Mapping[str, Any], *, supervisor_alive: bool | None, age_s: float | None
) -> list[str]:
    """A status in words.

    Args:
        status: the content of `status.json`.
        supervisor_alive: None when that cannot be seen from this host.
        age_s: seconds since it was written.
    """
    from deepopt.launch.run_view import ENDED

    state = status.get("state")
    gone = supervisor_alive is False and state not in ENDED
    if gone:
        state_words = f"recorded as {state}, but its supervisor is gone"
    else:
        state_words = str(state)
        if state not in ENDED and age_s is not None:
            state_words += f" (as of {human_seconds(age_s)} ago)"
    lines = [f"state       {state_words}"]
    if status.get("job_id"):
        lines.insert(0, f"job         {status.get('name')} ({status['job_id']})")
    progress = str(status.get("step", 0))
    if status.get("last_step"):
        progress += f"/{status['last_step']}"
    if status.get("loss") is not None:
        progress += f", loss {_number(status['loss'], '.4f')}"
    lines.append(f"step        {progress}")
    if status.get("tokens_per_s") is not None:
        lines.append(f"speed       {speed(status)}")
    if state not in ENDED and not gone:
        lines.append(f"time left   {human_seconds(status.get('eta_s'))}")
    if status.get("placement"):
        lines.append(
            f"plan        {status.get('placement')}, {status.get('schedule')}, "
            f"plan {status.get('plan_id')}, generation {status.get('generation')}, "
            f"{status.get('restarts', 0)} restarts"
        )
    workers, wanted = len(status.get("workers") or ()), status.get("workers_wanted") or 0
    if 0 < workers < wanted and state not in ENDED:
        lines.append(f"workers     {workers} of {wanted}: there is no device for the others")
    if status.get("bubble") is not None:
        lines.append(f"bubble      {human_percent(status['bubble'])}")
    checkpoint = status.get("checkpoint_step")
    lines.append(f"checkpoint  {f'step {checkpoint}' if checkpoint else 'none yet'}")
    return lines


def speed(status: Mapping[str, Any]) -> str:
    """Rates of a status: tokens/s, a worker, MFU."""
    words = f"{human_count(status['tokens_per_s'])} tokens/s"
    if (each := status.get("tokens_per_s_per_worker")) is not None:
        words += f" ({human_count(each)} a worker)"
    if (share := status.get("mfu")) is not None:
        words += f", MFU {100 * share:.1f} %"
    return words


def failure_details(
    error: Mapping[str, Any], *, logs: Path, exit_code: int | None = None
) -> str:
    """What stands between `error:` and `hint:`: the culprit, its traceback, then its victims.

    Of bad input the message says what is wrong and where: its traceback, of deepopt's own lines, is
    left to the log.

    Args:
        error: the `error` of a status.
        logs: folder of log files.
        exit_code: of the job; None: not known.
    """
    culprit = error.get("culprit")
    if not culprit:
        return ""
    rank = culprit.get("rank")
    lines = [
        f"culprit  rank {rank} on {culprit.get('host')}, pid {culprit.get('pid')}",
        f"doing    {doing(culprit)}",
    ]
    if culprit.get("message") and culprit["message"] not in str(error.get("message")):
        lines.append(f"said     {culprit['message']}")
    lines.append(f"log      {logs / f'rank-{rank}.log'}")
    if culprit.get("traceback") and exit_code != InputError.exit_code:
        lines += ["", culprit["traceback"].rstrip("\n")]
    victims = error.get("victims") or []
    if victims:
        who = ranges(victim["rank"] for victim in victims)
        ends = {str(victim.get("message", "")) for victim in victims}
        why = f": {ends.pop()}" if len(ends) == 1 else ""
        several = "s" if len(victims) > 1 else ""
        lines += ["", f"{len(victims)} victim{several} followed (rank{several} {who}){why}"]
    return "\n".join(lines)


def closing_lines(
    status: Mapping[str, Any], *, report: Mapping[str, Any], run_dir: Path
) -> list[str]:
    """The end of a job in words.

    Args:
        status: its last status.
        report: the content of `report.json`; empty when there is none.
        run_dir: as the user would type it.
    """
    step = status.get("step")
    lines = [f"{status.get('state')} at step {step} of {status.get('last_step')}"]
    if status.get("loss") is not None:
        lines[0] += f", loss {_number(status['loss'], '.4f')}"
    figures = (
        report if report.get("tokens_per_s") is not None else status
    )  # medians, or the last
    if figures.get("tokens_per_s") is not None:
        lines.append(f"  speed       {speed(figures)}")
    lines += [f"  {line}" for line in report_lines(report)]
    if faults := status.get("faults"):
        lines.append(f"  faults      {faults_line(faults)}")
    if status.get("checkpoint_step"):
        lines.append(f"  checkpoint  step {status['checkpoint_step']}")
    if status.get("state") == "finished":
        lines.append(f"  weights     {run_dir / 'final'}")
    else:
        lines.append(f"  go on       deepopt resume {run_dir}")
    return lines


def faults_line(faults: Sequence[Mapping[str, Any]]) -> str:
    """All faults of a job on one line.

    Args:
        faults: the `faults` of a status; at least one.
    """
    causes = Counter(str(fault.get("cause")) for fault in faults)
    words = ", ".join(f"{count} {cause}" for cause, count in causes.items())
    totals = [f["times_s"]["total"] for f in faults if "total" in (f.get("times_s") or {})]
    longest = f"; longest {max(totals):.2f} s from the last good sign" if totals else ""
    return f"{len(faults)} ({words}){longest}; each in deepopt status"


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """Simulated against measured, from the closing report.

    Args:
        report: the content of `report.json`; empty when there is none.
    """
    lines = []
    if (gain := report.get("gain_over_1f1b")) is not None:
        costs = "the job's costs" if report.get("emulated") else "the costs measured here"
        # 1F1B itself differs from the yardstick by its split alone, which costs from before the run chose.
        of = "1F1B on the split that is best in them" if _is_1f1b(report) else "1F1B"
        lines.append(
            f"schedule    {report.get('schedule')} on placement {report.get('placement')}: "
            f"{gain:.3f}x the speed of {of}, simulated in {costs}"
        )
    measured, simulated = report.get("measured_step_s"), report.get("simulated_step_s")
    if measured is not None:
        words = f"measured {_milliseconds(measured)}"
        predicted = report.get("predicted_step_s")
        if predicted and (off := report.get("prediction_error")) is not None:
            words += f", predicted {_predicted(report, predicted)} ({100 * off:+.1f} %)"
        elif simulated:
            error = 100 * (simulated / measured - 1)
            words += f", simulated {_milliseconds(simulated)} ({error:+.1f} %)"
        lines.append(f"step time   {words}")
    lines += _cause_lines(report)
    measured, simulated = report.get("measured_bubble"), report.get("simulated_bubble")
    if measured is not None:
        words = f"measured {human_percent(measured)}"
        if simulated is not None:
            words += f", simulated {human_percent(simulated)}"
        if report.get("shared_cores"):
            words += f" (the workers share {report['shared_cores']} cores)"
        lines.append(f"bubble      {words}")
    if experts := report.get("experts"):
        lines += expert_lines(experts)
    if emulated := report.get("emulated"):
        lines.append(
            f"emulated    {emulated['overran']:,} of {emulated['operations']:,} operations overran, "
            f"{_milliseconds(emulated['late_s'])} in all"
        )
    return lines


def _is_1f1b(report: Mapping[str, Any]) -> bool:
    return (report.get("schedule"), report.get("placement")) == ("1f1b", "line")


def _predicted(report: Mapping[str, Any], step_s: float) -> str:
    """The predicted step, and what it has on top while routers of experts warm up."""
    more_s, steps = report.get("predicted_warm_up_s"), report.get("warm_up_steps")
    if not more_s or not steps:
        return _milliseconds(step_s)
    return (
        f"{_milliseconds(step_s)} and up to {_milliseconds(more_s)} more in the {steps} steps in which "
        "routers warmed up"
    )


def _cause_lines(report: Mapping[str, Any]) -> list[str]:
    """Why the step took something else than predicted, where that is worth naming."""
    off = report.get("prediction_error")
    if off is None or abs(off) <= _WORTH_NAMING:
        return []
    large = [
        one
        for one in report.get("prediction_causes", ())
        if abs(one["share"]) >= _WORTH_NAMING / 5
    ]
    words = "; ".join(f"{one['what']} {100 * one['share']:+.1f} %" for one in large[:4])
    return [f"of that     {words}"] if words else []


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.3f} s"


def _number(value: object, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else "not finite"
