"""What the threads of running processes use: CPU time, page faults, switches. Linux only: reads /proc."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_NS_PER_S = 1e9
BUSIEST = "busiest thread"

# A word of a command line -> the role that a table says; the first that fits stands.
_ROLES = {
    "ray::WorkerActor": "workers",
    "_peer_pipelining.py": "workers",
    "_peer_loop.py": "workers",
    "ray::HeadActor": "head",
    "ray::AgentActor": "host's agent",
    "raylet/raylet": "raylet",
    "gcs_server": "gcs",
    "deepopt.head.supervisor": "supervisor",
    "deepopt.cluster.fork_server": "fork server",
    "deepopt launch": "command line",
    "ray/_private/runtime_env": "Ray's own agents",
    "ray/dashboard/agent": "Ray's own agents",
    "sleep infinity": "Ray's own agents",
    "ray::": "Ray's idle workers",
}
# torchrun names its script, too: it is known by the program.
_PROGRAMS = {"torchrun": "torchrun"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """What one thread, or several, have used.

    Args:
        cpu_s: on a CPU, to the nanosecond.
        user_s: of it in the program, by the kernel's ticks of 10 ms: only of use in sums.
        system_s: the same, in the kernel.
        faults: page faults that needed no disk.
        yields: times that it gave the CPU up to wait.
        preemptions: times that the kernel took the CPU away.
    """

    cpu_s: float = 0.0
    user_s: float = 0.0
    system_s: float = 0.0
    faults: int = 0
    yields: int = 0
    preemptions: int = 0

    def __add__(self, other: Use) -> Use:
        return Use(
            cpu_s=self.cpu_s + other.cpu_s,
            user_s=self.user_s + other.user_s,
            system_s=self.system_s + other.system_s,
            faults=self.faults + other.faults,
            yields=self.yields + other.yields,
            preemptions=self.preemptions + other.preemptions,
        )

    def since(self, before: Use) -> Use:
        """What was used after a moment.

        Args:
            before: what had been used by then.
        """
        return Use(
            cpu_s=self.cpu_s - before.cpu_s,
            user_s=self.user_s - before.user_s,
            system_s=self.system_s - before.system_s,
            faults=self.faults - before.faults,
            yields=self.yields - before.yields,
            preemptions=self.preemptions - before.preemptions,
        )


@dataclass(frozen=True, slots=True)
class Thread:
    """One thread.

    Args:
        role: of its process.
        pid: of its process.
        tid: its own id.
        name: as the kernel knows it.
    """

    role: str
    pid: int
    tid: int
    name: str


def look(pids: Iterable[int]) -> dict[Thread, Use]:
    """What the living threads of processes have used so far.

    Args:
        pids: of the processes; one that has ended is left out.
    """
    found = {}
    for pid in pids:
        try:
            role = role_of(Path(f"/proc/{pid}/cmdline").read_bytes())
            folders = list(Path(f"/proc/{pid}/task").iterdir())
        except OSError:  # it has just ended
            continue
        for folder in folders:
            try:
                name, use = _read(folder)
            except OSError:  # the thread has just ended
                continue
            found[Thread(role, pid, int(folder.name), name)] = use
    return found


def role_of(command_line: bytes) -> str:
    """What a process is in its training.

    Args:
        command_line: of `/proc/PID/cmdline`.
    """
    words = command_line.decode(errors="replace").rstrip("\0").split("\0")
    programs = {Path(word).name for word in words[:2]}
    for program, role in _PROGRAMS.items():
        if program in programs:
            return role
    text = " ".join(words)
    return next((role for word, role in _ROLES.items() if word in text), Path(words[0]).name)


def by_role(
    before: Mapping[Thread, Use], after: Mapping[Thread, Use]
) -> dict[tuple[str, str], Use]:
    """What was used between two looks, by role and thread name, the most first.

    Of the workers the busiest thread of each process has a row of its own: it trains.

    Args:
        before: the first look; a thread that it lacks had used nothing.
        after: the second one; threads that have ended are left out.
    """
    used = {thread: use.since(before.get(thread, Use())) for thread, use in after.items()}
    busiest: dict[int, Thread] = {}
    for thread, use in used.items():
        if thread.pid not in busiest or use.cpu_s > used[busiest[thread.pid]].cpu_s:
            busiest[thread.pid] = thread
    sums: dict[tuple[str, str], Use] = defaultdict(Use)
    for thread, use in used.items():
        name = BUSIEST if busiest[thread.pid] is thread else thread.name
        sums[thread.role, name] += use
    return dict(sorted(sums.items(), key=lambda item: -item[1].cpu_s))


def _read(folder: Path) -> tuple[str, Use]:
    stat = (folder / "stat").read_text()
    name = stat[stat.index("(") + 1 : stat.rindex(")")]
    fields = stat[stat.rindex(")") + 2 :].split()  # the first of them is field 3
    switches = {
        line.partition(":")[0]: int(line.partition(":")[2])
        for line in (folder / "status").read_text().splitlines()
        if "ctxt_switches" in line
    }
    return name, Use(
        cpu_s=int((folder / "schedstat").read_text().split()[0]) / _NS_PER_S,
        user_s=int(fields[11]) / _TICKS_PER_S,
        system_s=int(fields[12]) / _TICKS_PER_S,
        faults=int(fields[7]),
        yields=switches["voluntary_ctxt_switches"],
        preemptions=switches["nonvoluntary_ctxt_switches"],
    )
