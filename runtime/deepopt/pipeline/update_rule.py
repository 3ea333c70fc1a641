"""Which optimizer updates the layers of a job, and at which rate in each step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch

from deepopt.config import OptimizerConfig
from deepopt.errors import InputError
from deepopt.import_path import import_object
from deepopt.pipeline.learning_rate import learning_rate
from deepopt.pipeline.optimizer import AdamWOptimizer, LayerOptimizer
from deepopt.pipeline.stage import Layer

if TYPE_CHECKING:
    from deepopt.pipeline.torch_optimizer import TorchOptimizer

_NOT_SETTINGS = ("params", "param_names")  # of a parameter group


class UpdateRule(Protocol):
    """Makes the optimizers of layers and keeps their rates, which are a function of the step."""

    def optimizer(self, layer: Layer) -> LayerOptimizer:
        """A new optimizer of a layer."""
        ...

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1, for reports; from now on updates are those of it."""
        ...


def make_rule(config: OptimizerConfig) -> UpdateRule:
    """The rule of a job's optimizer section.

    Raises:
        InputError: an import path does not lead to something that can be called.
    """
    return AdamWRule(config) if config.factory is None else TorchRule(config)


class AdamWRule:
    """AdamW with warm-up and decay.

    Args:
        config: the job's optimizer section.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        self._config = config

    def optimizer(self, layer: Layer) -> LayerOptimizer:
        """A new optimizer of a layer."""
        return AdamWOptimizer(layer, self._config)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1."""
        return learning_rate(step, self._config)


@dataclass(slots=True, kw_only=True)
class _Kind:
    """Optimizers with the same settings: one has the scheduler, the others follow it."""

    settings: list[dict[str, Any]]
    leader: torch.optim.Optimizer
    scheduler: Any
    followers: list[torch.optim.Optimizer]


class TorchRule:
    """Any optimizer of torch, with a scheduler of torch or at constant rates.

    A scheduler is a function of the step here: after a resume it is stepped as often as before.

    Args:
        config: the job's optimizer section; names a factory.

    Raises:
        InputError: an import path does not lead to something that can be called.
    """

    def __init__(self, config: OptimizerConfig) -> None:
        assert config.factory is not None, "a rule of torch without a factory"
        self._name = _last_name(config.factory)
        self._factory = _callable(config.factory, "optimizer.factory", config.kwargs)
        self._scheduler_name = _last_name(config.scheduler or "")
        self._scheduler: Callable[..., Any] | None = None
        if config.scheduler is not None:
            self._scheduler = _callable(
                config.scheduler, "optimizer.scheduler", config.scheduler_kwargs
            )
        self._kinds: list[_Kind] = []
        self._step = 1

    def optimizer(self, layer: Layer) -> TorchOptimizer:
        """A new optimizer of a layer.

        Raises:
            InputError: the factory fails, or leaves a parameter out.
        """
        from deepopt.pipeline.torch_optimizer import TorchOptimizer

        made = TorchOptimizer(layer, self._factory, name=self._name)
        if made.optimizer is not None:
            self._enrol(made.optimizer)
        return made

    def check(self, parameters: Mapping[str, torch.nn.Parameter]) -> None:
        """Make an optimizer and its scheduler once, and forget both.

        Args:
            parameters: by name; at least one. They stay as they are.

        Raises:
            InputError: as `optimizer`, or the scheduler fails.
        """
        from deepopt.pipeline.torch_optimizer import make_optimizer

        made = make_optimizer(self._factory, parameters, name=self._name)
        if self._scheduler is not None:
            self._make_scheduler(made)

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 1; from now on updates are those of it."""
        if not self._kinds:
            return 0.0  # nothing to train here
        if step < self._step:
            self._begin_again()
        with warnings.catch_warnings():
            # After a resume it is stepped before the first update.
            warnings.filterwarnings(
                "ignore", message=r"Detected call of `lr_scheduler\.step\(\)`"
            )
            while self._step < step and self._scheduler is not None:
                for kind in self._kinds:
                    kind.scheduler.step()
                self._step += 1
        self._step = step
        for kind in self._kinds:
            for follower in kind.followers:
                _follow(kind.leader, follower)
        return float(self._kinds[0].leader.param_groups[0]["lr"])

    def _begin_again(self) -> None:
        """Bring all rates to those of step 1."""
        self._step = 1
        for kind in self._kinds:
            for group, settings in zip(kind.leader.param_groups, kind.settings, strict=True):
                group.pop("initial_lr", None)
                group.update(settings)
            if self._scheduler is not None:
                kind.scheduler = self._make_scheduler(kind.leader)

    def _enrol(self, optimizer: torch.optim.Optimizer) -> None:
        """Let a scheduler set the rates of an optimizer; late ones are brought to the present step."""
        settings = [
            {key: value for key, value in group.items() if key not in _NOT_SETTINGS}
            for group in optimizer.param_groups
        ]
        for kind in self._kinds:
            if repr(kind.settings) == repr(settings):
                kind.followers.append(optimizer)
                _follow(kind.leader, optimizer)
                return
        scheduler = None
        if self._scheduler is not None:
            scheduler = self._make_scheduler(optimizer)
        self._kinds.append(
            _Kind(settings=settings, leader=optimizer, scheduler=scheduler, followers=[])
        )

    def _make_scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        assert self._scheduler is not None, "a scheduler that nobody asked for"
        try:
            scheduler = self._scheduler(optimizer)
        except Exception as error:  # the user's code may raise anything
            raise InputError(
                f"optimizer.scheduler: {self._scheduler_name} raised {type(error).__name__}: {error}",
                remedy="it is called with the optimizer of a layer, which has the parameter groups "
                "that the factory makes",
            ) from error
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise InputError(
                "optimizer.scheduler: ReduceLROnPlateau waits for a metric; here a rate is a function "
                "of the step alone",
                remedy="take another one of torch.optim.lr_scheduler",
            )
        if not callable(getattr(scheduler, "step", None)):
            raise InputError(
                f"optimizer.scheduler: {self._scheduler_name} returned a {type(scheduler).__name__} "
                "without step()",
                remedy="return one of torch.optim.lr_scheduler",
            )
        return scheduler


def _follow(leader: torch.optim.Optimizer, follower: torch.optim.Optimizer) -> None:
    for source, target in zip(leader.param_groups, follower.param_groups, strict=True):
        target.update({k: v for k, v in source.items() if k not in _NOT_SETTINGS})


def _callable(path: str, field: str, kwargs: dict[str, Any]) -> Callable[..., Any]:
    found = import_object(path, field=field)
    if not callable(found):
        raise InputError(
            f"{field}: {path} is not callable", remedy="name a class or a function"
        )
    return partial(found, **kwargs)


def _last_name(path: str) -> str:
    return path.rpartition(":")[2]
