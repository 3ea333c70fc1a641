"""Several hosts on this machine, for tests: own network, processes, /tmp, /dev/shm, sshd each.

    with HostGroup(folder) as (a, b):
        a.run(["ssh", b.name, "hostname"], timeout_s=10)

A host is a process in new network, mount, pid, uts and ipc namespaces (`support.host_init`). The
hosts hang on a switch, a bridge in a network namespace of its own that nothing leads out of. So
nothing here has a name in the machine's own namespaces: groups cannot meet each other or the
machine's networks, and no rule can be left behind. All of it lives as long as the calling process
holds the stdin of these processes: even `kill -9` of a test run leaves nothing.

Needs root, openssh-server and iproute2 (`why_not` says what is missing). Root of every host has a
home of its own with `~/.ssh/config`; the sshd's port is known from there alone. All else, also the
virtual environment, is what the machine has.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from support import host_init
from support.host_init import PRIVATE_FOLDERS, Orders

_SWITCH_ADDRESS = "10.77.0.254"
_PREFIX_LENGTH = 24
_SSH_PORT = 2222  # not 22: whoever forgets the user's ssh configuration does not get in
_NAMESPACES = ("net", "mnt", "pid", "uts", "ipc")
_START_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 60.0
_COMMAND_TIMEOUT_S = 60.0
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class HostsError(Exception):
    """A host or a link of it did not do as told; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostProcess:
    """A process on a host.

    Args:
        pid: as the machine counts, not the host.
        command: its command line; of a zombie, its name in brackets.
    """

    pid: int
    command: str


def why_not() -> str | None:
    """Why this machine cannot hold such hosts; None when it can."""
    if not sys.platform.startswith("linux"):
        return "hosts are made of Linux namespaces"
    if os.geteuid() != 0:
        return "making hosts takes root"
    for program, package in (
        ("sshd", "openssh-server"),
        ("ssh", "openssh-client"),
        ("ssh-keygen", "openssh-client"),
        ("ip", "iproute2"),
        ("unshare", "util-linux"),
        ("nsenter", "util-linux"),
    ):
        if _find(program) is None:
            return f"{program} is missing (package {package})"
    trial = "mount -t tmpfs tmpfs /dev/shm && ip link add type bridge && ip link add type veth"
    tried = subprocess.run(
        [*_unshare(), "--mount-proc", "sh", "-ec", trial],
        capture_output=True,
        text=True,
        timeout=_COMMAND_TIMEOUT_S,
        env={"PATH": _SYSTEM_PATH},
    )
    if tried.returncode != 0:
        return f"namespaces cannot be made here: {tried.stderr.strip()}"
    return None


class Host:
    """One host; made by `HostGroup`.

    Args:
        name: host name, also the name that ssh reaches it by.
        number: in the group, from 1; gives its address and its port of the switch.
        group: that it belongs to.
    """

    def __init__(self, name: str, *, number: int, group: HostGroup) -> None:
        self.name = name
        self.address = f"10.77.0.{number}"
        self._port = f"port{number}"
        # Always the same card, or the others would talk to the old one for half a minute.
        self._card = f"02:00:0a:4d:00:{number:02x}"
        self._group = group
        self._init: subprocess.Popen[bytes] | None = None

    def start(
        self,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        directory: str | Path = "/",
    ) -> subprocess.Popen[str]:
        """Start a command on the host as its root, in a fresh environment, with pipes.

        It leads a process group of its own, which `os.killpg` of its pid reaches; a signal to the
        pid alone ends there, at nsenter.

        Args:
            command: program and arguments.
            environment: variables besides PATH, HOME, LANG.
            directory: where it runs, as the host sees it.
        """
        variables = {"PATH": _SYSTEM_PATH, "HOME": "/run/home", "LANG": "C.UTF-8"}
        variables |= environment or {}
        settings = [f"{key}={value}" for key, value in variables.items()]
        return subprocess.Popen(
            [
                *self._enter(),
                *("env", "-i", f"--chdir={directory}", *settings),
                *map(str, command),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(
        self,
        command: Sequence[str | Path],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        directory: str | Path = "/",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as `start` does, with an empty stdin, to its end.

        Args:
            command: program and arguments.
            timeout_s: after it the command's process group is killed.
            environment: variables besides PATH, HOME, LANG.
            directory: where it runs, as the host sees it.

        Returns:
            Exit status and output.

        Raises:
            subprocess.TimeoutExpired: it took too long.
        """
        with self.start(command, environment=environment, directory=directory) as process:
            try:
                output, errors = process.communicate("", timeout=timeout_s)
            except BaseException:  # also Ctrl-C
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def processes(self) -> list[HostProcess]:
        """What runs on the host, without its first process and its sshd."""
        return [
            process
            for process in processes_in({self.namespaces()["pid"]})
            if host_init.__file__ not in process.command
            and not process.command.startswith(("sshd:", "[sshd]"))
        ]

    def namespaces(self) -> dict[str, str]:
        """What tells the host's namespaces from all others: kind to `kind:[inode]`."""
        init = self._running()
        kinds = {kind: kind for kind in _NAMESPACES} | {"pid": "pid_for_children"}
        return {
            kind: str(Path(f"/proc/{init.pid}/ns/{link}").readlink())
            for kind, link in kinds.items()
        }

    def cut_link(self) -> None:
        """Pull the plug of the host's network card: packets are lost, nobody is told."""
        self._group._ip(f"link set {self._port} down")

    def heal_link(self) -> None:
        """Put the plug back."""
        self._group._ip(f"link set {self._port} up")

    def power_off(self) -> None:
        """End all that runs on the host at once; the others hear nothing of it, not even a FIN.

        The host's /tmp is lost. Nothing happens to a host that is off.
        """
        if self._init is None:
            return
        # First the cable, or the host would still say goodbye. Without a port its start failed.
        with suppress(HostsError):
            self._group._ip(f"link delete {self._port}")
        _end(self._init)
        self._init = None

    def power_on(self) -> None:
        """Start the host again, with the same name and address.

        Raises:
            HostsError: it does not come up.
        """
        assert self._init is None, f"{self.name} is on"
        with self._group.log_of(self).open("ab") as log:
            self._init = subprocess.Popen(
                [*_unshare(), sys.executable, "-I", "-S", host_init.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                start_new_session=True,  # Ctrl-C at a terminal is for the test run alone
                env={"PATH": _SYSTEM_PATH, "LANG": "C.UTF-8"},
                cwd="/",
            )
        self._expect("unshared")
        self._group._ip(
            f"link add {self._port} type veth peer name eth0 address {self._card}"
            f" netns {self._init.pid}",
            f"link set {self._port} master switch up",
        )
        assert self._init.stdin is not None
        self._init.stdin.write(json.dumps(asdict(self._group._orders(self))).encode() + b"\n")
        self._expect("ready")

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._init is not None, f"{self.name} is off"
        return self._init

    def _enter(self) -> list[str]:
        folder = f"/proc/{self._running().pid}/ns"
        options = [f"--{kind}={folder}/{kind}" for kind in ("net", "uts", "ipc")]
        # The program unshare itself stays in the machine's pid namespace.
        return [
            "nsenter",
            *options,
            f"--mount={folder}/mnt",
            f"--pid={folder}/pid_for_children",
            "--",
        ]

    def _expect(self, word: str) -> None:
        init = self._running()
        assert init.stdout is not None
        readable, _, _ = select.select([init.stdout], [], [], _START_TIMEOUT_S)
        answer = init.stdout.readline().decode().strip() if readable else "nothing"
        if answer != word:
            log = self._group.log_of(self).read_text()
            raise HostsError(f"host {self.name} did not say {word!r} but {answer!r}: {log}")


class HostGroup:
    """Hosts on one switch, from `start` to `stop`; a context manager.

    Args:
        folder: new or empty folder for keys and logs; its subfolder `shared` is for tests. All
            hosts see it at the same path.
        names: of the hosts.
    """

    def __init__(self, folder: Path, *, names: Sequence[str] = ("node-a", "node-b")) -> None:
        self.folder = folder
        self.shared = folder / "shared"
        self.hosts = tuple(
            Host(name, number=number, group=self) for number, name in enumerate(names, start=1)
        )
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> tuple[Host, ...]:
        self.start()
        return self.hosts

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Bring up the switch and the hosts; all or nothing.

        Raises:
            HostsError: a host does not come up.
        """
        try:
            self.shared.mkdir(parents=True)
            self._make_keys()
            self._switch = subprocess.Popen(
                ["unshare", "--net", "sh", "-c", "echo unshared && exec cat >/dev/null"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                env={"PATH": _SYSTEM_PATH},
                cwd="/",
            )
            assert self._switch.stdout is not None
            self._switch.stdout.readline()
            self._ip(
                "link set lo up",
                "link add switch type bridge",
                f"address add {_SWITCH_ADDRESS}/{_PREFIX_LENGTH} dev switch",
                "link set switch up",
            )
            for host in self.hosts:
                host.power_on()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything that runs on the hosts, and the hosts; may be called again."""
        for host in self.hosts:
            host.power_off()
        if self._switch is not None:
            _end(self._switch)
            self._switch = None

    def log_of(self, host: Host) -> Path:
        """What the host's first process and its sshd say."""
        return self.folder / f"{host.name}.log"

    def namespaces(self) -> set[str]:
        """All namespaces of the group, as `kind:[inode]`."""
        assert self._switch is not None, "the group is not started"
        of_switch = str(Path(f"/proc/{self._switch.pid}/ns/net").readlink())
        return {of_switch}.union(*(host.namespaces().values() for host in self.hosts))

    def _ip(self, *commands: str) -> None:
        assert self._switch is not None, "the group is not started"
        done = subprocess.run(
            ["nsenter", f"--net=/proc/{self._switch.pid}/ns/net", "ip", "-batch", "-"],
            input="".join(f"{command}\n" for command in commands),
            text=True,
            capture_output=True,
            timeout=_COMMAND_TIMEOUT_S,
            env={"PATH": _SYSTEM_PATH},
        )
        if done.returncode != 0:
            raise HostsError(f"ip {'; '.join(commands)}: {done.stderr.strip()}")

    def _make_keys(self) -> None:
        """Write what the `~/.ssh` of every host holds; one key for users, one for servers."""
        keys = self.folder / "keys"
        keys.mkdir(mode=0o700)
        for name in ("id_cluster", "host_key"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", keys / name],
                check=True,
                timeout=_COMMAND_TIMEOUT_S,
            )
        (keys / "authorized_keys").write_text((keys / "id_cluster.pub").read_text())
        server_key = (keys / "host_key.pub").read_text()
        known = [f"[{host.address}]:{_SSH_PORT} {server_key}" for host in self.hosts]
        (keys / "known_hosts").write_text("".join(known))
        aliases = "".join(
            f"Host {host.name}\n  HostName {host.address}\n" for host in self.hosts
        )
        (keys / "config").write_text(
            f"{aliases}Host *\n"
            f"  Port {_SSH_PORT}\n"
            "  IdentityFile ~/.ssh/id_cluster\n"
            "  IdentitiesOnly yes\n"
            "  StrictHostKeyChecking yes\n"
        )
        for file in keys.iterdir():
            file.chmod(0o600)

    def _orders(self, host: Host) -> Orders:
        sshd = _find("sshd")
        assert sshd is not None, "why_not() was not asked"
        lines = ["127.0.0.1 localhost", *(f"{each.address} {each.name}" for each in self.hosts)]
        needed = {
            self.folder,
            Path(__file__).parents[2],
            Path(sys.prefix),
            Path(sys.base_prefix),
        }
        covered = [
            str(path.absolute())
            for path in needed
            if any(path.absolute().is_relative_to(folder) for folder in PRIVATE_FOLDERS)
        ]
        return Orders(
            name=host.name,
            address=f"{host.address}/{_PREFIX_LENGTH}",
            gateway=_SWITCH_ADDRESS,
            ssh_port=_SSH_PORT,
            sshd=sshd,
            keys=str(self.folder / "keys"),
            hosts="".join(f"{line}\n" for line in lines),
            visible=sorted(covered),  # a folder before what is in it
        )


def processes_in(namespaces: set[str]) -> list[HostProcess]:
    """All processes of the machine that are in one of some namespaces.

    Args:
        namespaces: as `Host.namespaces` gives them, `kind:[inode]`.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        # Root may not look at a process of another sandbox; it is none of ours.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            links = {str((folder / "ns" / kind).readlink()) for kind in _NAMESPACES}
            if links & namespaces:
                words = (folder / "cmdline").read_bytes().decode(errors="replace")
                name = (folder / "comm").read_text().strip()
                command = words.replace("\0", " ").strip() or f"[{name}]"
                found.append(HostProcess(pid=int(folder.name), command=command))
    return found


def wait_until_empty(namespaces: set[str], *, timeout_s: float) -> list[HostProcess]:
    """Wait until no process is in any of some namespaces; they are gone then.

    Returns:
        The processes that are still there after the timeout.
    """
    until_s = time.monotonic() + timeout_s
    while (left := processes_in(namespaces)) and time.monotonic() < until_s:
        time.sleep(0.02)
    return left


def _unshare() -> list[str]:
    return [
        *("unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork"),
        "--kill-child=SIGKILL",
    ]


def _find(program: str) -> str | None:
    return shutil.which(program, path=_SYSTEM_PATH)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that lives as long as its stdin; returns when all it held is gone."""
    with process:  # closes the pipes, then waits
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
