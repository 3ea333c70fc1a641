"""What tests on several hosts lean on: that the hosts behave as hosts do, and vanish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from support.hosts import Host, HostGroup, HostsError, processes_in, wait_until_empty

pytestmark = [pytest.mark.multihost, pytest.mark.usefixtures("machine_for_hosts")]

COMMAND_TIMEOUT_S = 60.0
GONE_TIMEOUT_S = 60.0
# A peer that answers does so in 1 ms; a lost packet is sent again after 1 s.
SILENCE_S = 1.5

ANSWER = """
import socket, sys
server = socket.create_server((sys.argv[1], 5000))
print("listening", flush=True)
peer, _ = server.accept()
while True:
    peer.sendall(peer.recv(1))
"""
ASK = """
import socket, sys
peer = socket.create_connection((sys.argv[1], 5000), timeout=float(sys.argv[2]))
def ask():
    try:
        peer.sendall(b"?")
        return "answer" if peer.recv(1) else "end"
    except TimeoutError:
        return "silence"
print(ask(), flush=True)
sys.stdin.readline()
print(ask(), flush=True)
"""
KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 2222), timeout=float(sys.argv[2]))
except TimeoutError:
    print("silence")
else:
    print("connected")
"""


UNFINISHED = """
import signal, sys, time
from pathlib import Path
from support.hosts import HostGroup
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where the test run ignores it
group = HostGroup(Path(sys.argv[1]))
with group:
    print(*group.namespaces(), flush=True)
    time.sleep(100)
"""


def output_of(host: Host, *command: str | Path) -> str:
    done = host.run(command, timeout_s=COMMAND_TIMEOUT_S)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def knock(host: Host, at: Host) -> str:
    return output_of(host, sys.executable, "-c", KNOCK, at.address, str(SILENCE_S))


@contextmanager
def started(
    host: Host, program: str, *arguments: str, says: str
) -> Iterator[subprocess.Popen[str]]:
    with host.start([sys.executable, "-c", program, *arguments]) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline().strip() == says
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def assert_nothing_runs(host: Host) -> None:
    until_s = time.monotonic() + GONE_TIMEOUT_S
    while (left := host.processes()) and time.monotonic() < until_s:
        time.sleep(0.02)
    assert left == []


def all_links() -> str:
    command = ["ip", "-brief", "link"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_hosts_reach_each_other_by_address_and_by_ssh(two_hosts: HostGroup) -> None:
    a, b = two_hosts.hosts
    assert knock(a, b) == "connected"
    assert output_of(a, "ssh", b.address, "hostname") == "node-b"
    assert output_of(b, "ssh", a.name, "hostname; pwd") == "node-a\n/run/home"
    assert output_of(b, "hostname", "--ip-address") == b.address


def test_hosts_share_the_machine_s_files_but_not_tmp_processes_and_names(
    two_hosts: HostGroup,
) -> None:
    a, b = two_hosts.hosts
    for folder in ("/tmp", "/dev/shm", "/run", "/run/home"):
        output_of(a, "touch", f"{folder}/only-mine")
        assert b.run(
            ["test", "-e", f"{folder}/only-mine"], timeout_s=COMMAND_TIMEOUT_S
        ).returncode
        assert not Path(f"{folder}/only-mine").exists()
        output_of(a, "rm", f"{folder}/only-mine")
    output_of(a, "cp", "/etc/hostname", two_hosts.shared / "ours")
    assert output_of(b, "cat", two_hosts.shared / "ours") == "node-a"
    assert output_of(a, "id", "-u") == "0"
    assert (
        output_of(b, sys.executable, "-c", "import pytest, sys; print(sys.prefix)")
        == sys.prefix
    )
    assert "test_hosts_fixture" not in output_of(a, "sh", "-c", "cat /proc/[0-9]*/cmdline")


def test_only_the_user_s_ssh_configuration_knows_the_way(two_hosts: HostGroup) -> None:
    a, b = two_hosts.hosts
    done = a.run(
        ["ssh", "-F", "none", "-o", "BatchMode=yes", b.address, "true"],
        timeout_s=COMMAND_TIMEOUT_S,
    )
    assert done.returncode == 255
    assert "Connection refused" in done.stderr


def test_a_cut_link_loses_packets_until_it_is_healed(two_hosts: HostGroup) -> None:
    a, b = two_hosts.hosts
    b.cut_link()
    try:
        assert knock(a, b) == "silence"
        done = a.run(
            ["ssh", "-o", "ConnectTimeout=1", b.name, "true"], timeout_s=COMMAND_TIMEOUT_S
        )
        assert done.returncode == 255
        assert "timed out" in done.stderr
    finally:
        b.heal_link()
    assert knock(a, b) == "connected"


def test_a_command_past_its_time_is_ended_with_what_it_started(two_hosts: HostGroup) -> None:
    host = two_hosts.hosts[0]
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sh", "-c", "sleep 100 & sleep 100"], timeout_s=0.3)
    assert_nothing_runs(host)


def test_orphans_are_reaped(two_hosts: HostGroup) -> None:
    host = two_hosts.hosts[0]
    output_of(host, "sh", "-c", "setsid sh -c 'sleep 0.1 & exit' >/dev/null 2>&1 &")
    assert_nothing_runs(host)


def test_a_host_without_power_is_silent_and_comes_back_empty(tmp_path: Path) -> None:
    with HostGroup(tmp_path / "group") as (a, b):
        output_of(b, "touch", "/tmp/only-mine")
        with (
            started(b, ANSWER, b.address, says="listening"),
            started(a, ASK, b.address, str(SILENCE_S), says="answer") as client,
        ):
            b.power_off()
            output, _ = client.communicate("\n", timeout=COMMAND_TIMEOUT_S)
            assert output == "silence\n"
        b.power_off()
        b.power_on()
        assert output_of(a, "ssh", b.name, "ls -d /tmp/only-mine || true") == ""


def test_groups_side_by_side_do_not_meet(two_hosts: HostGroup, tmp_path: Path) -> None:
    with HostGroup(tmp_path / "group", names=("node-b",)) as (other,):
        assert other.address == two_hosts.hosts[0].address
        assert output_of(two_hosts.hosts[0], "ssh", "node-b", "hostname -I").split() == [
            two_hosts.hosts[1].address
        ]
    assert knock(*two_hosts.hosts) == "connected"


def test_a_stopped_group_leaves_nothing(tmp_path: Path) -> None:
    links = all_links()
    group = HostGroup(tmp_path / "group")
    group.start()
    namespaces = group.namespaces()
    assert len(namespaces) == 11  # five a host and the switch's network
    output_of(group.hosts[0], "sh", "-c", "setsid sleep 100 >/dev/null 2>&1 &")
    assert all_links() == links
    group.stop()
    assert processes_in(namespaces) == []
    assert all_links() == links
    group.stop()


def test_a_group_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text()
    group = HostGroup(tmp_path / "group", names=("good", "n" * 65))
    with pytest.raises(HostsError, match="sethostname"):
        group.start()
    assert children.read_text() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_unfinished_test_run_leaves_nothing(number: signal.Signals, tmp_path: Path) -> None:
    run = subprocess.Popen(
        [sys.executable, "-c", UNFINISHED, tmp_path / "group"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    with run:
        try:
            assert run.stdout is not None
            namespaces = set(run.stdout.readline().split())
            assert len(namespaces) == 11
            assert processes_in(namespaces)
        finally:
            os.killpg(run.pid, number)
    assert wait_until_empty(namespaces, timeout_s=GONE_TIMEOUT_S) == []
