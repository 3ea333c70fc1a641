"""Reads a hostfile: one `host slots=N` a line, as DeepSpeed and MPI know it, and `port=P` for ssh.

Empty lines and what follows `#` are left out. Whether a host answers is not asked here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from deepopt.errors import InputError

_EXAMPLE = "write lines like `10.0.0.5 slots=8` or `gpu-1 slots=8 port=2222`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One host of a hostfile.

    Args:
        name: as ssh takes it: a name, an alias of the ssh configuration, an IP address, each
            with `user@` in front if need be.
        slots: workers it may hold.
        port: of its ssh server; None: what ssh takes by itself.
    """

    name: str
    slots: int
    port: int | None = None


def parse_hostfile(text: str, *, source: str) -> tuple[Host, ...]:
    """Read the text of a hostfile.

    Args:
        text: the content.
        source: its path, for messages.

    Raises:
        InputError: `source:line: what is wrong`.
    """
    hosts: dict[str, Host] = {}
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        host = _parse_line(words, where=f"{source}:{number}")
        if host.name in hosts:
            raise InputError(
                f"{source}:{number}: host {host.name} is there already, in line "
                f"{lines[host.name]}",
                remedy="give each host one line with all of its slots",
            )
        hosts[host.name] = host
        lines[host.name] = number
    if not hosts:
        raise InputError(f"{source}: no host in it", remedy=_EXAMPLE)
    return tuple(hosts.values())


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """Read a hostfile.

    Raises:
        InputError: it cannot be read, or `file:line: what is wrong`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"cannot read hostfile {path}: {error.strerror}", remedy=_EXAMPLE
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"hostfile {path} is not UTF-8 text: {error}") from error
    return parse_hostfile(text, source=str(path))


def _parse_line(words: list[str], *, where: str) -> Host:
    name, *settings = words
    if name.startswith("-") or "=" in name:
        raise InputError(f"{where}: {name!r} is not a host name", remedy=_EXAMPLE)
    values: dict[str, int] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in ("slots", "port"):
            raise InputError(
                f"{where}: {setting!r} is neither slots=N nor port=P", remedy=_EXAMPLE
            )
        if key in values:
            raise InputError(f"{where}: {key} is there twice", remedy=_EXAMPLE)
        if not (value.isascii() and value.isdigit() and int(value) > 0):
            raise InputError(
                f"{where}: {key}={value} is not a positive number", remedy=_EXAMPLE
            )
        values[key] = int(value)
    if "slots" not in values:
        raise InputError(f"{where}: host {name} has no slots", remedy=_EXAMPLE)
    port = values.get("port")
    if port is not None and port > 65535:
        raise InputError(f"{where}: port={port} is above 65535", remedy=_EXAMPLE)
    return Host(name=name, slots=values["slots"], port=port)
