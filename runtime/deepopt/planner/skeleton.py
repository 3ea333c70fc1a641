"""The model's skeleton: layers, parameters and costs as plain data, without any tensor.

`convert` makes it; the planner, the head and checkpoints read it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSkeleton:
    """One parameter of one layer.

    Args:
        name: fully qualified name in the model's own `state_dict`.
        shape: global shape.
        dtype: for example `float32`.
        tied_to: name of the parameter of an earlier layer that this one shares its values
            with; None when it is a parameter of its own.
        requires_grad: False for a frozen parameter.
        in_state_dict: False for a further use of a parameter that the model's `state_dict` holds
            under another name only.
        fp8: whether products with it are computed in FP8.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    tied_to: str | None = None
    requires_grad: bool = True
    in_state_dict: bool = True
    fp8: bool = False

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSkeleton:
    """One layer of the chain.

    Args:
        name: fully qualified name of the layer's module, for example `blocks.3`.
        kind: class name of the module.
        parameters: in the model's order.
        buffers: names of persistent buffers.
        forward_flops_per_token: floating-point operations of one forward, per token.
    """

    name: str
    kind: str
    parameters: tuple[ParameterSkeleton, ...]
    buffers: tuple[str, ...] = ()
    forward_flops_per_token: float = 0.0

    @property
    def num_parameters(self) -> int:
        """Elements of the layer's own parameters; tied ones count where they are first used."""
        return sum(p.numel for p in self.parameters if p.tied_to is None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSkeleton:
    """A model as a chain of layers.

    Args:
        factory: import path `package.module:callable`.
        kwargs: arguments of the factory.
        layers: in chain order.
        not_fp8: where linear maps compute in FP8: path of each other one -> why it does not.
    """

    factory: str
    kwargs: Mapping[str, Any]
    layers: tuple[LayerSkeleton, ...]
    not_fp8: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_parameters(self) -> int:
        """Elements of all parameters, tied ones once."""
        return sum(layer.num_parameters for layer in self.layers)

    @property
    def forward_flops_per_token(self) -> float:
        """Floating-point operations of one forward of the whole chain, per token."""
        return sum(layer.forward_flops_per_token for layer in self.layers)

    @property
    def num_fp8(self) -> int:
        """Weights of linear maps that compute in FP8."""
        return sum(p.fp8 for layer in self.layers for p in layer.parameters)

    def layer(self, name: str) -> LayerSkeleton:
        """The layer of that name; KeyError when there is none."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def fingerprint(self) -> str:
        """Hash of names, shapes and ties: two models with the same one share checkpoints."""
        shape = [
            (layer.name, [(p.name, p.shape, p.tied_to) for p in layer.parameters])
            for layer in self.layers
        ]
        return hashlib.sha256(json.dumps(shape).encode()).hexdigest()[:32]

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready data."""
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> ModelSkeleton:
        """From what `to_json` gave."""
        layers = tuple(
            LayerSkeleton(
                name=layer["name"],
                kind=layer["kind"],
                parameters=tuple(
                    ParameterSkeleton(**{**p, "shape": tuple(p["shape"])})
                    for p in layer["parameters"]
                ),
                buffers=tuple(layer["buffers"]),
                forward_flops_per_token=layer["forward_flops_per_token"],
            )
            for layer in fields["layers"]
        )
        return cls(
            factory=fields["factory"],
            kwargs=fields["kwargs"],
            layers=layers,
            not_fp8=fields.get("not_fp8", {}),
        )
