"""What `recovery.py` compares and what it says of it: cases, times of faults, ratios. Starts nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from _report import ratio_line, table

AIM = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A contender and what is done to it.

    Args:
        kind: `death` (SIGKILL), `hang` (SIGSTOP) or `host`.
        source: where a new worker's state comes from, and who takes the place.
        settings: of deepopt's job; empty for a peer.
        peer: name of a peer; empty for deepopt.
        aim_s: what 95 of 100 faults shall stay below; None: nothing is wanted.
    """

    kind: str
    source: str
    settings: tuple[str, ...] = ()
    peer: str = ""
    aim_s: float | None = None

    @property
    def name(self) -> str:
        """For people and `--only`."""
        return f"{self.kind}: {self.peer or 'deepopt'}, {self.source}"

    @property
    def spares(self) -> int:
        """Processes that wait."""
        return int("faults.spares=1" in self.settings)


MIRROR, V, LINE = (f"pipeline.placement={kind}" for kind in ("mirror", "v", "line"))
SPARE, NO_COPIES = "faults.spares=1", "faults.replicas=none"
OURS = Case(kind="death", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=2.0)
PIPELINING, FSDP, RAY_TRAIN = "torchrun pipelining", "torchrun FSDP2 + DCP", "Ray Train"
PEERS_OF_THE_AIM = (FSDP, RAY_TRAIN)
CASES = (
    OURS,
    Case(kind="death", source="mirror, new process", settings=(MIRROR,)),
    Case(kind="death", source="peer's memory, spare", settings=(V, SPARE), aim_s=2.0),
    Case(kind="death", source="disk, new process", settings=(LINE, NO_COPIES)),
    Case(kind="hang", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=3.5),
    Case(kind="hang", source="peer's memory, spare", settings=(V, SPARE), aim_s=3.5),
    Case(kind="host", source="mirror, spare", settings=(MIRROR, SPARE), aim_s=5.0),
    Case(kind="death", source="disk", peer=PIPELINING),
    Case(kind="death", source="disk", peer=FSDP),
    Case(kind="death", source="disk", peer=RAY_TRAIN),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What one fault cost.

    Args:
        back_s: from the fault to the next step that was not done before.
        repeated: steps that were done twice.
        phases_s: seconds by part, as deepopt's head saw them; empty for a peer.
        step_s: median of the ten steps before, checkpoints that they waited for included; 0: not known.
    """

    back_s: float
    repeated: int
    phases_s: dict[str, float]
    step_s: float = 0.0


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases to measure, in their order.

    Args:
        names: each a part of the names of those wanted; none: all of them.

    Raises:
        ValueError: a name is in no case's.
    """
    for name in names:
        if not any(name in case.name for case in CASES):
            known = ", ".join(f'"{case.name}"' for case in CASES)
            raise ValueError(f'--only "{name}" is in none of {known}')
    return [case for case in CASES if not names or any(name in case.name for name in names)]


def report(found: Mapping[Case, Sequence[Fault]]) -> str:
    """A table with a row a case, and the phases of deepopt's recoveries.

    Args:
        found: what each case's faults cost; a case without any has no row.
    """
    header = (
        *("", "faults", "p50 s", "p95 s", "worst s", "aim of p95", "steps repeated"),
        "step s before",
    )
    lines = [table(header, [_row(case, faults) for case, faults in found.items() if faults])]
    for case, faults in found.items():
        parts = [part for part in (faults[0].phases_s if faults else ()) if part != "total"]
        medians = {p: statistics.median(f.phases_s.get(p, 0.0) for f in faults) for p in parts}
        if medians:
            told = ", ".join(f"{p} {s:.2f} s" for p, s in medians.items())
            lines.append(f"{case.name}: {told}")
    return "\n".join(lines)


def compare(found: Mapping[Case, Sequence[Fault]]) -> str:
    """Medians of all peers beside ours; last the ratio against the fastest peer that the aim is about.

    Args:
        found: what each case's faults cost.

    Returns:
        Nothing where ours or all peers are missing. Where none of the peers of the aim was measured, the
        ratio is against the fastest of the others, and no aim is said.
    """
    medians = {
        case: statistics.median(fault.back_s for fault in faults)
        for case, faults in found.items()
        if faults
    }
    ours_s = medians.get(OURS)
    peers = {case: s for case, s in medians.items() if case.peer}
    if ours_s is None or not peers:
        return ""
    lines = [f"medians: {OURS.name} {ours_s:.2f} s"]
    lines += [f"{case.name} {s:.2f} s: {s / ours_s:.2f} times" for case, s in peers.items()]
    named = {case: s for case, s in peers.items() if case.peer in PEERS_OF_THE_AIM}
    beside = named or peers
    nearest = min(beside, key=beside.__getitem__)
    lines.append(f"the ratio is against {nearest.peer}")
    ratio = ratio_line(beside[nearest] / ours_s, aim=AIM if named else None)
    return "\n".join([*lines, "", ratio])


def _row(case: Case, faults: Sequence[Fault]) -> tuple[str, ...]:
    times = sorted(fault.back_s for fault in faults)
    p95_s = times[min(len(times) - 1, int(0.95 * len(times)))]
    step_s = statistics.median(fault.step_s for fault in faults)
    return (
        case.name,
        str(len(times)),
        f"{statistics.median(times):.2f}",
        f"{p95_s:.2f}",
        f"{times[-1]:.2f}",
        "" if case.aim_s is None else f"{case.aim_s:g}",
        f"{statistics.mean(fault.repeated for fault in faults):.1f}",
        f"{step_s:.2f}" if step_s else "",
    )
