"""The arguments of the built-in model, checked where they are made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deepopt.errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeTransformerSettings:
    """The keyword arguments of `build`, which are `model.kwargs` in a job file.

    Args:
        vocab_size: tokens of the vocabulary; 256 for bytes.
        d_model: features of the residual stream.
        num_blocks: attention and feed-forward pairs.
        num_heads: attention heads; each has d_model / num_heads features, an even number.
        num_experts: routed experts of a block.
        top_k: routed experts that a token goes to.
        num_shared_experts: experts that every token goes to.
        expert_hidden: hidden features of one expert.
        num_dense_layers: so many of the first blocks have a dense feed-forward instead of
            experts.
        dense_hidden: hidden features of that one; None: as wide as the experts a token sees
            together.
        tie_embeddings: use the embedding's weight as the head's.
        dropout: share of features zeroed after the embedding and on each residual branch.
        router: import path `package.module:Class`, see `deepopt.moe.router`.
        router_noise: standard deviation of the noise on the router's logits in training.
        auxiliary_coefficient: for a router that takes it, the weight of its load-balancing loss; None
            for one that does not (that of `ElbRouter` is `elb.aux_coefficient`).
        router_kwargs: further arguments of the router's class.
        rope_base: of the geometric series of rotary angles.
        norm_eps: added to the mean square under the root.
        init_std: standard deviation of the initial weights; projections that add to the
            residual stream get it divided by sqrt(2 x num_blocks).

    Raises:
        InputError: values that do not fit together.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_blocks: int = 8
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    num_shared_experts: int = 1
    expert_hidden: int = 64
    num_dense_layers: int = 1
    dense_hidden: int | None = None
    tie_embeddings: bool = True
    dropout: float = 0.0
    router: str = "deepopt.moe.elb_router:ElbRouter"
    router_noise: float = 0.0
    auxiliary_coefficient: float | None = None
    router_kwargs: Mapping[str, Any] = field(default_factory=dict)
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.08

    def __post_init__(self) -> None:
        smallest = {"num_shared_experts": 0, "num_dense_layers": 0}
        for name in (
            "vocab_size",
            "d_model",
            "num_blocks",
            "num_heads",
            "num_experts",
            "top_k",
            "num_shared_experts",
            "expert_hidden",
            "num_dense_layers",
            *(() if self.dense_hidden is None else ("dense_hidden",)),
        ):
            _check_integer(name, getattr(self, name), smallest=smallest.get(name, 1))
        for name in (
            "dropout",
            "router_noise",
            *(() if self.auxiliary_coefficient is None else ("auxiliary_coefficient",)),
        ):
            _check_number(name, getattr(self, name), smallest=0.0)
        for name in ("rope_base", "norm_eps", "init_std"):
            _check_number(name, getattr(self, name), smallest=0.0, open_end=True)
        _check_kind("tie_embeddings", self.tie_embeddings, bool)
        _check_kind("router", self.router, str)
        _check_kind("router_kwargs", self.router_kwargs, Mapping)
        if self.d_model % (2 * self.num_heads):
            raise InputError(
                f"model.kwargs: d_model {self.d_model} cannot be cut into {self.num_heads} heads "
                "of an even number of features",
                remedy=f"set d_model to a multiple of {2 * self.num_heads}, or change num_heads",
            )
        if self.top_k > self.num_experts:
            raise InputError(
                f"model.kwargs: top_k {self.top_k} is more than num_experts {self.num_experts}",
                remedy=f"set top_k between 1 and {self.num_experts}",
            )
        if self.num_dense_layers > self.num_blocks:
            raise InputError(
                f"model.kwargs: num_dense_layers {self.num_dense_layers} is more than "
                f"num_blocks {self.num_blocks}",
                remedy=f"set num_dense_layers between 0 and {self.num_blocks}",
            )
        if self.dropout >= 1:
            raise InputError(
                f"model.kwargs: dropout {self.dropout} leaves nothing",
                remedy="set it below 1; 0 switches it off",
            )

    @property
    def residual_std(self) -> float:
        """Initial standard deviation of projections that add to the residual stream."""
        return self.init_std / math.sqrt(2 * self.num_blocks)

    @property
    def active_hidden(self) -> int:
        """Hidden features of all experts that one token sees in a block."""
        return (self.top_k + self.num_shared_experts) * self.expert_hidden


def _check_integer(name: str, value: Any, *, smallest: int) -> None:
    if type(value) is not int or value < smallest:
        raise InputError(
            f"model.kwargs: {name} is {value!r}, not a whole number of at least {smallest}",
            remedy=f"correct {name}",
        )


def _check_number(name: str, value: Any, *, smallest: float, open_end: bool = False) -> None:
    fits = type(value) in (int, float) and (value > smallest if open_end else value >= smallest)
    if not fits or not math.isfinite(value):
        relation = "above" if open_end else "of at least"
        raise InputError(
            f"model.kwargs: {name} is {value!r}, not a number {relation} {smallest:g}",
            remedy=f"correct {name}",
        )


def _check_kind(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise InputError(
            f"model.kwargs: {name} is {value!r}, not a {kind.__name__.lower()}",
            remedy=f"correct {name}",
        )
