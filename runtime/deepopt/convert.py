"""From a model factory to a chain of layers: described without memory, or built where it will
train.

A model says what its layers are by being an `nn.Sequential`, or by `deepopt_layers()`, which
gives (name, module) pairs in the order of the forward, each name the module's path in the
model. Optional on the model: `loss(output, targets)`; `deepopt_layerwise_init = True`: every
layer has `reset_parameters()`, which initialises all of it, so that a worker builds only its
own layers. Optional on a layer: `forward_flops_per_token(sequence_length)`.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from deepopt.config import JobConfig
from deepopt.errors import DeepoptError, InputError
from deepopt.import_path import import_object
from deepopt.pipeline.randomness import name_seed
from deepopt.pipeline.stage import Layer, Loss
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Chain:
    """A model and its layers in the order of the forward.

    Args:
        model: as the factory gave it.
        layers: (name, module) pairs.
        ties: name of a parameter -> name of the earlier layer's parameter that is the same
            object.
    """

    model: torch.nn.Module
    layers: tuple[tuple[str, torch.nn.Module], ...]
    ties: dict[str, str]


def describe(job: JobConfig) -> ModelSkeleton:
    """The skeleton of the job's model, built on the meta device: no memory, no random numbers.

    Raises:
        InputError: the factory fails, or the model is not a chain of layers.
    """
    return _skeleton(job, build_chain(job, device="meta"))


def build_chain(job: JobConfig, *, device: str) -> Chain:
    """Call the model factory.

    Args:
        job: names the factory and its arguments.
        device: `meta` for the structure alone, `cpu` for real values.

    Raises:
        InputError: the factory fails, or the model is not a chain of layers.
    """
    factory = import_object(job.model.factory, field="model.factory")
    try:
        with torch.device(device), _NoRandomFill() if device == "meta" else nullcontext():
            model = factory(**job.model.kwargs)
    except DeepoptError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"model.factory: {job.model.factory} raised {type(error).__name__}: {error} "
            f"({frame.filename}:{frame.lineno})",
            remedy=f"check model.kwargs ({dict(job.model.kwargs)}); the factory must also work "
            "under torch.device('meta')",
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"model.factory: {job.model.factory} returned {type(model).__name__}, "
            "not a torch.nn.Module"
        )
    layers = _layers_of(model, job.model.factory)
    return Chain(model, layers, _find_ties(layers))


def find_loss(job: JobConfig, model: torch.nn.Module) -> Loss:
    """The loss of (output, targets): `model.loss` of the job, else of the model, else
    cross-entropy.

    Raises:
        InputError: the import path does not lead to a callable.
    """
    if job.model.loss is not None:
        loss: Callable[..., torch.Tensor] = import_object(job.model.loss, field="model.loss")
        if not callable(loss):
            raise InputError(f"model.loss: {job.model.loss} is not callable")
        return loss
    own = getattr(model, "loss", None)
    return own if callable(own) else _cross_entropy


def build_layers(
    job: JobConfig, indices: Sequence[int], *, device: torch.device
) -> tuple[list[Layer], Loss]:
    """Build and initialise some layers of the job's model; every worker gets the same values.

    Args:
        job: model, seed and precision.
        indices: which layers of the chain.
        device: where they shall live.

    Returns:
        The layers in the order asked for, and the loss. Tied weights are parameters of their
        own here, with equal values; `Layer.tied` tells.
    """
    meta = build_chain(job, device="meta")
    if getattr(meta.model, "deepopt_layerwise_init", False):
        chain = meta
        modules = {i: _initialise(meta, i, job.training.seed, device) for i in indices}
        for i in indices:
            for local, full in _parameter_names(meta, i):
                source = meta.ties.get(full)
                if source is not None and not _within(source, meta.layers[i][0]):
                    _share_initial_value(meta, modules[i], local, source, job, device)
    else:
        torch.manual_seed(job.training.seed)
        chain = build_chain(job, device="cpu")
        modules = {i: _own_module(chain, i) for i in indices}
        for module in modules.values():
            module.to(device)
    loss = find_loss(job, chain.model)
    return [_make_layer(meta, i, modules[i], job) for i in indices], loss


def _skeleton(job: JobConfig, chain: Chain) -> ModelSkeleton:
    layers = []
    for name, module in chain.layers:
        # Duplicates inside a layer are kept: they are names of the model's state_dict, too.
        parameters = tuple(
            ParameterSkeleton(
                name=full,
                shape=tuple(p.shape),
                dtype=str(p.dtype).removeprefix("torch."),
                tied_to=chain.ties.get(full),
                requires_grad=p.requires_grad,
            )
            for full, p in _named(name, module.named_parameters(remove_duplicate=False))
        )
        persistent = {f"{name}.{key}" for key in module.state_dict()}
        buffers = tuple(
            full for full, _ in _named(name, module.named_buffers()) if full in persistent
        )
        layers.append(
            LayerSkeleton(
                name=name,
                kind=type(module).__name__,
                parameters=parameters,
                buffers=buffers,
                forward_flops_per_token=_flops(module, job.data.sequence_length),
            )
        )
    return ModelSkeleton(
        factory=job.model.factory, kwargs=dict(job.model.kwargs), layers=tuple(layers)
    )


def _flops(module: torch.nn.Module, sequence_length: int) -> float:
    own = getattr(module, "forward_flops_per_token", None)
    if callable(own):
        return float(own(sequence_length))
    # A matrix costs a multiplication and an addition an element and token; a table look-up
    # costs nothing.
    return 2.0 * sum(
        p.numel()
        for part in module.modules()
        if not isinstance(part, torch.nn.Embedding)
        for p in part.parameters(recurse=False)
        if p.dim() >= 2
    )


def _layers_of(model: torch.nn.Module, factory: str) -> tuple[tuple[str, torch.nn.Module], ...]:
    own = getattr(model, "deepopt_layers", None)
    if callable(own):
        layers = tuple(own())
    elif isinstance(model, torch.nn.Sequential):
        # named_children() would leave out a module that stands at a second place.
        layers = tuple((name, model.get_submodule(name)) for name in model._modules)
    else:
        raise InputError(
            f"model.factory: {factory} returned a {type(model).__name__}, which does not say "
            "what its layers are",
            remedy="return an nn.Sequential, or give the model a method deepopt_layers() that "
            "returns (name, module) pairs in the order of the forward",
        )
    if not layers:
        raise InputError(f"model.factory: {factory} returned a model without layers")
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in layers:
        if modules.get(name) is not module:
            raise InputError(
                f"model.factory: deepopt_layers() names a layer {name!r}, "
                "but the model has no such module at that path"
            )
    held = {id(p) for _, module in layers for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if id(parameter) not in held:
            raise InputError(
                f"model.factory: parameter {name} belongs to none of the {len(layers)} layers",
                remedy="put it into one of the layers that deepopt_layers() returns",
            )
    return layers


def _find_ties(layers: Sequence[tuple[str, torch.nn.Module]]) -> dict[str, str]:
    first: dict[int, str] = {}
    ties = {}
    for layer, module in layers:
        for name, parameter in _named(layer, module.named_parameters(remove_duplicate=False)):
            source = first.setdefault(id(parameter), name)
            if source != name:
                ties[name] = source
    return ties


def _named(prefix: str, pairs: Iterable[tuple[str, _T]]) -> Iterator[tuple[str, _T]]:
    return ((f"{prefix}.{local}", value) for local, value in pairs)


def _parameter_names(chain: Chain, index: int) -> list[tuple[str, str]]:
    """(local name, full name) of each parameter of a layer, duplicates too."""
    layer, module = chain.layers[index]
    names = [local for local, _ in module.named_parameters(remove_duplicate=False)]
    return [(local, f"{layer}.{local}") for local in names]


def _within(parameter: str, layer: str) -> bool:
    return parameter.startswith(f"{layer}.")


def _initialise(chain: Chain, index: int, seed: int, device: torch.device) -> torch.nn.Module:
    """A layer with real memory and the values that its own seed gives."""
    name, module = chain.layers[index]
    module = copy.deepcopy(module).to_empty(device="cpu")
    for local, full in _parameter_names(chain, index):
        source = chain.ties.get(full)
        if source is not None and _within(
            source, name
        ):  # to_empty() undoes ties inside a layer
            _set_parameter(module, local, module.get_parameter(source.removeprefix(f"{name}.")))
    torch.manual_seed(name_seed(seed, name))
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise InputError(
            f"model.factory: layer {name} ({type(module).__name__}) has no reset_parameters(), "
            "but the model sets deepopt_layerwise_init",
            remedy="give every layer a reset_parameters() that initialises all of it, or leave "
            "deepopt_layerwise_init out",
        )
    reset()
    return module.to(device)


def _share_initial_value(
    chain: Chain,
    module: torch.nn.Module,
    local: str,
    source: str,
    job: JobConfig,
    device: torch.device,
) -> None:
    """Give a tied parameter the value that its first use starts with."""
    index = next(i for i, (layer, _) in enumerate(chain.layers) if _within(source, layer))
    first = _initialise(chain, index, job.training.seed, device)
    value = first.get_parameter(source.removeprefix(f"{chain.layers[index][0]}."))
    with torch.no_grad():
        module.get_parameter(local).copy_(value)


def _own_module(chain: Chain, index: int) -> torch.nn.Module:
    """A layer's module; a copy where it shares parameters with an earlier layer: each layer
    keeps its own."""
    layer, module = chain.layers[index]
    tied = [
        local
        for local, full in _parameter_names(chain, index)
        if full in chain.ties and not _within(chain.ties[full], layer)
    ]
    if not tied:
        return module
    module = copy.deepcopy(module)  # the layers may share a module, not only its parameters
    for local in tied:
        shared = module.get_parameter(local)
        copied = torch.nn.Parameter(shared.detach().clone(), shared.requires_grad)
        _set_parameter(module, local, copied)
    return module


def _set_parameter(module: torch.nn.Module, local: str, value: torch.nn.Parameter) -> None:
    owner, _, attribute = local.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)


def _make_layer(chain: Chain, index: int, module: torch.nn.Module, job: JobConfig) -> Layer:
    name = chain.layers[index][0]
    if job.precision.dtype == "bfloat16":
        for (
            parameter
        ) in module.parameters():  # buffers keep their type: tables of angles need it
            parameter.data = parameter.data.to(torch.bfloat16)
    parameters = dict(_named(name, module.named_parameters()))
    persistent = {f"{name}.{key}" for key in module.state_dict()}
    return Layer(
        index=index,
        name=name,
        module=module.train(),
        parameters=parameters,
        tied={n: chain.ties[n] for n in parameters if n in chain.ties},
        buffers={n: b for n, b in _named(name, module.named_buffers()) if n in persistent},
    )


class _NoRandomFill(TorchFunctionMode):
    """Leaves initial values out: on the meta device there are none to set.

    Not only to save the work: the first random fill of a meta tensor imports torch's compiler,
    which takes 1 to 3 s in every process.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        fills = func in _RANDOM_FILLS or (
            getattr(func, "__module__", "") == "torch.nn.init" and func.__name__.endswith("_")
        )
        if fills:
            tensor = args[0] if args else kwargs["tensor"]
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


_RANDOM_FILLS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("normal_", "uniform_", "exponential_", "bernoulli_", "log_normal_", "random_")
)


def _cross_entropy(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(output.flatten(0, -2).float(), targets.flatten())
