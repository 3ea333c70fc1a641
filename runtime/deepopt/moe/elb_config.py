"""`elb_config` of `DeepTrainer` and `convert_to_deepopt`: a few words, and what they mean as keys of
the job. Pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from deepopt.config import ElbConfig
from deepopt.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class ElbMapping:
    """What an `elb_config` came to.

    Args:
        elb: the section `elb` of the job.
        lines: what it means, one line each, for people.
    """

    elb: ElbConfig
    lines: tuple[str, ...]

    @property
    def section(self) -> dict[str, Any]:
        """The section as a job file would hold it: only what differs from the defaults, and `mode`."""
        return {"mode": self.elb.mode, **self.elb.model_dump(exclude_defaults=True)}


def map_elb_config(elb_config: Mapping[str, Any] | None) -> ElbMapping:
    """Turn `elb_config={"alpha": 0.3, "monitor_freq": 100}` into keys `elb.*` of the job.

    Args:
        elb_config: keys of the section `elb`; None: the defaults. Given, even if empty, it also
            replaces the routers of models that nobody wrote for deepopt.

    Raises:
        InputError: an unknown key, or a value out of range; it names the key and what fits.
    """
    wanted = {} if elb_config is None else {"replace_routers": True, **elb_config}
    elb = elb_settings(wanted, what="elb_config")
    lines = [f"elb.mode = {elb.mode}: {_MODES[elb.mode]}"]
    given = set(elb_config or {})
    if "alpha" in given:
        lines.append(f"elb.alpha = {elb.alpha:g}: {_alpha_means(elb)}")
    if "monitor_freq" in given:
        lines.append(f"elb.monitor_freq = {elb.monitor_freq}: {_monitor_freq_means(elb)}")
    others = sorted(given - {"mode", "alpha", "monitor_freq"})
    lines += [f"elb.{name} = {getattr(elb, name)}" for name in others]
    return ElbMapping(elb=elb, lines=tuple(lines))


def elb_settings(options: Mapping[str, Any], *, what: str) -> ElbConfig:
    """The checked section `elb` of some keys.

    Args:
        options: values by key.
        what: how errors call them.

    Raises:
        InputError: an unknown key, or a value out of range.
    """
    known = ElbConfig.model_fields
    for name in options:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            raise InputError(
                f"{what} has no key {name!r}",
                remedy=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}",
            )
    try:
        return ElbConfig.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else what
        raise InputError(
            f"{what}: {name} is {options.get(name)!r}: {first['msg'].lower()}",
            remedy=f"{name}: {known[name].description}" if name in known else "",
        ) from error


_MODES = {
    "elb": "each expert's score distribution is tracked; its quantile is added for selection only",
    "formula": "log(1 + alpha x deficit / mean load) is added to the bias of log scores, clamped",
    "sign": "the bias moves by elb.sign_rate towards under-loaded experts",
    "quantile": "the bias is the last step's quantile",
    "aux": "a loss on the global batch's shares; no bias",
    "none": "plain top-k",
}


def _alpha_means(elb: ElbConfig) -> str:
    if elb.mode == "elb":
        if elb.chunks == 1:
            return "of no effect: one chunk (elb.chunks) leaves no feedback inside the step"
        where = "each device's" if elb.level == "device" else "each expert's"
        text = (
            "gain of 1 + alpha x (mean - load) / mean, applied inside the step to "
            f"{where} queue over {elb.chunks} position chunks"
        )
        if elb.level == "expert" or (elb.devices or 0) > 1:
            return text
        said = "elb.devices" if elb.devices else "parallel.expert, which elb.devices overrides"
        return (
            f"{text}; where one device holds all experts ({said}) only the warm-up uses it, "
            "expert by expert"
        )
    if elb.mode == "formula":
        return (
            f"gain of 1 + alpha x (mean - load) / mean, applied every {elb.monitor_freq} steps"
        )
    return f"of no effect in mode {elb.mode}"


def _monitor_freq_means(elb: ElbConfig) -> str:
    if elb.mode == "formula":
        return f"loads are read and the bias updated every {elb.monitor_freq} steps"
    return f"loads are reported over windows of {elb.monitor_freq} steps; the bias follows every step"
