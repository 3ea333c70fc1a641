"""From `device_map` to stages: which device holds which layers. Pure.

A map is read in the order of the layers. What it may be: each device one range of layers (line, or
mirror, where each device also holds what its mirror image does), each device two ranges, folded once
(`v`: first and last layers on the first device), or the same round of devices several times (line with
several stages a device).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deepopt.errors import PlanError

_NAME = re.compile(r"(?:(?P<host>[^\s/]+)[/:])?(?P<kind>gpu|cpu|cuda):?(?P<index>\d+)")
_REMEDY = 'write for example {"gpu0": [0, 1, 2, 3], "gpu1": [4, 5, 6, 7]}: each layer once'
_MOST_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One place for a worker.

    Args:
        kind: `cuda` or `cpu`.
        index: of the GPU on its host; of a CPU only a number.
        host: its name; None: the host that the cluster gives.
    """

    kind: str
    index: int
    host: str | None = None

    def __str__(self) -> str:
        name = f"{'gpu' if self.kind == 'cuda' else 'cpu'}{self.index}"
        return name if self.host is None else f"{self.host}:{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Placing:
    """What a device map asks for.

    Args:
        devices: by pipeline rank.
        boundaries: first layer of each stage.
        placement: `v`; `line` where devices hold several stages in turn; else None: line or mirror.
    """

    devices: tuple[Device, ...]
    boundaries: tuple[int, ...]
    placement: str | None


def parse_device(name: Any) -> Device:
    """The device of a name: `gpu0`, `cpu1`, `cuda:0`, `HOST:gpu0` or `HOST/gpu0`.

    Raises:
        PlanError: it is none of these.
    """
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise PlanError(
            f"device_map: {name!r} is not a device",
            remedy="write gpu0, gpu1, ... or cpu0, cpu1, ...; on other hosts HOST:gpu0",
        )
    kind = "cpu" if match["kind"] == "cpu" else "cuda"
    return Device(kind=kind, index=int(match["index"]), host=match["host"])


def read_device_map(device_map: Any, *, layer_names: Sequence[str]) -> Placing:
    """Stages and devices of a device map.

    Args:
        device_map: device -> indices of its layers, in any order.
        layer_names: of the model, in order.

    Raises:
        PlanError: a device is unknown or named twice, kinds are mixed, a layer is unknown, missing
            or on two devices, or the ranges make no pipeline.
    """
    owners = _owners(device_map, num_layers=len(layer_names))
    missing = [i for i in range(len(layer_names)) if i not in owners]
    if missing:
        raise PlanError(
            f"device_map has no device for layer {_list(missing)}: the model has "
            f"{len(layer_names)} layers, {_named(missing, layer_names)}",
            remedy=_REMEDY,
        )
    starts = [0] + [i for i in range(1, len(owners)) if owners[i] != owners[i - 1]]
    runs = [owners[start] for start in starts]
    devices = list(dict.fromkeys(runs))
    rounds = len(runs) // len(devices)
    if len(runs) == len(devices):
        return Placing(devices=tuple(devices), boundaries=tuple(starts), placement=None)
    if runs == devices + devices[-2::-1]:  # the last device's two stages lie side by side
        last = len(devices) - 1
        end = starts[last + 1]
        if end - starts[last] < 2:
            raise PlanError(
                f"device_map folds the layers at {devices[-1]}, which has one layer for two stages",
                remedy=f"give {devices[-1]} two layers or more",
            )
        starts.insert(last + 1, (starts[last] + end) // 2)
        return Placing(devices=tuple(devices), boundaries=tuple(starts), placement="v")
    if runs == devices * rounds:
        return Placing(
            devices=tuple(devices),
            boundaries=tuple(starts),
            placement="line",
        )
    raise PlanError(
        f"device_map makes no pipeline: in the order of the layers the devices are "
        f"{', '.join(map(str, runs))}",
        remedy="give each device one range of layers; or two, folded once (a b c c b a); or the same "
        "round of devices again and again (a b c a b c)",
    )


def _owners(device_map: Any, *, num_layers: int) -> dict[int, Device]:
    if not isinstance(device_map, Mapping) or not device_map:
        raise PlanError(f"device_map is {device_map!r}, not a mapping", remedy=_REMEDY)
    devices: dict[Device, str] = {}
    owners: dict[int, Device] = {}
    for name, layers in device_map.items():
        device = parse_device(name)
        if device in devices:
            raise PlanError(
                f"device_map names one device twice: {devices[device]} and {name}",
                remedy="give all layers of a device in one list",
            )
        devices[device] = name
        if isinstance(layers, str) or not isinstance(layers, Sequence | range) or not layers:
            raise PlanError(f"device_map: {name} has {layers!r}, not layers", remedy=_REMEDY)
        for layer in layers:
            if not isinstance(layer, int) or isinstance(layer, bool):
                raise PlanError(
                    f"device_map: {name} has {layer!r}, not a layer", remedy=_REMEDY
                )
            if not 0 <= layer < num_layers:
                raise PlanError(
                    f"device_map: {name} has layer {layer}, the model has layers 0 to "
                    f"{num_layers - 1}",
                    remedy="deepopt.convert_to_deepopt(model, ...).layers lists them",
                )
            if layer in owners:
                raise PlanError(
                    f"device_map: layer {layer} is on {owners[layer]} and on {device}",
                    remedy="name each layer once; pipeline placement mirror gives each device a second "
                    "share by itself",
                )
            owners[layer] = device
    if len({device.kind for device in devices}) > 1:
        raise PlanError(
            f"device_map mixes GPUs and CPUs: {', '.join(devices.values())}",
            remedy="name devices of one kind",
        )
    hosts = {device.host is None for device in devices}
    if len(hosts) > 1:
        raise PlanError(
            f"device_map names hosts for some devices only: {', '.join(devices.values())}",
            remedy="write HOST:gpu0 for all of them or for none",
        )
    return owners


def _list(layers: Sequence[int]) -> str:
    """Indices as ranges: `4 to 7`."""
    parts = []
    for _, group in itertools.groupby(enumerate(layers), lambda pair: pair[1] - pair[0]):
        found = [layer for _, layer in group]
        parts.append(str(found[0]) if len(found) == 1 else f"{found[0]} to {found[-1]}")
    return ", ".join(parts)


def _named(layers: Sequence[int], names: Sequence[str]) -> str:
    shown = [f"{i} is {names[i]}" for i in layers[:_MOST_SHOWN]]
    return ", ".join([*shown, *(["..."] if len(layers) > _MOST_SHOWN else [])])
