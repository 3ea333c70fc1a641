"""`DeepTrainer`: arguments to a job, the job to a run, the trained weights back into the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from deepopt.checkpoint.verification import Found
from deepopt.config import JobConfig
from deepopt.convert import DeepModel
from deepopt.datasets.epochs import EpochSource
from deepopt.errors import InputError
from deepopt.job_file import load_job
from deepopt.launch.fp8_words import fp8_words
from deepopt.launch.run_files import new_run_path
from deepopt.launch.run_view import request
from deepopt.launch.script import launched, merged, next_run_dir, note_run
from deepopt.moe.configure import configure_routers
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.run_directory import RunDirectory
from deepopt.telemetry.files import read_json
from deepopt.trainer import run as runs
from deepopt.trainer.callbacks import Callback, as_callbacks
from deepopt.trainer.checkpoints import copy_checkpoint, find_checkpoint, is_run, load_weights
from deepopt.trainer.data import (
    Data,
    Reading,
    idle_readers,
    read_data,
    read_evaluation,
    read_prediction,
    read_validation,
)
from deepopt.trainer.export import export_model
from deepopt.trainer.job import Settings, check_elb, job_of
from deepopt.trainer.progress import NoView, make_forward_view, make_view
from deepopt.trainer.relay import Relay
from deepopt.worker.predictions import read_predictions


@dataclass(frozen=True, slots=True, kw_only=True)
class FitResult:
    """How a fit ended.

    Args:
        run_dir: everything about it: `deepopt status` and `deepopt logs` work on it.
        state: `finished`, or `stopped` where a callback or Ctrl-C asked for it.
        step: the last one whose update was made.
        losses: of each step of this fit, from the first.
        val_losses: step -> loss of the validation set after it.
        report: the closing report, as `report.json` has it.
    """

    run_dir: Path
    state: str
    step: int
    losses: tuple[float, ...]
    val_losses: Mapping[int, float]
    report: Mapping[str, Any]


class DeepTrainer:
    """Trains a model as a pipeline, from a script or a notebook (docs/trainer.md).

    Args:
        model: any module, or what `convert_to_deepopt` made of one. `fit` changes its weights in
            place; with `elb_config` also its routers, for those that it was trained with.
        device_map: device -> indices of its layers: `{"gpu0": [0, 1], "gpu1": [2, 3]}`; `cpuN` for
            processes without a GPU, `HOST:gpuN` with `hostfile`. None: planned.
        workers: how many; None: one a device of the map, or a GPU, or 4 where there is none.
        placement: of the stages: `auto`, `line`, `v`, `mirror` (the same as `bi_stream`); None: as
            the model was converted, else `auto`.
        elb_config: `{"alpha": 0.3, "monitor_freq": 100}`: how MoE routers are balanced.
        loss_fn: maps (output, targets) to a scalar mean; None: the model's own `loss`, what it
            returned as `loss`, or the cross-entropy of its logits.
        optimizer: a class of `torch.optim` with `optimizer_kwargs`; a function of a layer's (name,
            parameter) pairs; an optimizer over the model's parameters, which is read and not used; an
            `OptimizerConfig` or a mapping of its fields: AdamW with warm-up; None: its defaults.
        optimizer_kwargs: of the class or function.
        lr_scheduler: a class of `torch.optim.lr_scheduler` with `lr_scheduler_kwargs`, or a function
            of an optimizer; stepped once a step. None: constant rates.
        lr_scheduler_kwargs: of the class or function.
        grad_clip: largest global L2 norm of the gradients; None: no clipping.
        batch_size: samples of a step; None: the dataset's own, else 32, or all where there are less.
        microbatches: that a step is cut into; None: as many as divide it, at most 8.
        groups: gradient groups of a step, which alone decide the rounding; None: min(2,
            microbatches).
        collate_fn: makes a batch of a list of samples; None: torch's default.
        shuffle: samples of a map-style dataset, anew in each epoch.
        drop_last: leave out what does not fill a step at the end of an epoch.
        seed: of the data order, dropout and router noise.
        callbacks: `Callback`s, or functions of each step's record.
        run_dir: new folder of each fit; None: `runs/NAME-DATE-ID`.
        name: of the job.
        progress: whether to show it.
        hostfile: hosts to use.
        address: of a Ray cluster to join.
        settings: further keys, nested as in a job file (docs/job-file.md); they win. In a script that
            `deepopt launch` runs, its options win over all of these.

    Raises:
        InputError: an argument is wrong.
    """

    def __init__(
        self,
        model: torch.nn.Module | DeepModel,
        *,
        device_map: Mapping[str, Sequence[int]] | None = None,
        workers: int | None = None,
        placement: str | None = None,
        elb_config: Mapping[str, Any] | None = None,
        loss_fn: Any = None,
        optimizer: Any = None,
        optimizer_kwargs: Mapping[str, Any] | None = None,
        lr_scheduler: Any = None,
        lr_scheduler_kwargs: Mapping[str, Any] | None = None,
        grad_clip: float | None = None,
        batch_size: int | None = None,
        microbatches: int | None = None,
        groups: int | None = None,
        collate_fn: Any = None,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        callbacks: Sequence[Any] = (),
        run_dir: str | Path | None = None,
        name: str = "trainer",
        progress: bool = True,
        hostfile: str | Path | None = None,
        address: str | None = None,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self.model = model.model if isinstance(model, DeepModel) else model
        if not isinstance(self.model, torch.nn.Module):
            raise InputError(
                f"model is a {type(model).__name__}, not a torch.nn.Module",
                remedy="give a module, or what convert_to_deepopt() made of one",
            )
        launch = launched()
        if launch is not None:  # what `deepopt launch` was told counts
            workers = launch.workers or workers
            hostfile, address = launch.hostfile or hostfile, launch.address or address
            settings = merged(settings or {}, launch.settings)
        if placement is None:
            placement = model.placement if isinstance(model, DeepModel) else "auto"
        elb, self._elb_lines = check_elb(elb_config)
        self._settings = Settings(
            device_map=device_map,
            workers=workers,
            placement="mirror" if placement == "bi_stream" else placement,
            elb=elb,
            loss_fn=loss_fn,
            optimizer=optimizer,
            optimizer_kwargs=optimizer_kwargs,
            lr_scheduler=lr_scheduler,
            lr_scheduler_kwargs=lr_scheduler_kwargs,
            grad_clip=grad_clip,
            groups=groups,
            name=name,
            hostfile=hostfile,
            address=address,
            overrides=_with_precision(settings or {}, model),
        )
        self._reading = Reading(
            batch_size=batch_size,
            microbatches=microbatches,
            shuffle=shuffle,
            drop_last=drop_last,
            collate=collate_fn,
            seed=seed,
        )
        self._callbacks: list[Callback] = as_callbacks(callbacks)
        self._given_run_dir = None if run_dir is None else Path(run_dir)
        self._shows = progress
        self.run_dir: Path | None = None

    def fit(
        self,
        dataset: Any,
        *,
        epochs: int = 1,
        max_steps: int | None = None,
        resume_from: str | Path | None = None,
        validation: Any = None,
        validate_every: int = 0,
    ) -> FitResult:
        """Train, and put the weights back into the model.

        Args:
            dataset: a torch `Dataset`, `IterableDataset` or `DataLoader`, or an iterable of batches
                that can be read from the start again and again.
            epochs: passes over it.
            max_steps: stop after so many; needed for a stream without `len()`.
            resume_from: a run directory, to go on in it; or a checkpoint or what `save` wrote, to go on
                in a new one. `epochs` and `max_steps` count from the very beginning.
            validation: a dataset of the kinds that have `len()`, measured in eval mode, without
                gradients, in batches of the training's size; what does not fill one is left out.
            validate_every: steps between two measurements; 0: only after the last one.

        Raises:
            DeepoptError: an argument, the data or the model is wrong, or training failed: the model
                then is as it was.
            KeyboardInterrupt: Ctrl-C; the weights of the last step are in the model all the same.
        """
        data = read_data(dataset, model=self.model, reading=self._reading)
        steps = _num_steps(data, epochs=epochs, max_steps=max_steps)

        held_out = None
        if validation is not None:
            held_out = read_validation(
                validation, data=data, model=self.model, reading=self._reading
            )

        def make_job(folder: Path) -> JobConfig:
            return job_of(
                self.model,
                data,
                self._settings,
                steps=steps,
                folder=folder,
                validation=held_out,
                validate_every=validate_every,
            )

        found = None
        if resume_from is not None:
            found = self._resumable(Path(resume_from), data=data, last_step=steps)
        goes_on = resume_from is not None and is_run(Path(resume_from))
        if goes_on:
            assert resume_from is not None, "goes on in nothing"
            run = runs.renew(Path(resume_from), make_job)
        else:
            launch = launched()
            told = None if launch is None else next_run_dir(launch)
            path = told or self._given_run_dir or new_run_path(self._settings.name)
            run = runs.open_new(path, make_job, begin_with=found)
        note_run(run.root)
        view = make_view(last_step=steps) if self._shows else NoView()
        for line in self._elb_lines:
            view.note(line)
        skeleton = ModelSkeleton.from_json(read_json(run.model))
        if fp8 := fp8_words(load_job(run.job), skeleton):
            view.note(f"fp8: {fp8}")
        if unused := idle_readers(dataset, data):
            view.note(unused)
        if not data.can_resume:
            view.note(
                f"{data.source.description}: it has no state_dict(), so this run cannot resume"
            )
        return self._follow(run, data=data, view=view, fresh=not goes_on)

    def evaluate(self, dataset: Any) -> float:
        """The mean loss of a dataset with the weights that the model has now.

        Forwards alone through the pipeline, in eval mode, without gradients; in the dataset's own order,
        in batches of `batch_size`. Each sample counts once: the last batch is filled up with its last
        sample, and what was added is left out of the loss. The run directory stays.

        Args:
            dataset: of the kinds that have `len()`, as for `validation` of `fit`.

        Raises:
            DeepoptError: the data or the model is wrong, or the evaluation failed.
            KeyboardInterrupt: Ctrl-C.
        """
        data = read_evaluation(dataset, model=self.model, reading=self._reading)
        _, relay = self._only_forward(data, outputs=False)
        if 1 not in relay.val_losses:
            raise KeyboardInterrupt
        return relay.val_losses[1]

    def predict(self, dataset: Any) -> Any:
        """The model's outputs for a dataset, in its order, with the weights that the model has now.

        As `evaluate`, without a loss. The workers with the last layers write the outputs into the run
        directory (`predictions/`), which stays; they are read from there into memory.

        Args:
            dataset: of the kinds that have `len()`, without targets or with targets that are left aside;
                in a tuple of several tensors the last one is the targets.

        Returns:
            What the model returns, its tensors joined along their first dimension, on the CPU. Tensors
            whose first dimension is not the samples (a loss, for example) are None.

        Raises:
            DeepoptError: the data or the model is wrong, or the forwards failed.
            KeyboardInterrupt: Ctrl-C.
        """
        data = read_prediction(dataset, model=self.model, reading=self._reading)
        run, _ = self._only_forward(data, outputs=True)
        samples = data.source.num_samples if isinstance(data.source, EpochSource) else None
        assert samples is not None, "a dataset that was filled up knows its samples"
        count = math.ceil(samples / data.layout.microbatch_size)
        return read_predictions(run.predictions, num_microbatches=count)

    def _only_forward(self, data: Data, *, outputs: bool) -> tuple[RunDirectory, Relay]:
        """Run a job of forwards alone to its end."""

        def make_job(folder: Path) -> JobConfig:
            return job_of(
                self.model,
                data,
                self._settings,
                steps=1,
                folder=folder,
                validation=data,
                alone=True,
                outputs=outputs,
            )

        kind = "prediction" if outputs else "evaluation"
        run = runs.open_new(new_run_path(f"{self._settings.name}-{kind}"), make_job)
        note_run(run.root)
        view = make_forward_view() if self._shows else NoView()
        relay = Relay(self, [], view=view, steps_per_epoch=None)
        try:
            outcome, supervisor = runs.follow(run, view=relay, fresh=True)
        finally:
            relay.close()
        runs.raise_failure(outcome, run=run, supervisor=supervisor)
        if outcome.interrupts:
            raise KeyboardInterrupt
        return run, relay

    def export(
        self,
        directory: str | Path,
        *,
        format: Literal["hf", "weights"] = "hf",
    ) -> None:
        """Write the model, with the weights that it has now, for other programs.

        Args:
            directory: where to.
            format: `hf`: `config.json` and safetensors that `from_pretrained` loads; `weights`:
                `model.safetensors` with the names of the `state_dict`.

        Raises:
            InputError: `hf`, and the model is none of `transformers`.
        """
        export_model(self.model, Path(directory), kind=format)

    def save(self, path: str | Path) -> Path:
        """Copy the last checkpoint of the last fit: weights, optimizer, position in the data.

        Args:
            path: folder for it, made if need be.

        Returns:
            The checkpoint's own folder in it.

        Raises:
            InputError: no fit has been made.
            CheckpointError: the place is taken, or the disk refused.
        """
        if self.run_dir is None:
            raise InputError(
                "save(): no fit has been made, so there is nothing but the weights",
                remedy="torch.save(model.state_dict(), ...) keeps those",
            )
        return copy_checkpoint(find_checkpoint(self.run_dir), Path(path))

    def load(self, path: str | Path) -> int:
        """Give the model the weights of a checkpoint. `fit(resume_from=path)` takes all of it.

        Args:
            path: a run directory, what `save` wrote, or a checkpoint.

        Returns:
            The step that they are of.

        Raises:
            CheckpointError: there is none, it is damaged, or of another model.
        """
        found = find_checkpoint(Path(path))
        load_weights(self.model, found)
        return found.manifest.step

    def _resumable(self, path: Path, *, data: Data, last_step: int) -> Found:
        if not data.can_resume:
            raise InputError(
                f"resume_from={str(path)!r}: {data.source.description} has no state_dict() and "
                "load_state_dict(), so it cannot go on where it stopped",
                remedy="add both to it, give a dataset with len() and [index], or start a new run from the "
                "weights: trainer.load()",
            )
        found = find_checkpoint(path)
        if found.manifest.step >= last_step:
            raise InputError(
                f"resume_from={str(path)!r} is at step {found.manifest.step}, and {last_step} step(s) are "
                "asked for",
                remedy="give more epochs or max_steps: they count from the very beginning",
            )
        return found

    def stop(self) -> None:
        """End the fit in work after its step, with a checkpoint; from a callback or another thread."""
        if self.run_dir is None:
            raise InputError(
                "stop(): no fit has begun", remedy="call it from a callback of fit()"
            )
        request(RunDirectory(self.run_dir), kind="stop", checkpoint=True)

    def _follow(self, run: RunDirectory, *, data: Data, view: NoView, fresh: bool) -> FitResult:
        self.run_dir = run.root
        relay = Relay(self, self._callbacks, view=view, steps_per_epoch=data.steps_per_epoch)
        for callback in self._callbacks:
            callback.on_start(self)
        try:
            outcome, supervisor = runs.follow(run, view=relay, fresh=fresh)
        finally:
            relay.close()
        if relay.error is not None:
            raise relay.error
        runs.raise_failure(outcome, run=run, supervisor=supervisor)
        status = outcome.status or {}
        if int(status.get("step") or 0):
            self._take_weights(run)
        result = FitResult(
            run_dir=run.root,
            state=str(status.get("state")),
            step=int(status.get("step") or 0),
            losses=tuple(loss for _, loss in sorted(relay.losses.items())),
            val_losses=dict(relay.val_losses),
            report=read_json(run.report) if run.report.is_file() else {},
        )
        if outcome.interrupts:
            raise KeyboardInterrupt
        for callback in self._callbacks:
            callback.on_end(self, result)
        return result

    def _take_weights(self, run: RunDirectory) -> None:
        """Put the newest checkpoint's weights, and the routers they were trained with, into the model."""
        if self._settings.elb:
            job = load_job(run.job)
            configure_routers(self.model, job.elb, devices=job.parallel.expert)
        load_weights(self.model, find_checkpoint(run.root))


def _with_precision(
    settings: Mapping[str, Mapping[str, Any]], model: torch.nn.Module | DeepModel
) -> Mapping[str, Mapping[str, Any]]:
    """The settings with what a model was converted to compute in, so that the job says it."""
    given = settings.get("precision", {})
    if not isinstance(model, DeepModel) or model.fp8 is None or "fp8" in given:
        return settings
    fp8 = {"fp8": "blockwise", "fp8_include": list(model.fp8.taken)}
    return {**settings, "precision": {**given, **fp8}}


def _num_steps(data: Data, *, epochs: int, max_steps: int | None) -> int:
    given: dict[str, Any] = {"epochs": epochs, "max_steps": max_steps}
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"{name} is {value!r}", remedy="give a whole number from 1")
    if data.steps_per_epoch is not None:
        total = epochs * data.steps_per_epoch
        return total if max_steps is None else min(total, max_steps)
    if max_steps is None:
        raise InputError(
            "the dataset is a stream without len(), so it cannot be known how many steps "
            f"{epochs} epoch(s) are",
            remedy="give max_steps=",
        )
    return max_steps
