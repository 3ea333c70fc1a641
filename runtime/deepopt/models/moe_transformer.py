"""The built-in model: a small MoE language model in the DeepSeekMoE manner, bytes in by
default.

A chain `embed`, `blocks.0` ... `blocks.N-1`, `head`; each maps one tensor to one tensor, so a
pipeline may cut between any two. Training code, checkpoints and parallelism live elsewhere.

Shapes: B sequences, S positions, D features, V tokens of the vocabulary.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
import torch.nn.functional as F

from deepopt.errors import InputError
from deepopt.import_path import import_object
from deepopt.models.attention import CausalSelfAttention
from deepopt.models.feed_forward import MoeFeedForward, SwiGLU
from deepopt.models.settings import MoeTransformerSettings
from deepopt.moe.router import Router


def build(**kwargs: Any) -> MoeTransformer:
    """Make the model; works under `torch.device("meta")`.

    Args:
        kwargs: see `MoeTransformerSettings`.

    Raises:
        InputError: an unknown argument, or values that do not fit.
    """
    known = [f.name for f in fields(MoeTransformerSettings)]
    for name in kwargs:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise InputError(
                f"model.kwargs: the built-in model has no argument {name!r}",
                remedy=f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}",
            )
    return MoeTransformer(MoeTransformerSettings(**kwargs))


class TokenEmbedding(torch.nn.Module):
    """Token ids to features.

    Args:
        settings: of the model.
    """

    def __init__(self, settings: MoeTransformerSettings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = torch.nn.Parameter(torch.empty(settings.vocab_size, settings.d_model))
        self.reset_parameters()

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """int64 [B, S] to [B, S, D]."""
        x_BSD = F.embedding(tokens_BS, self.weight)
        return F.dropout(x_BSD, self.settings.dropout, self.training)

    def reset_parameters(self) -> None:
        """Initialise the layer from the default generator."""
        torch.nn.init.normal_(self.weight, std=self.settings.init_std)

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Nothing: a table look-up."""
        return 0.0


class Block(torch.nn.Module):
    """Attention, then a feed-forward, each on normalised input and added to the residual
    stream.

    Args:
        settings: of the model.
        index: position among the blocks; the first `num_dense_layers` have no experts.
    """

    def __init__(self, settings: MoeTransformerSettings, *, index: int) -> None:
        super().__init__()
        self.settings = settings
        d_model = settings.d_model
        self.attention_norm = torch.nn.RMSNorm(d_model, eps=settings.norm_eps)
        self.attention = CausalSelfAttention(
            d_model, num_heads=settings.num_heads, rope_base=settings.rope_base
        )
        self.feed_forward_norm = torch.nn.RMSNorm(d_model, eps=settings.norm_eps)
        self.feed_forward: SwiGLU | MoeFeedForward
        if index < settings.num_dense_layers:
            hidden = settings.dense_hidden or settings.active_hidden
            self.feed_forward = SwiGLU(d_model, hidden=hidden)
        else:
            self.feed_forward = MoeFeedForward(
                d_model,
                router=_make_router(settings),
                num_experts=settings.num_experts,
                num_shared_experts=settings.num_shared_experts,
                hidden=settings.expert_hidden,
            )
        self.reset_parameters()

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] to [B, S, D]."""
        dropout = self.settings.dropout
        mixed = self.attention(self.attention_norm(x_BSD))
        x_BSD = x_BSD + F.dropout(mixed, dropout, self.training)
        fed = self.feed_forward(self.feed_forward_norm(x_BSD))
        return x_BSD + F.dropout(fed, dropout, self.training)

    def reset_parameters(self) -> None:
        """Initialise the layer from the default generator."""
        stds = {"std": self.settings.init_std, "residual_std": self.settings.residual_std}
        self.attention_norm.reset_parameters()
        self.attention.reset_parameters(**stds)
        self.feed_forward_norm.reset_parameters()
        self.feed_forward.reset_parameters(**stds)

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Multiplications and additions of one forward, for the experts that a token sees.

        Args:
            sequence_length: tokens; a token attends to half of them on average.
        """
        s = self.settings
        attention = 2.0 * 4 * s.d_model**2 + 2.0 * s.d_model * (sequence_length + 1)
        if isinstance(self.feed_forward, SwiGLU):
            return attention + 6.0 * s.d_model * self.feed_forward.down.in_features
        router = 2.0 * s.d_model * s.num_experts
        return attention + router + 6.0 * s.d_model * s.active_hidden


class Head(torch.nn.Module):
    """Final norm and projection to logits.

    Args:
        settings: of the model.
        tied_to: weight to share; None for one of its own.
    """

    def __init__(
        self, settings: MoeTransformerSettings, *, tied_to: torch.nn.Parameter | None
    ) -> None:
        super().__init__()
        self.settings = settings
        self.norm = torch.nn.RMSNorm(settings.d_model, eps=settings.norm_eps)
        self.projection = torch.nn.Linear(settings.d_model, settings.vocab_size, bias=False)
        if tied_to is not None:
            self.projection.weight = tied_to
        self.reset_parameters()

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        """[B, S, D] to logits [B, S, V]."""
        logits: torch.Tensor = self.projection(self.norm(x_BSD))
        return logits

    def reset_parameters(self) -> None:
        """Initialise the layer from the default generator; a tied weight is the embedding's to
        set."""
        self.norm.reset_parameters()
        if not self.settings.tie_embeddings:
            torch.nn.init.normal_(self.projection.weight, std=self.settings.init_std)

    def forward_flops_per_token(self, sequence_length: int) -> float:
        """Multiplications and additions of the projection."""
        return 2.0 * self.settings.d_model * self.settings.vocab_size


class MoeTransformer(torch.nn.Module):
    """The whole chain.

    Args:
        settings: of the model.
    """

    deepopt_layerwise_init = True

    def __init__(self, settings: MoeTransformerSettings) -> None:
        super().__init__()
        self.embed = TokenEmbedding(settings)
        self.blocks = torch.nn.ModuleList(
            Block(settings, index=i) for i in range(settings.num_blocks)
        )
        self.head = Head(
            settings, tied_to=self.embed.weight if settings.tie_embeddings else None
        )

    def deepopt_layers(self) -> Sequence[tuple[str, torch.nn.Module]]:
        """(module path, layer) in the order of the forward."""
        blocks = [(f"blocks.{i}", block) for i, block in enumerate(self.blocks)]
        return [("embed", self.embed), *blocks, ("head", self.head)]

    def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
        """int64 [B, S] to logits [B, S, V]."""
        x = tokens_BS
        for _, layer in self.deepopt_layers():
            x = layer(x)
        return x

    @staticmethod
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy in nats, in fp32.

        Args:
            output: logits [B, S, V].
            targets: int64 [B, S].
        """
        return F.cross_entropy(output.flatten(0, -2).float(), targets.flatten())


def _make_router(settings: MoeTransformerSettings) -> Router:
    router_class = import_object(settings.router, field="model.kwargs.router")
    coefficient = settings.auxiliary_coefficient
    balance = {} if coefficient is None else {"auxiliary_coefficient": coefficient}
    try:
        router: Router = router_class(
            settings.d_model,
            num_experts=settings.num_experts,
            top_k=settings.top_k,
            noise=settings.router_noise,
            **balance,
            **settings.router_kwargs,
        )
    except TypeError as error:
        raise InputError(
            f"model.kwargs: router {settings.router} does not take these arguments: {error}",
            remedy="check router_kwargs; deepopt.moe.router says how a router is made",
        ) from error
    if not isinstance(router, torch.nn.Module):
        raise InputError(
            f"model.kwargs: router {settings.router} made a {type(router).__name__}, "
            "not a torch.nn.Module"
        )
    return router
