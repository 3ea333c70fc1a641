"""From a trainer's arguments to a job, with what the script brings along in the run directory."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from deepopt.carried.model_file import dump_model
from deepopt.carried.object_file import dump_object
from deepopt.cluster.hostfile import Host, read_hostfile
from deepopt.config import JobConfig
from deepopt.convert import describe
from deepopt.errors import InputError, PlanError
from deepopt.job_file import make_job
from deepopt.moe.elb_config import map_elb_config
from deepopt.telemetry.files import write_text_atomic
from deepopt.trainer.data import Data
from deepopt.trainer.device_map import Device, read_device_map
from deepopt.trainer.optimizers import optimizer_fields
from deepopt.trainer.rehearsal import rehearse


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What `DeepTrainer` was told, but for its data; its docstring says more.

    Args:
        device_map: device -> layers.
        workers: how many.
        placement: of the stages.
        elb: checked.
        loss_fn: of (output, targets).
        optimizer: of any kind.
        optimizer_kwargs: of its class or function.
        lr_scheduler: a class or function.
        lr_scheduler_kwargs: of it.
        grad_clip: largest global norm.
        groups: of gradients.
        name: of the job.
        hostfile: hosts.
        address: of a Ray cluster.
        overrides: keys of the job file.
    """

    device_map: Mapping[str, Sequence[int]] | None
    workers: int | None
    placement: str
    elb: Mapping[str, Any]
    loss_fn: Any
    optimizer: Any
    optimizer_kwargs: Mapping[str, Any] | None
    lr_scheduler: Any
    lr_scheduler_kwargs: Mapping[str, Any] | None
    grad_clip: float | None
    groups: int | None
    name: str
    hostfile: str | Path | None
    address: str | None
    overrides: Mapping[str, Mapping[str, Any]]


def job_of(
    model: torch.nn.Module,
    data: Data,
    settings: Settings,
    *,
    steps: int,
    folder: Path,
    validation: Data | None = None,
    validate_every: int = 0,
    alone: bool = False,
    outputs: bool = False,
) -> JobConfig:
    """The job of a fit; writes model, loss, optimizer and data into a folder.

    Args:
        model: with the weights to start from.
        data: ready.
        settings: of the trainer.
        steps: to train.
        folder: exists; part of the run directory.
        validation: a validation set; None: none.
        validate_every: steps between two looks at it; 0: only after the last.
        alone: measure it and train nothing.
        outputs: write the model's outputs for it, and measure nothing.

    Raises:
        DeepoptError: something cannot be carried, or does not fit.
    """
    fields = _fields(model, data, settings, steps=steps, folder=folder)
    if validation is not None:
        fields["evaluation"] = {
            "dataset": "deepopt.carried:dataset",
            "kwargs": _carry_data(validation, folder / "validation.pkl"),
            "readers": validation.readers,
            "every": validate_every,
            "alone": alone,
            "outputs": outputs,
            **fields.get("evaluation", {}),
        }
    elif validate_every:
        raise InputError(
            f"validate_every={validate_every} without a validation set",
            remedy="give validation=, a dataset",
        )
    job = _checked(fields)
    rehearse(model, job)
    if settings.device_map is None:
        return job
    names = [layer.name for layer in describe(job).layers]
    placing = read_device_map(settings.device_map, layer_names=names)
    if settings.workers not in (None, len(placing.devices)):
        raise PlanError(
            f"workers={settings.workers}, and device_map names {len(placing.devices)} devices",
            remedy="leave workers out",
        )
    wanted = settings.placement
    if placing.placement is not None and wanted not in ("auto", placing.placement):
        raise PlanError(
            f"device_map places the stages as {placing.placement}, and the placement is {wanted}",
            remedy=f"give placement={placing.placement!r}, or each device one range of layers",
        )
    check_devices(placing.devices, hostfile=settings.hostfile)
    update: dict[str, dict[str, Any]] = {
        "pipeline": {
            "boundaries": placing.boundaries,
            "placement": placing.placement or wanted,
        },
        "worker": {
            "count": len(placing.devices),
            "device": placing.devices[0].kind,
            "gpus": gpu_names(placing.devices, visible=os.environ.get("CUDA_VISIBLE_DEVICES")),
        },
    }
    if placing.devices[0].host is not None:
        assert settings.hostfile is not None, "hosts were checked"
        hosts = order_hosts(placing.devices, hosts=read_hostfile(Path(settings.hostfile)))
        write_text_atomic(folder / "hosts", hosts, durable=True)
        update["cluster"] = {"hostfile": str(folder / "hosts")}
    sections = {
        name: getattr(job, name).model_copy(update=fields) for name, fields in update.items()
    }
    return job.model_copy(update=sections)


def gpu_names(devices: Sequence[Device], *, visible: str | None) -> tuple[str, ...]:
    """The GPUs of a map's devices as CUDA_VISIBLE_DEVICES names them; none for CPUs.

    Args:
        devices: by rank.
        visible: CUDA_VISIBLE_DEVICES of this process, which this host's devices count in.
    """
    if devices[0].kind == "cpu":
        return ()
    if visible is None or devices[0].host is not None:
        return tuple(str(device.index) for device in devices)
    names = [name.strip() for name in visible.split(",")]
    return tuple(names[device.index] for device in devices)


def order_hosts(devices: Sequence[Device], *, hosts: Sequence[Host]) -> str:
    """A hostfile whose slots, in their order, are the hosts of a map's devices.

    Args:
        devices: by rank; each names a host.
        hosts: that there are.

    Raises:
        PlanError: a host is unknown or has too few slots, or its devices are no neighbours.
    """
    known = {host.name: host for host in hosts}
    lines = []
    runs = [(name, list(group)) for name, group in itertools.groupby(d.host for d in devices)]
    for name, group in runs:
        if name not in known:
            raise PlanError(
                f"device_map: host {name} is unknown",
                remedy=f"the hostfile names {', '.join(known)}",
            )
        if sum(other == name for other, _ in runs) > 1:
            raise PlanError(
                f"device_map leaves host {name} and comes back to it, in the order of the layers",
                remedy="give the devices of a host layers that follow each other",
            )
        host = known[name]
        if len(group) > host.slots:
            raise PlanError(
                f"device_map names {len(group)} devices on {name}, which has {host.slots} slot(s)",
                remedy="raise slots= in the hostfile, or name other hosts",
            )
        port = "" if host.port is None else f" port={host.port}"
        lines.append(f"{name} slots={len(group)}{port}\n")
    return "".join(lines)


def check_devices(devices: Sequence[Device], *, hostfile: str | Path | None) -> None:
    """Check that the devices of a map exist, as far as it can be seen from here.

    Raises:
        PlanError: one does not.
    """
    if devices[0].host is not None:
        if hostfile is None:
            raise PlanError(
                f"device_map names hosts ({devices[0]}), and there is no hostfile",
                remedy="give hostfile=, or names without a host",
            )
        return
    if hostfile is None and devices[0].kind == "cuda":
        count = torch.cuda.device_count()
        for device in devices:
            if device.index >= count:
                found = f"{count} GPU(s), gpu0 to gpu{count - 1}" if count else "no GPU"
                raise PlanError(
                    f"device_map: {device} is unknown: torch sees {found} on this machine",
                    remedy="name other devices, or cpu0, cpu1, ... to train without GPUs",
                )


def check_elb(config: Mapping[str, Any] | None) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The job's `elb` section of an `elb_config`, and what it means, in lines; without one, the defaults.

    Raises:
        InputError: it is no mapping, a key is unknown, or a value is out of range.
    """
    given: Any = config
    if given is None:
        return {}, ()
    if not isinstance(given, Mapping):
        raise InputError(
            f"elb_config is a {type(given).__name__}",
            remedy='give a mapping, for example {"alpha": 0.3, "monitor_freq": 100}',
        )
    mapped = map_elb_config(given)
    return mapped.section, mapped.lines


def _fields(
    model: torch.nn.Module, data: Data, settings: Settings, *, steps: int, folder: Path
) -> dict[str, dict[str, Any]]:
    layout = data.layout
    fields: dict[str, dict[str, Any]] = {
        "model": {
            "factory": "deepopt.carried:model",
            "kwargs": dump_model(model, folder / "model.pkl"),
            **_loss_fields(settings.loss_fn, folder=folder),
        },
        "data": {
            "dataset": "deepopt.carried:dataset",
            "kwargs": _carry_data(data, folder / "dataset.pkl"),
            "readers": data.readers,
            "prefetch": data.prefetch,
        },
        "training": {
            "steps": steps,
            "seed": layout.seed,
            "microbatches": layout.microbatches,
            "microbatch_size": layout.microbatch_size,
            "groups": settings.groups,
            "grad_clip": settings.grad_clip,
        },
        "optimizer": optimizer_fields(
            settings.optimizer,
            kwargs=settings.optimizer_kwargs,
            scheduler=settings.lr_scheduler,
            scheduler_kwargs=settings.lr_scheduler_kwargs,
            model=model,
            folder=folder,
        ),
        "pipeline": {"placement": settings.placement},
        "elb": dict(settings.elb),
        "worker": {"count": settings.workers},
        "cluster": {
            "hostfile": None if settings.hostfile is None else str(settings.hostfile),
            "address": settings.address,
        },
    }
    if (
        not data.can_resume
    ):  # a new worker group begins anew: there must be nothing to go on from
        fields["checkpoint"] = {"every": 0}
    for section, keys in settings.overrides.items():
        fields[section] = {**fields.get(section, {}), **keys}
    return {"name": settings.name, **fields}  # type: ignore[dict-item]


def _carry_data(data: Data, path: Path) -> dict[str, str]:
    try:
        return dump_object(data.source, path, what="the dataset")
    except InputError as error:  # of the user's dataset, not of what reads it
        message = error.message.replace("the dataset._dataset", "the dataset", 1)
        raise InputError(message, remedy=error.remedy) from error


def _loss_fields(loss_fn: Any, *, folder: Path) -> dict[str, Any]:
    if loss_fn is None:
        return {}
    if not callable(loss_fn):
        raise InputError(
            f"loss_fn is a {type(loss_fn).__name__}, which cannot be called",
            remedy="give a function of (output, targets)",
        )
    if isinstance(loss_fn, torch.nn.Module) and any(
        p.requires_grad for p in loss_fn.parameters()
    ):
        raise InputError(
            f"loss_fn ({type(loss_fn).__name__}) has parameters, which nobody would train",
            remedy="make them part of the model, or loss_fn.requires_grad_(False)",
        )
    kwargs = dump_object(loss_fn, folder / "loss.pkl", what="loss_fn")
    return {"loss": "deepopt.carried:loss", "loss_kwargs": kwargs}


def _checked(fields: dict[str, Any]) -> JobConfig:
    return make_job(fields)
