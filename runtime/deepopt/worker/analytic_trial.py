"""What layers would take on an accelerator that is not there: every operation counted on the `meta` device.

An operation takes the longer of its arithmetic at the peak and its memory traffic at the memory's rate, over
one efficiency; operations follow one another. FLOPs are those that `torch.utils.flop_counter` knows, traffic
is each tensor read and written once: no fusion, no cache. A layer that asks for
values (a router counts the tokens of its experts) runs once on the CPU, with random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from deepopt.config import JobConfig
from deepopt.convert import build_layers
from deepopt.datasets.batch_source import build_batch_source
from deepopt.datasets.samples import model_inputs
from deepopt.errors import PlanError
from deepopt.pipeline.stage import Layer, Loss, Tensors
from deepopt.planner.hardware import Accelerator
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.telemetry.flops import device_peak_flops
from deepopt.worker.calibrate import MOST_PARAMETERS, layer_kinds
from deepopt.worker.layer_trial import num_bytes

_META = torch.device("meta")
# AdamW in fp32 reads weight, gradient and two moments and writes all but the gradient.
_UPDATE_TRAFFIC_BYTES = 28.0
_LOOK_UPS = frozenset(
    {"embedding", "index_select", "gather", "index"}
)  # read rows, not the table
_NO_TRAFFIC = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What an accelerator reaches.

    Args:
        flops: arithmetic a second.
        bytes_per_s: of its memory.
    """

    flops: float
    bytes_per_s: float

    @classmethod
    def of(cls, accelerator: Accelerator, *, dtype: str, efficiency: float) -> Rates:
        """From the vendor's figures.

        Args:
            accelerator: the kind.
            dtype: of compute.
            efficiency: reached part, in (0, 1].

        Raises:
            PlanError: no such rate, or the efficiency is no part.
        """
        if not 0 < efficiency <= 1:
            raise PlanError(
                f"an efficiency of {efficiency:g} is no part of the peak",
                remedy="give more than 0 and at most 1",
            )
        peak = device_peak_flops(accelerator.device_name, dtype)
        if peak is None:
            raise PlanError(
                f"there is no peak rate of {accelerator.name} for {dtype}",
                remedy="set precision.dtype to bfloat16 or float32",
            )
        return cls(
            flops=peak * efficiency, bytes_per_s=accelerator.memory_bytes_per_s * efficiency
        )


class OperationCounter(TorchDispatchMode):
    """Adds up what the operations under it would take.

    Args:
        rates: of the accelerator.
    """

    def __init__(self, rates: Rates) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds: float = 0.0
        self.flops = 0.0
        self.traffic_bytes = 0.0
        self._rates = rates

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        packet = func._overloadpacket
        count = flop_registry.get(packet)
        flops = 0.0 if count is None else float(count(*args, **kwargs, out_val=result))
        moved = 0.0 if func.is_view else _traffic_bytes(packet.__name__, (args, kwargs), result)
        self.flops += flops
        self.traffic_bytes += moved
        self.seconds += max(flops / self._rates.flops, moved / self._rates.bytes_per_s)
        return result


def _traffic_bytes(name: str, arguments: object, result: object) -> float:
    if name in _NO_TRAFFIC:
        return 0.0
    # What is expanded is read once.
    read, written = (
        [
            min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
            for t in tree_leaves(tree)
            if isinstance(t, torch.Tensor)
        ]
        for tree in (arguments, result)
    )
    if name in _LOOK_UPS:
        read = [min(size, sum(written)) for size in read]
    return float(sum(read) + sum(written))


@dataclass(frozen=True, slots=True, kw_only=True)
class AnalyticTrial:
    """What one layer would take for a micro-batch.

    Args:
        forward_s: F.
        input_s: I.
        weight_s: W.
        update_s: the optimizer's step.
        activation_bytes: what autograd keeps, weights left out.
        outputs: to feed the next layer.
    """

    forward_s: float
    input_s: float
    weight_s: float
    update_s: float
    activation_bytes: float
    outputs: Tensors


def count_layer(
    layer: Layer,
    inputs: Tensors,
    *,
    rates: Rates,
    loss: Loss | None = None,
    targets: torch.Tensor | None = None,
) -> AnalyticTrial:
    """Count one layer forward and backward.

    Args:
        layer: on the meta device, or the CPU.
        inputs: of one micro-batch, there too.
        rates: of the accelerator.
        loss: of the last layer; None for the others.
        targets: of the last layer.
    """
    weights = {p.untyped_storage()._cdata for p in layer.parameters.values()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in inputs)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with OperationCounter(rates) as forward, hooks:
        result = layer.module(*leaves)
        outputs: Tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        if loss is not None and targets is not None:  # of what the model returns, as in a step
            outputs = (loss(outputs[0], targets),)
    roots = [out for out in outputs if out.requires_grad]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    trained = [*layer.trainable.values()]
    input_s = _backward_s(roots, wanted, rates)
    both_s = _backward_s(roots, [*wanted, *trained], rates)
    num_trained = sum(p.numel() for p in trained)
    return AnalyticTrial(
        forward_s=forward.seconds,
        input_s=input_s,
        weight_s=max(0.0, both_s - input_s),
        update_s=_UPDATE_TRAFFIC_BYTES * num_trained / rates.bytes_per_s,
        activation_bytes=float(sum(kept.values())),
        outputs=tuple(out.detach().requires_grad_(out.requires_grad) for out in outputs),
    )


def _backward_s(
    roots: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], rates: Rates
) -> float:
    if not roots or not wanted:
        return 0.0
    grads = [torch.ones_like(root) for root in roots]
    with OperationCounter(rates) as counter:
        torch.autograd.grad(roots, wanted, grads, retain_graph=True, allow_unused=True)
    return float(counter.seconds)


def count_layers(
    job: JobConfig, skeleton: ModelSkeleton, *, accelerator: Accelerator, efficiency: float
) -> dict[str, Any]:
    """Count one layer of each kind of a model, as a worker of a profile reports what it tried.

    Args:
        job: the resolved job.
        skeleton: its model.
        accelerator: what it would run on.
        efficiency: reached part of the vendor's rates.

    Raises:
        PlanError: no rate for the job's dtype; a layer can be run neither way.

    Returns:
        Also, as `with_values`, which layers ran on the CPU.
    """
    rates = Rates.of(accelerator, dtype=job.precision.dtype, efficiency=efficiency)
    batch_inputs, targets = build_batch_source(job, run_dir=None).batch(1, 0)
    values: Tensors = tuple(t.to(_META) for t in model_inputs(batch_inputs))
    kinds = layer_kinds(skeleton.layers)
    trials: dict[tuple[object, ...], tuple[int, AnalyticTrial, float]] = {}
    like: list[int] = []
    with_values: list[str] = []
    for index, kind in enumerate(kinds):
        key = (kind, *((t.shape, t.dtype, t.requires_grad) for t in values))
        if key not in trials:
            trial, on_cpu = _count_one(
                job,
                skeleton,
                index=index,
                inputs=values,
                targets=targets if index == len(kinds) - 1 else None,
                rates=rates,
            )
            with_values += [skeleton.layers[index].name] if on_cpu else []
            trials[key] = (index, trial, num_bytes(values))
        like.append(trials[key][0])
        values = trials[key][1].outputs
    return {
        "like": like,
        "with_values": with_values,
        "batch_s": 0.0,
        "checks": {},
        "trials": {
            str(index): {
                "forward_s": (trial.forward_s,),
                "input_s": (trial.input_s,),
                "weight_s": (trial.weight_s,),
                "update_s": (trial.update_s,),
                "activation_bytes": trial.activation_bytes,
                "input_bytes": input_bytes,
                "output_bytes": num_bytes(trial.outputs),
            }
            for index, trial, input_bytes in trials.values()
        },
    }


def _count_one(
    job: JobConfig,
    skeleton: ModelSkeleton,
    *,
    index: int,
    inputs: Tensors,
    targets: torch.Tensor | None,
    rates: Rates,
) -> tuple[AnalyticTrial, bool]:
    """Count a layer on the meta device; where it asks for values, with random ones on the CPU.

    Returns:
        The trial, and whether the layer asked for values.
    """
    failed: Exception | None = None
    name, shapes = skeleton.layers[index].name, skeleton.layers[index].parameters
    for device in (_META, torch.device("cpu")):
        if failed is not None and sum(p.numel for p in shapes) > MOST_PARAMETERS:
            break
        layers, loss = build_layers(job, [index], device=device)
        try:
            trial = count_layer(
                layers[0],
                inputs if device is _META else _random_like(inputs),
                rates=rates,
                loss=None if targets is None else loss,
                targets=None if targets is None else targets.to(device),
            )
        except Exception as error:  # noqa: BLE001 - the user's code, at the edge to it
            failed = failed or error
        else:
            outputs = tuple(
                out.to(_META).requires_grad_(out.requires_grad) for out in trial.outputs
            )
            return replace(trial, outputs=outputs), failed is not None
    text = str(failed).partition(". ")[0]
    size = sum(p.numel for p in shapes)
    too_large = (
        f"; with its {size:,} parameters it is not run on this CPU with random values, as layers of up to "
        f"{MOST_PARAMETERS:,} are"
        if size > MOST_PARAMETERS
        else ""
    )
    raise PlanError(
        f"layer {name} cannot be counted without values: {type(failed).__name__}: {text}{too_large}",
        remedy="measure it on a device: deepopt profile without --devices",
    ) from failed


def _random_like(inputs: Tensors) -> Tensors:
    """Values for a layer that asks for them; integers are 0."""
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(t.shape, generator=draw).to(t.dtype).requires_grad_(t.requires_grad)
        if t.is_floating_point()
        else torch.zeros(t.shape, dtype=t.dtype)
        for t in inputs
    )
