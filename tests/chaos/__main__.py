"""The whole fault matrix with real jobs and real signals, as a table with figures: `make chaos`.

    make chaos                          # everything, then 50 faults at random
    make chaos CHAOS="--only hang"      # acts or rows with a word in their name
    make chaos CHAOS="--faults 0"       # without the random ones

Each act is one job, which goes through its rows one after the other. A row passes when the right fault is
named, the job is back within the limit, and every loss has the bits of a run that nothing happened to.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from chaos import soak
from chaos.checks import CHECKS, run_check
from chaos.host_rows import HOST_ROWS, play_host_row, why_no_hosts
from chaos.matrix import ACTS, NOT_RUN
from chaos.report import Result, describe, end_cleanly_on_signals, say, table
from chaos.single_rows import SINGLE_ROWS, play_single
from chaos.stage import perform


def main() -> int:
    """Run what is asked for; 1 when a row does not pass."""
    options = _parse()
    end_cleanly_on_signals()
    say("\n".join(describe()))
    results: list[Result] = []
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="deepopt-chaos-") as name:
        folder = Path(name)
        for act in ACTS:
            rows = tuple(row for row in act.rows if options.only in f"{act.name} {row.name}")
            if rows:
                results += perform(act, rows=rows, folder=folder / act.name.replace(" ", "-"))
        for single in SINGLE_ROWS:
            if options.only in single.name:
                results.append(play_single(single, folder=folder))
        hosts = [row for row in HOST_ROWS if options.only in row.name]
        missing = why_no_hosts() if hosts else None
        for row in hosts:
            results.append(
                play_host_row(row, folder=folder)
                if missing is None
                else Result(act="hosts", name=row.name, not_run=missing)
            )
        for check in CHECKS:
            if options.only in check.name:
                results.append(run_check(check))
        results += [r for r in NOT_RUN if options.only in r.name]
        say("\n" + table(results))
        failed = [result for result in results if result.is_failed]
        for result in failed:
            say(f"FAILED {result.act}: {result.name}: {result.wrong}")
        if options.faults and not options.only:
            outcome = soak.soak(folder / "soak", faults=options.faults, seed=options.seed)
            say("\n" + outcome.text())
            failed += [outcome] if outcome.wrong else []  # type: ignore[list-item]
    ran = [result for result in results if not result.not_run]
    say(
        f"\n{len(ran) - len([r for r in ran if r.is_failed])} of {len(ran)} rows passed, "
        f"{len(results) - len(ran)} not run; {time.monotonic() - began_s:.0f} s"
    )
    if options.json:
        options.json.write_text(json.dumps([result.to_json() for result in results], indent=1))
    return int(bool(failed))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make chaos", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="acts or rows with this in their name [all]")
    parser.add_argument("--faults", type=int, default=50, help="random faults afterwards [50]")
    parser.add_argument("--seed", type=int, default=1, help="of the random faults [1]")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
