"""`deepopt launch --hostfile` on two hosts: the losses of one process, and nothing left on either."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepopt.job_file import load_job
from support import launcher
from support.hosts import HostGroup
from support.worker_processes import losses_of, make_plan

pytestmark = [
    pytest.mark.multihost,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(540),  # two launches and their tidying, on a busy machine
]

LAUNCH_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 60.0
STEPS = 3
NOBODY = "10.77.0.99"


@pytest.fixture
def hosts(two_hosts: HostGroup) -> Iterator[HostGroup]:
    """The two hosts; fails when a test leaves a process or a file on one of them."""
    before = [files_of(two_hosts, index) for index in range(2)]
    yield two_hosts
    for index, host in enumerate(two_hosts.hosts):
        assert host.processes() == []
        assert files_of(two_hosts, index) == before[index]


@pytest.fixture
def folder(two_hosts: HostGroup, request: pytest.FixtureRequest) -> Path:
    """A folder of the test that both hosts see."""
    path = two_hosts.shared / str(request.node.name)
    path.mkdir()
    return path


def launch(
    group: HostGroup, job: Path, *options: str | Path, workers: int = 2
) -> subprocess.CompletedProcess[str]:
    """Run `deepopt launch` on the first host."""
    command: list[str | Path] = [launcher.DEEPOPT, "launch", job]
    command += ["--workers", str(workers), "--steps", str(STEPS), *options]
    return group.hosts[0].run(command, timeout_s=LAUNCH_TIMEOUT_S, directory=group.shared)


def write_hostfile(folder: Path, *lines: str) -> Path:
    path = folder / "hosts"
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def status_of(group: HostGroup, run_dir: Path) -> dict[str, Any]:
    done = group.hosts[0].run(
        [launcher.DEEPOPT, "status", run_dir, "--json"], timeout_s=COMMAND_TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def files_of(group: HostGroup, index: int) -> str:
    """What lies in the folders that a host has to itself."""
    done = group.hosts[index].run(["ls", "-A", "/tmp", "/dev/shm"], timeout_s=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_worker_that_hangs_on_the_other_host_is_replaced_there_and_the_losses_are_those_of_one_process(
    hosts: HostGroup, folder: Path
) -> None:
    # A stopped process reads no message: only a SIGKILL on its own host ends it.
    faults = {"heartbeat_timeout_s": 5, "inject": [{"stop": {"rank": 1, "step": 2, "op": "F"}}]}
    job = launcher.write_job(folder, faults=faults, checkpoint={"every": 1})
    hostfile = write_hostfile(folder, "node-a slots=1", "node-b slots=1")
    done = launch(hosts, job, "--hostfile", hostfile, "--run-dir", folder / "run")
    assert done.returncode == 0, done.stdout + done.stderr
    status = status_of(hosts, folder / "run")
    assert [worker["host"] for worker in status["workers"]] == ["node-a", "node-b"]
    assert status["generation"] == 2
    alone = load_job(launcher.write_job(folder))
    losses = losses_of(alone, make_plan(alone), run_dir=folder / "alone", last_step=STEPS)
    assert launcher.losses(folder / "run") == dict(enumerate(losses, start=1))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(f"{NOBODY} slots=1", "No route to host", id="no-host"),
        pytest.param("nobody@node-b slots=1", "Permission denied", id="no-entry"),
    ],
)
def test_a_host_that_ssh_does_not_reach_is_named_with_ssh_s_reason(
    hosts: HostGroup, folder: Path, line: str, reason: str
) -> None:
    hostfile = write_hostfile(folder, "node-a slots=1", line)
    job = launcher.write_job(folder)
    done = launch(hosts, job, "--hostfile", hostfile, "--run-dir", folder / "run")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.count("error: ") == 1, done.stderr
    assert line.split()[0] in done.stderr.splitlines()[0]
    assert reason in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stdout + done.stderr


def test_more_workers_than_slots_are_refused_with_both_numbers(
    hosts: HostGroup, folder: Path
) -> None:
    hostfile = write_hostfile(folder, "node-a slots=1", "node-b slots=1")
    job = launcher.write_job(folder)
    done = launch(hosts, job, "--hostfile", hostfile, "--run-dir", folder / "run", workers=3)
    assert done.returncode == 3, done.stdout + done.stderr
    assert "asked for 3 workers, found 2" in done.stderr.splitlines()[0]
    assert "node-a: 1, node-b: 1" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stdout + done.stderr
