"""A job on two hosts, one of which is switched off: hosts are namespaces of this machine."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from support.hosts import HostGroup, why_not

LOOK_EVERY_S = 0.01
STEPS_BEFORE = 60  # until deadlines follow them and the spare waits
COMMAND_TIMEOUT_S = 120.0


def why_no_hosts() -> str | None:
    """Why this machine cannot hold hosts; None when it can."""
    return why_not()


def host_fault(
    job_file: Path, folder: Path, *, settings: Sequence[str], timeout_s: float
) -> dict[str, Any]:
    """Run a job with a worker on each of two hosts until the second one is lost and made good for.

    Args:
        job_file: the job.
        folder: new, for the hosts.
        settings: `KEY=VALUE` of `--set`.
        timeout_s: longest wait for anything.

    Returns:
        `back_s`, from the switch to the next new step, and `times_s` of the report.

    Raises:
        RuntimeError: a command failed.
        TimeoutError: something did not come.
    """
    group = HostGroup(folder)
    with group:
        run_dir, hostfile = group.shared / "run", group.shared / "hosts"
        hostfile.write_text("node-a slots=1\nnode-b slots=1\n")
        job = group.shared / "job.yaml"
        job.write_text(job_file.read_text())
        deepopt = str(Path(sys.executable).parent / "deepopt")
        sets = [word for setting in settings for word in ("--set", setting)]
        command = [deepopt, "launch", str(job), "--workers", "2", "--detach"]
        command += ["--hostfile", str(hostfile), "--run-dir", str(run_dir), *sets]
        done = group.hosts[0].run(command, timeout_s=COMMAND_TIMEOUT_S, directory=group.shared)
        if done.returncode != 0:
            raise RuntimeError(
                f"{' '.join(command)} ended with {done.returncode}: {done.stderr}"
            )

        def wait_for(condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
            until_s = time.monotonic() + timeout_s
            path = run_dir / "status.json"
            while True:
                status: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
                if status and condition(status):
                    return status
                if status.get("state") == "failed":
                    raise RuntimeError(status["error"]["message"])
                if time.monotonic() > until_s:
                    raise TimeoutError(f"nothing after {timeout_s:.0f} s: {status}")
                time.sleep(LOOK_EVERY_S)

        wait_for(lambda s: s["step"] >= STEPS_BEFORE and s["warm_spares"] >= 1)
        group.hosts[1].power_off()
        began_s = time.monotonic()
        status = wait_for(
            lambda s: any(fault["outcome"] == "recovered" for fault in s["faults"])
        )
        back_s = time.monotonic() - began_s
        (fault,) = status["faults"]
        return {"back_s": back_s, "times_s": fault["times_s"]}
