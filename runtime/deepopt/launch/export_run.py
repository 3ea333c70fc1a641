"""The weights of a run for other programs: plain safetensors, or a Hugging Face folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from deepopt.checkpoint import folders
from deepopt.checkpoint.export import MAX_SHARD_BYTES, export_weights
from deepopt.checkpoint.store import CheckpointStore
from deepopt.config import JobConfig
from deepopt.errors import CheckpointError, InputError
from deepopt.job_file import load_job
from deepopt.launch.adapter import adapter_parts
from deepopt.launch.preparation import import_from
from deepopt.launch.run_files import launch_roots
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json

ExportFormat = Literal["hf", "weights"]


def export_run(
    run: RunDirectory,
    directory: Path,
    *,
    kind: ExportFormat,
    step: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tell: Callable[[str, float], None] | None = None,
) -> list[Path]:
    """Write the weights of a checkpoint of a run into a folder; it appears whole or not at all.

    Args:
        run: of a job, in work or ended.
        directory: new, or an earlier export.
        kind: `hf`: what `from_pretrained` loads, with `config.json`, of a model with adapters of peft
            the adapter alone; `weights`: safetensors under each name of the `state_dict`.
        step: of the checkpoint; None: the newest.
        max_shard_bytes: largest file, in bytes of tensors.
        tell: is told what is being done, and which share of all is done.

    Returns:
        The files.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged.
        InputError: `hf`, and the model is none of `transformers`.
    """
    job = load_job(run.job)
    import_from([*launch_roots(run), Path.cwd()], job=job)
    skeleton = ModelSkeleton.from_json(read_json(run.model))
    if tell is not None:
        tell("verifying the checkpoint", 0.0)
    checkpoint = find_checkpoint(run, job=job, skeleton=skeleton, step=step)
    leave_out: set[str] = set()
    beside: dict[str, str] = {}
    adapter_names = None
    if kind == "hf":
        model = _hugging_face_model(job)
        if getattr(model, "peft_config", None):
            beside, adapter_names = adapter_parts(model)
        else:
            beside = _configuration(model)
            leave_out = _tied_names(model, skeleton)
    return export_weights(
        checkpoint,
        skeleton,
        directory,
        max_shard_bytes=max_shard_bytes,
        leave_out=leave_out,
        beside=beside,
        adapter_names=adapter_names,
        tell=tell,
    )


def find_checkpoint(
    run: RunDirectory, *, job: JobConfig, skeleton: ModelSkeleton, step: int | None
) -> Path:
    """A whole checkpoint of a run.

    Args:
        run: the run directory.
        job: of it.
        skeleton: of its model.
        step: of the checkpoint; None: the newest.

    Raises:
        CheckpointError: there is none.
    """
    root = run.checkpoint_root(job.checkpoint.directory)
    if step is None:
        found = CheckpointStore(root).newest_verified(skeleton.fingerprint())
        if found is None:
            raise CheckpointError(
                f"{run.root} holds no whole checkpoint",
                remedy="ask a running job for one: deepopt stop --help; or wait for the next",
            )
        return found.path
    parsed = [folders.parse(path) for path in sorted(root.glob("*")) if path.is_dir()]
    steps = {
        folder.step: folder.path
        for folder in parsed
        if folder is not None and folder.kind is folders.FolderKind.COMMITTED
    }
    if step not in steps:
        raise CheckpointError(
            f"{run.root} holds no checkpoint of step {step}",
            remedy=f"it holds {', '.join(map(str, sorted(steps))) or 'none'}",
        )
    return steps[step]


def _hugging_face_model(job: JobConfig) -> Any:
    from deepopt.convert.factory import build_model

    model: Any = build_model(job, device="meta")
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise InputError(
            f"{job.model.factory} made a {type(model).__name__}, which is no model of transformers: "
            "it has no config",
            remedy="use --format weights",
        )
    return model


def _configuration(model: Any) -> dict[str, str]:
    """The files that say what the weights are of."""
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if callable(getattr(model, "can_generate", None)) and model.can_generate():
            model.generation_config.save_pretrained(folder)
        return {path.name: path.read_text() for path in sorted(Path(folder).glob("*.json"))}


def _tied_names(model: Any, skeleton: ModelSkeleton) -> set[str]:
    """Tied parameters that the library ties again by itself, as `save_pretrained` leaves them out."""
    known: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    tied = {
        p.name for layer in skeleton.layers for p in layer.parameters if p.tied_to is not None
    }
    return {name for name in tied if name in known}
