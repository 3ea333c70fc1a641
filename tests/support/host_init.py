"""First process of a host made by `support.hosts`: makes the host its own, runs sshd, reaps orphans.

Runs as `python -I -S host_init.py` in new network, mount, pid, uts and ipc namespaces. It says
`unshared`, reads its orders (one line of JSON: the fields of `Orders`) once its network card is
there, says `ready`, and lives until its stdin ends. The kernel then kills all that runs on the
host. Standard library only: nothing else can be imported here.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# From linux/mount.h.
_MS_BIND = 0x1000
_MS_REC = 0x4000

PRIVATE_FOLDERS = ("/run", "/dev/shm", "/tmp")
_HOME = Path("/run/home")
_SSHD_START_TIMEOUT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Orders:
    """What a host is to become.

    Args:
        name: its host name.
        address: its IPv4 address with the prefix length; the card `eth0` gets it.
        gateway: where packets to other networks go.
        ssh_port: that its sshd listens on.
        sshd: path of the server.
        keys: folder with what the host's `~/.ssh` holds, and the server's key `host_key`.
        hosts: content of `/etc/hosts`.
        visible: folders of the machine that stay visible though something private covers them.
    """

    name: str
    address: str
    gateway: str
    ssh_port: int
    sshd: str
    keys: str
    hosts: str
    visible: list[str]


def main() -> None:
    """Become the host."""
    print("unshared", flush=True)  # noqa: T201
    orders = Orders(**json.loads(_read_line()))
    socket.sethostname(orders.name)
    _set_up_network(orders)
    _make_folders_private(orders.visible)
    _write_own_files(orders)
    _start_sshd(orders)
    print("ready", flush=True)  # noqa: T201
    _reap_until_stdin_ends()


def _read_line() -> bytes:
    """One line of stdin and not a byte more: what follows is waited for with poll."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            raise EOFError("stdin ended before the orders came")
        line += byte
    return line


def _set_up_network(orders: Orders) -> None:
    commands = (
        "link set lo up\n"
        f"address add {orders.address} dev eth0\n"
        "link set eth0 up\n"
        f"route add default via {orders.gateway}\n"
    )
    subprocess.run(["ip", "-batch", "-"], input=commands, text=True, check=True)


def _make_folders_private(visible: list[str]) -> None:
    # Held open, a folder can be bound again after something was mounted over the path to it.
    held = {path: os.open(path, os.O_PATH | os.O_DIRECTORY) for path in visible}
    for path in PRIVATE_FOLDERS:
        _mount("tmpfs", path, kind="tmpfs", data="mode=1777,size=2g")
    _mount("proc", "/proc", kind="proc")
    for path, folder in held.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        _mount(f"/proc/self/fd/{folder}", path, flags=_MS_BIND | _MS_REC)
        os.close(folder)


def _write_own_files(orders: Orders) -> None:
    """Give root a home of its own, and replace what in /etc tells one host from another.

    ssh looks for its configuration in the home that /etc/passwd names, whatever HOME says.
    """
    own = Path("/run/own")
    own.mkdir()
    accounts = Path("/etc/passwd").read_text().splitlines()
    (own / "passwd").write_text(
        "".join(
            f"root:x:0:0:root:{_HOME}:/bin/bash\n" if line.startswith("root:") else f"{line}\n"
            for line in accounts
        )
    )
    # `*`: no password, yet not locked; sshd lets nobody into a locked account.
    (own / "shadow").write_text("root:*:19000:0:99999:7:::\nsshd:*:19000:0:99999:7:::\n")
    (own / "hosts").write_text(orders.hosts)
    (own / "hostname").write_text(f"{orders.name}\n")
    (own / "resolv.conf").write_text("")  # no name server: unknown names fail at once
    for file in own.iterdir():
        target = Path("/etc") / file.name
        if target.exists():  # else it points into a folder that is private now
            _mount(str(file), str(target), flags=_MS_BIND)
    _HOME.mkdir(mode=0o700)
    shutil.copytree(orders.keys, _HOME / ".ssh", ignore=shutil.ignore_patterns("host_key*"))
    (_HOME / ".ssh").chmod(0o700)
    shutil.copy(Path(orders.keys) / "host_key", own / "host_key")


def _start_sshd(orders: Orders) -> None:
    Path("/run/sshd").mkdir(mode=0o755)
    address = orders.address.partition("/")[0]
    options = {
        "Port": orders.ssh_port,
        "ListenAddress": address,
        "HostKey": "/run/own/host_key",
        "PidFile": "none",
        "PermitRootLogin": "prohibit-password",
        "PasswordAuthentication": "no",
        "UsePAM": "no",
        "MaxStartups": 100,
        "MaxSessions": 100,
    }
    command = [orders.sshd, "-D", "-e", "-f", "/dev/null"]
    for key, value in options.items():
        command += ["-o", f"{key}={value}"]
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    until_s = time.monotonic() + _SSHD_START_TIMEOUT_S
    while True:
        with suppress(ConnectionRefusedError):
            socket.create_connection((address, orders.ssh_port), timeout=1.0).close()
            return
        if server.poll() is not None or time.monotonic() > until_s:
            raise RuntimeError(f"sshd does not listen on {address}:{orders.ssh_port}")
        time.sleep(0.02)


def _reap_until_stdin_ends() -> None:
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        readable, _, _ = select.select([0, woken.fileno()], [], [])
        if 0 in readable and not os.read(0, 4096):
            return
        if woken.fileno() in readable:
            woken.recv(4096)


def _mount(source: str, target: str, *, kind: str = "", flags: int = 0, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, data.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount {source} on {target}: {os.strerror(code)}")


if __name__ == "__main__":
    main()
