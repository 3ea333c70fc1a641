"""The `deepopt` command as a user runs it: real processes, real signals, a run directory."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

DEEPOPT = str(Path(sys.executable).parent / "deepopt")
TIMEOUT_S = 240.0

TINY: dict[str, Any] = {
    "model": {
        "kwargs": {
            "d_model": 32,
            "num_heads": 2,
            "num_blocks": 6,
            "num_experts": 4,
            "top_k": 2,
            "expert_hidden": 32,
            "dropout": 0.1,
            "router_noise": 0.1,
        }
    },
    "data": {"sequence_length": 32, "files": [argparse.__file__]},
    "training": {"microbatches": 4, "microbatch_size": 2, "steps": 8},
    "optimizer": {"warmup_steps": 2},
    "checkpoint": {"every": 3},
    "logging": {"peak_flops": 1e9},
}


def write_job(folder: Path, **sections: Any) -> Path:
    """A job file for a run of seconds."""
    job = {name: {**section, **sections.pop(name, {})} for name, section in TINY.items()}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job | sections))
    return path


def run(*arguments: object, timeout_s: float = TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    """Run `deepopt ...` to its end."""
    return subprocess.run(
        [DEEPOPT, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start `deepopt ...` in a process group of its own, as a shell does."""
    return subprocess.Popen(
        [DEEPOPT, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,
    )


def losses(run_dir: Path) -> dict[int, float]:
    """Loss of each step; the last line of a step stands."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return {line["step"]: line["loss"] for line in map(json.loads, lines)}


def status(run_dir: Path) -> dict[str, Any]:
    """What `deepopt status --json` says."""
    result = run("status", run_dir, "--json")
    assert result.returncode == 0, result.stderr
    content: dict[str, Any] = json.loads(result.stdout)
    return content


def wait_for_file(run_dir: Path, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Poll `status.json` until it fulfils a condition."""
    until_s = time.monotonic() + TIMEOUT_S
    path = run_dir / "status.json"
    while time.monotonic() < until_s:
        if path.exists():
            content: dict[str, Any] = json.loads(path.read_text())
            if condition(content):
                return content
        time.sleep(0.05)
    raise AssertionError(f"{path} did not get there: {path.exists() and path.read_text()}")


def processes_of(run_dir: Path) -> list[str]:
    """Command lines of living processes that name a run directory or descend from its supervisor."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if str(run_dir) in command:
                found.append(f"{entry.name} {command}")
    return found
