"""`convert_to_deepopt`: a model in hand becomes a chain of layers that can be looked at, cut and run."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch

from deepopt.convert.chain import Chain, chain_of_named, chain_of_recorded, named_layers
from deepopt.convert.fp8_linears import NONE, Fp8Choice, grouped, set_fp8_linears
from deepopt.convert.programs import record_as_trained
from deepopt.convert.split import split
from deepopt.convert.structure import leaves
from deepopt.errors import InputError
from deepopt.moe.configure import configure_routers
from deepopt.moe.elb_config import map_elb_config
from deepopt.moe.elb_router import ElbRouter
from deepopt.pipeline.transport import TensorSpec

logger = logging.getLogger(__name__)

ParallelMode = Literal["bi_stream", "mirror", "v", "line", "auto"]
Fp8 = Literal["none", "blockwise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeepLayer:
    """One layer of a converted model.

    Args:
        name: path of its module in the model.
        kind: class name of that module.
        parameters: names in the model's `state_dict`.
        num_parameters: elements; those of tied parameters count where they are first used.
        forward_flops: floating-point operations of one forward with the example inputs (matrix
            products, convolutions, attention); None without example inputs.
        alive: the tensors that a cut before this layer carries; None without example inputs.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    num_parameters: int
    forward_flops: int | None
    alive: tuple[TensorSpec, ...] | None

    @property
    def cut_bytes(self) -> int | None:
        """Bytes that a cut before this layer carries forward for one micro-batch."""
        if self.alive is None:
            return None
        return sum(torch.Size(t.shape).numel() * t.dtype.itemsize for t in self.alive)


class DeepModel:
    """A model as a chain of layers; made by `convert_to_deepopt`.

    Args:
        chain: the model and its layers; shared with the model, not copied.
        layers: what there is to know of each.
        placement: of the stages, as `pipeline.placement` of a job names it.
        fp8: which of its linear maps compute in FP8; None where it was not asked for.
    """

    def __init__(
        self,
        *,
        chain: Chain,
        layers: tuple[DeepLayer, ...],
        placement: str,
        fp8: Fp8Choice | None = None,
    ) -> None:
        self.chain = chain
        self.fp8 = fp8
        self.layers = layers
        self.placement = placement

    @property
    def model(self) -> torch.nn.Module:
        """The model as it was given; training the chain trains it."""
        return self.chain.model

    def state_dict(self) -> dict[str, Any]:
        """The model's own."""
        return self.chain.model.state_dict()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run layer after layer, each given only what a cut before it carries.

        Args:
            args: as the model takes them, of the example inputs' shapes.
            kwargs: as the model takes them.

        Returns:
            What the model returns.
        """
        values = tuple(x for x in leaves((args, kwargs)) if isinstance(x, torch.Tensor))
        output: Any = None
        for layer in self.chain.layers:
            output = layer.module(*values)
            values = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        return output if self.chain.programs is None else values[0]


def convert_to_deepopt(
    model: torch.nn.Module,
    parallel_mode: ParallelMode = "bi_stream",
    example_inputs: Any = None,
    *,
    elb_config: Mapping[str, Any] | None = None,
    fp8: Fp8 = "none",
    fp8_include: Sequence[str] | None = None,
    fp8_exclude: Sequence[str] = (),
) -> DeepModel:
    """Turn a model into a chain of layers, without changing it; only `elb_config` and `fp8` do.

    Args:
        model: any module. An `nn.Sequential` and a model with `deepopt_layers()` name their layers;
            of any other one forward is recorded in train mode.
        parallel_mode: `bi_stream` (the same as `mirror`), `v`, `line` or `auto`.
        example_inputs: what one micro-batch gives to the forward: a tensor, a tuple of positional
            arguments, or a dict of keyword arguments; of the shapes and dtypes of training. None: the
            model's own `dummy_inputs`, or a small one for `torch.nn.Transformer`.
        elb_config: `{"alpha": 0.3, "monitor_freq": 100}`: put an `ElbRouter` in the place of each router of
            a mixture of experts, in the model itself, under the same names (docs/elb.md). In a loop of
            your own, call `update()` of each before the optimizer's step.
        fp8: `blockwise`: let `nn.Linear`s of the model itself compute in FP8, under the same names
            (docs/fp8.md); `DeepTrainer` trains it so. `none`: leave them as they are.
        fp8_include: patterns of those that do; None: those in repeated blocks.
        fp8_exclude: patterns of those that do not.

    Raises:
        InputError: an argument is wrong, or the forward cannot be cut: says where and why.
    """
    if parallel_mode not in get_args(ParallelMode):
        raise InputError(
            f"parallel_mode {parallel_mode!r} is unknown",
            remedy=f"one of {', '.join(get_args(ParallelMode))}",
        )
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    placement = "mirror" if parallel_mode == "bi_stream" else parallel_mode
    if elb_config is not None:
        _balance_experts(model, elb_config)
    choice = _set_fp8(model, fp8, include=fp8_include, exclude=fp8_exclude)
    named = named_layers(model)
    if named is not None:
        chain = chain_of_named(model, named)
        return DeepModel(
            chain=chain, layers=_layers(chain, None), placement=placement, fp8=choice
        )
    args, kwargs = _example(model, example_inputs)
    recording = record_as_trained(model, args=args, kwargs=kwargs)
    chain = chain_of_recorded(model, split(recording))
    for module in model.modules():
        if isinstance(module, ElbRouter):  # the recorded forward was no training
            module.discard_counts()
    specs = [TensorSpec(v.shape, v.dtype, v.requires_grad) for v in recording.values]
    return DeepModel(chain=chain, layers=_layers(chain, specs), placement=placement, fp8=choice)


def _balance_experts(model: torch.nn.Module, elb_config: Mapping[str, Any]) -> None:
    mapped = map_elb_config(elb_config)
    elb = mapped.elb
    for line in mapped.lines:
        logger.info("%s", line)
    if not configure_routers(model, elb, devices=1) and elb.mode != "none":
        raise InputError(
            f"elb_config is given, but {type(model).__name__} has no router of a mixture of experts that "
            "is known",
            remedy="leave elb_config out, or use deepopt.moe.ElbRouter in the model",
        )


def _set_fp8(
    model: torch.nn.Module,
    fp8: str,
    *,
    include: Sequence[str] | None,
    exclude: Sequence[str],
) -> Fp8Choice | None:
    if fp8 not in get_args(Fp8):
        raise InputError(f"fp8 {fp8!r} is unknown", remedy=f"one of {', '.join(get_args(Fp8))}")
    for key, patterns in (("fp8_include", include), ("fp8_exclude", exclude)):
        if isinstance(patterns, str):
            raise InputError(f"{key} is a string", remedy=f"give a list: [{patterns!r}]")
        if patterns and fp8 == NONE:
            raise InputError(
                f"{key} names linear maps for FP8, and fp8 is {NONE}",
                remedy="give fp8='blockwise', or leave the patterns out",
            )
    if fp8 == NONE:
        return None
    choice = set_fp8_linears(model, include=include, exclude=exclude)
    left = f"; not: {', '.join(grouped(choice.left))}" if choice.left else ""
    logger.info("%d linear maps compute in FP8%s", len(choice.taken), left)
    return choice


def _layers(chain: Chain, specs: Sequence[TensorSpec] | None) -> tuple[DeepLayer, ...]:
    layers = []
    for index, layer in enumerate(chain.layers):
        parameters = layer.parameters(remove_duplicate=False)
        programs = chain.programs
        alive = None
        if programs is not None and specs is not None:
            alive = tuple(specs[value] for value in programs[index].takes)
        layers.append(
            DeepLayer(
                name=layer.name,
                kind=layer.kind,
                parameters=tuple(n for n in parameters if n not in layer.repeated),
                num_parameters=sum(
                    p.numel() for n, p in parameters.items() if n not in chain.ties
                ),
                forward_flops=layer.flops,
                alive=alive,
            )
        )
    return tuple(layers)


def _example(model: torch.nn.Module, given: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if given is None:
        given = getattr(model, "dummy_inputs", None)
    if given is None and isinstance(model, torch.nn.Transformer):
        given = _transformer_example(model)
    if given is None:
        raise InputError(
            f"a {type(model).__name__} does not name its layers, so one forward of it must be seen",
            remedy="give example_inputs: a tensor, a tuple, or a dict of keyword arguments",
        )
    if isinstance(given, Mapping):
        return (), dict(given)
    return (tuple(given), {}) if isinstance(given, tuple | list) else ((given,), {})


def _transformer_example(model: torch.nn.Transformer) -> dict[str, torch.Tensor]:
    parameter = next(model.parameters())
    shapes = {"src": (10, 2), "tgt": (10, 2)}  # positions, samples
    if model.batch_first:
        shapes = {name: (samples, length) for name, (length, samples) in shapes.items()}
    return {
        name: torch.zeros(*shape, model.d_model, dtype=parameter.dtype, device=parameter.device)
        for name, shape in shapes.items()
    }
