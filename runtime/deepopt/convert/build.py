"""From a job to its chain: described without memory, or built where it will train."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from deepopt.config import JobConfig
from deepopt.convert.chain import (
    Chain,
    ChainLayer,
    chain_of_named,
    chain_of_recorded,
    evaluate_recorded,
    named_layers,
)
from deepopt.convert.example import example_of
from deepopt.convert.factory import build_model, set_precision
from deepopt.convert.fp8_linears import check_device, fp8_weights
from deepopt.convert.loss import find_loss
from deepopt.convert.programs import record_as_trained
from deepopt.convert.split import LayerProgram, split
from deepopt.errors import InputError
from deepopt.pipeline.randomness import name_seed
from deepopt.pipeline.stage import Layer, Loss
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton


def describe(job: JobConfig) -> ModelSkeleton:
    """The skeleton of the job's model, built on the meta device: no memory, no random numbers.

    Raises:
        InputError: the factory fails, or the model cannot be a chain of layers.
    """
    chain = build_chain(job, device="meta")
    parameters = list(chain.model.parameters())
    if parameters and not any(p.requires_grad for p in parameters):
        raise InputError(
            f"model.factory: nothing to train: all {len(parameters)} parameters of "
            f"{job.model.factory} are frozen",
            remedy="let some of them require gradients, for example an adapter or the head",
        )
    tokens = 1 if chain.programs is None else example_of(job).tokens
    fp8 = set_precision(chain.model, job.precision)
    return ModelSkeleton(
        factory=job.model.factory,
        kwargs=dict(job.model.kwargs),
        layers=tuple(
            _layer_skeleton(chain, layer, job=job, tokens=tokens) for layer in chain.layers
        ),
        not_fp8={} if fp8 is None else fp8.left,
    )


def build_chain(job: JobConfig, *, device: str) -> Chain:
    """The job's model as a chain.

    A model that does not name its layers is recorded with inputs as the job's data gives them; one
    whose layers cannot run without memory (routing that depends on values) is built once for it.

    Args:
        job: names the factory and its arguments.
        device: `meta` for the structure alone, `cpu` for real values.

    Raises:
        InputError: the factory fails, or the model cannot be a chain of layers.
    """
    model = build_model(job, device=device)
    layers = named_layers(model)
    if layers is not None:
        return chain_of_named(model, layers)
    chain = chain_of_recorded(model, _programs(job, model, training=True))
    _freeze_unused(chain)
    return chain


def build_layers(
    job: JobConfig, indices: Sequence[int], *, device: torch.device
) -> tuple[list[Layer], Loss]:
    """Build and initialise some layers of the job's model; every worker gets the same values.

    Args:
        job: model, seed and precision.
        indices: which layers of the chain.
        device: where they shall live; `meta`: no value is made, so that a layer may be larger than this
            host's memory.

    Returns:
        The layers in the order asked for, and the loss. Tied weights are parameters of their
        own here, with equal values; `Layer.tied` tells.

    Raises:
        ClusterError: the device is a GPU that has not the products of `precision.fp8`.
    """
    meta = build_chain(job, device="meta")
    if fp8_weights(meta.model):
        check_device(device)
    if device.type == "meta":
        chain = meta
        modules = {i: own_module(meta, i) for i in indices}
    elif getattr(meta.model, "deepopt_layerwise_init", False):
        chain = meta
        modules = {i: _initialise(meta, i, job.training.seed, device) for i in indices}
        for i in indices:
            _share_initial_values(meta, i, modules[i], job=job, device=device)
    else:
        torch.manual_seed(job.training.seed)
        chain = _real_chain(job, meta)
        if job.evaluation.is_wanted and chain.programs is not None:
            evaluate_recorded(chain, _programs(job, meta.model, training=False))
        modules = {i: own_module(chain, i) for i in indices}
        for module in modules.values():
            module.to(device)
    loss = find_loss(job, chain.model)
    return [_make_layer(meta, i, modules[i], job) for i in indices], loss


def _real_chain(job: JobConfig, meta: Chain) -> Chain:
    model = build_model(job, device="cpu")
    if meta.programs is None:
        layers = named_layers(model)
        assert layers is not None, "the same factory named its layers before"
        return chain_of_named(model, layers)
    chain = chain_of_recorded(model, meta.programs)
    _freeze_unused(chain)
    return chain


def _programs(
    job: JobConfig, model: torch.nn.Module, *, training: bool
) -> tuple[LayerProgram, ...]:
    """What the layers of a model do; one that cannot run without memory is built once for it."""
    example = example_of(job)

    def recorded(recordable: torch.nn.Module) -> tuple[LayerProgram, ...]:
        recording = record_as_trained(
            recordable,
            args=example.args,
            kwargs=example.kwargs,
            dtype=torch.bfloat16 if job.precision.dtype == "bfloat16" else None,
            training=training,
        )
        return split(recording)

    try:
        return recorded(model)
    except InputError:
        if not any(p.is_meta for p in model.parameters()):
            raise
        return recorded(build_model(job, device="cpu"))


def _freeze_unused(chain: Chain) -> None:
    """No gradient reaches them, so the optimizer shall not see them either."""
    for name in chain.unused:
        chain.model.get_parameter(name).requires_grad_(False)


def _layer_skeleton(
    chain: Chain, layer: ChainLayer, *, job: JobConfig, tokens: int
) -> LayerSkeleton:
    return LayerSkeleton(
        name=layer.name,
        kind=layer.kind,
        parameters=parameter_skeletons(chain, layer),
        buffers=tuple(layer.buffers()),
        forward_flops_per_token=_flops(layer, job=job, tokens=tokens),
    )


def parameter_skeletons(chain: Chain, layer: ChainLayer) -> tuple[ParameterSkeleton, ...]:
    """The parameters of a layer as plain data.

    Duplicates inside a layer are kept: they are names of the model's state_dict, too.

    Args:
        chain: the model.
        layer: of it.
    """
    fp8 = fp8_weights(layer.module)
    return tuple(
        ParameterSkeleton(
            name=name,
            shape=tuple(p.shape),
            dtype=str(p.dtype).removeprefix("torch."),
            tied_to=chain.ties.get(name),
            requires_grad=p.requires_grad,
            in_state_dict=name not in layer.repeated,
            fp8=id(p) in fp8,
        )
        for name, p in layer.parameters(remove_duplicate=False).items()
    )


def _flops(layer: ChainLayer, *, job: JobConfig, tokens: int) -> float:
    if layer.flops is not None:
        return layer.flops / tokens
    own = getattr(layer.module, "forward_flops_per_token", None)
    if callable(own):
        return float(own(job.data.sequence_length))
    # A matrix costs a multiplication and an addition an element and token; a table look-up
    # costs nothing.
    return 2.0 * sum(
        p.numel()
        for part in layer.module.modules()
        if not isinstance(part, torch.nn.Embedding)
        for p in part.parameters(recurse=False)
        if p.dim() >= 2
    )


def with_empty_memory(module: torch.nn.Module) -> torch.nn.Module:
    """Give a module without memory some on the CPU, as `module.to_empty(device="cpu")` does.

    That asks the meta device about each tensor, which imports sympy: a third of a second of CPU time.

    Args:
        module: changed in place.
    """

    def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_contiguous():
            return torch.empty(tensor.size(), dtype=tensor.dtype, device="cpu")
        return torch.empty_like(tensor, device="cpu")

    apply: Any = module._apply  # not annotated
    apply(on_cpu)
    return module


def _initialise(chain: Chain, index: int, seed: int, device: torch.device) -> torch.nn.Module:
    """A layer with real memory and the values that its own seed gives."""
    layer = chain.layers[index]
    module = with_empty_memory(copy.deepcopy(layer.module))
    locals_ = {name: local for local, name in layer.names.items()}
    for name in layer.parameters(remove_duplicate=False):
        # empty memory undoes ties inside a layer
        if name in chain.ties and not chain.is_tied_elsewhere(name, index):
            first = module.get_parameter(locals_[chain.ties[name]])
            _set_parameter(module, locals_[name], first)
    torch.manual_seed(name_seed(seed, layer.name))
    reset = getattr(module, "reset_parameters", None)
    if not callable(reset):
        raise InputError(
            f"model.factory: layer {layer.name} ({layer.kind}) has no reset_parameters(), "
            "but the model sets deepopt_layerwise_init",
            remedy="give every layer a reset_parameters() that initialises all of it, or leave "
            "deepopt_layerwise_init out",
        )
    reset()
    return module.to(device)


def _share_initial_values(
    chain: Chain, index: int, module: torch.nn.Module, *, job: JobConfig, device: torch.device
) -> None:
    """Give tied parameters the values that their first uses start with."""
    layer = chain.layers[index]
    for local, name in layer.names.items():
        if not chain.is_tied_elsewhere(name, index):
            continue
        source = chain.ties[name]
        owner = chain.owners[source]
        first = _initialise(chain, owner, job.training.seed, device)
        locals_ = {full: own for own, full in chain.layers[owner].names.items()}
        with torch.no_grad():
            module.get_parameter(local).copy_(first.get_parameter(locals_[source]))


def own_module(chain: Chain, index: int) -> torch.nn.Module:
    """A layer's module; a copy where it shares parameters with an earlier layer: each layer
    keeps its own.

    Args:
        chain: the model, with values.
        index: of the layer.
    """
    layer = chain.layers[index]
    tied = [
        local for local, name in layer.names.items() if chain.is_tied_elsewhere(name, index)
    ]
    if not tied:
        return layer.module
    module = copy.deepcopy(layer.module)  # layers may share a module, not only its parameters
    for local in tied:
        shared = module.get_parameter(local)
        copied = torch.nn.Parameter(shared.detach().clone(), shared.requires_grad)
        _set_parameter(module, local, copied)
    return module


def _set_parameter(module: torch.nn.Module, local: str, value: torch.nn.Parameter) -> None:
    owner, _, attribute = local.rpartition(".")
    setattr(module.get_submodule(owner), attribute, value)


def _make_layer(chain: Chain, index: int, module: torch.nn.Module, job: JobConfig) -> Layer:
    layer = chain.layers[index]
    frozen = {}
    if job.precision.dtype == "bfloat16":
        for local, parameter in module.named_parameters():
            if not parameter.requires_grad and parameter.dtype.itemsize > 2:
                value = parameter.detach()
                frozen[layer.names[local]] = value if value.is_meta else value.cpu()
            # Buffers keep their type: tables of angles need it.
            parameter.data = parameter.data.to(torch.bfloat16)
    parameters = {layer.names[local]: p for local, p in module.named_parameters()}
    return Layer(
        index=index,
        name=layer.name,
        module=module.train(),
        parameters=parameters,
        tied={name: chain.ties[name] for name in parameters if name in chain.ties},
        buffers=layer.buffers(module),
        frozen=frozen,
    )
