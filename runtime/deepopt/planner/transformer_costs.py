"""What the layers of a GPT-like transformer cost on a cluster that nobody has measured yet.

Pure arithmetic from shapes: FLOPs, memory traffic and collectives, each divided by the vendor's rate
and by one `efficiency`. docs/scale.md writes the model out and checks it against published runs. It
does not measure (a profile does, and is better) and does not cut the model into stages.

Legend: s sequence, b sequences in a micro-batch, h hidden size, a heads, V vocabulary,
t tensor-parallel GPUs that work as one rank; dense multi-head attention, 4h feed-forward, bf16.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from deepopt.errors import PlanError
from deepopt.planner.hardware import Cluster
from deepopt.planner.layer_costs import LayerCosts

# Memory traffic of F, and of I, in bytes for each byte of activations that F stores: norms,
# GeLU, softmax, dropout and residuals move their tensors several times. Solved from the excess of
# T_F and T_B over T_W in one row of arXiv:2401.10241, table 9 (6.2B, m = 24); its other rows
# and table 4 of arXiv:2205.05198 are predictions.
TRAFFIC_PER_STORED_BYTE = 3.7

# A hop between ranks, from the same table: its T_comm over 2sbh bytes (10.5 to 28.3 MB, inside a
# host and across) lie on 0.28 ms + bytes / (100 GB/s), a third of the A100's NVLink.
HOP_LATENCY_S = 0.28e-3
LINK_SHARE = 1 / 3

# Bytes a parameter: bf16 weight 2, fp32 gradient 4, fp32 master 4, AdamW's moments 8.
STATE_BYTES = 18.0
GRADIENT_BYTES = 4.0
# Bytes that AdamW moves a parameter: reads gradient, master and moments (16), writes master,
# moments (12) and the bf16 weight (2).
UPDATE_TRAFFIC_BYTES = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerShape:
    """Sizes of a GPT-like transformer.

    Args:
        num_layers: transformer blocks.
        hidden: h.
        heads: a.
        sequence: s, tokens of a sequence.
        vocab: V.
    """

    num_layers: int
    hidden: int
    heads: int
    sequence: int
    vocab: int = 51_200

    def __post_init__(self) -> None:
        for name in ("num_layers", "hidden", "heads", "sequence", "vocab"):
            if getattr(self, name) < 1:
                raise PlanError(
                    f"a transformer with {name} = {getattr(self, name)} has no cost",
                    remedy=f"give {name} of at least 1",
                )

    @property
    def block_parameters(self) -> int:
        """Of one block: 12 h^2 + 13 h."""
        return 12 * self.hidden**2 + 13 * self.hidden

    @property
    def num_parameters(self) -> int:
        """Blocks and embeddings; the output layer shares the input embedding's values."""
        return (
            self.num_layers * self.block_parameters + (self.vocab + self.sequence) * self.hidden
        )

    @property
    def flops_per_sequence(self) -> float:
        """Forward and backward without recompute, as MFU counts them.

        Source: arXiv:2205.05198, equation 7.
        """
        h, s, layers = self.hidden, self.sequence, self.num_layers
        return 72 * layers * s * h**2 * (1 + s / (6 * h) + self.vocab / (12 * h * layers))


# arXiv:2005.14165 table 2.1 (GPT-3) as run in arXiv:2205.05198, table 3; arXiv:2401.10241, table 3,
# with V = 51,200 as in the former, since it names none.
MODELS: dict[str, TransformerShape] = {
    "gpt-1.5b": TransformerShape(num_layers=22, hidden=2304, heads=24, sequence=1024),
    "gpt-6.2b": TransformerShape(num_layers=30, hidden=4096, heads=32, sequence=1024),
    "gpt-14.6b": TransformerShape(num_layers=46, hidden=5120, heads=40, sequence=1024),
    "gpt-28.3b": TransformerShape(num_layers=62, hidden=6144, heads=48, sequence=1024),
    "gpt-22b": TransformerShape(num_layers=48, hidden=6144, heads=64, sequence=2048),
    "gpt3-175b": TransformerShape(num_layers=96, hidden=12288, heads=96, sequence=2048),
    "mt-nlg-530b": TransformerShape(num_layers=105, hidden=20480, heads=128, sequence=2048),
}


def model_shape(name: str) -> TransformerShape:
    """A known model by its name.

    Args:
        name: a key of `MODELS`.

    Raises:
        PlanError: no such model.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=1)
        raise PlanError(
            f"there is no model {name!r}",
            remedy=(f"did you mean {close[0]}? " if close else "")
            + f"known: {', '.join(MODELS)}",
        )
    return MODELS[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """What an op asks of one GPU."""

    flops: float = 0.0
    traffic_bytes: float = 0.0
    collective_bytes: float = 0.0


def transformer_costs(
    shape: TransformerShape,
    *,
    cluster: Cluster,
    efficiency: float,
    microbatch_size: int = 1,
    tensor_parallel: int = 1,
    data_parallel: int = 1,
    recompute_attention: bool = False,
) -> LayerCosts:
    """Costs of the chain embedding, blocks, output layer with loss.

    A rank is `tensor_parallel` neighbouring GPUs; figures are of one of them. They share
    activations along the sequence where tensors do not split (sequence parallelism).

    Args:
        shape: sizes of the model.
        cluster: GPUs; all of them train.
        efficiency: reached part of the peak FLOP/s, memory rate and NVLink rate, in (0, 1].
        microbatch_size: b.
        tensor_parallel: t, at most the GPUs of a host.
        data_parallel: replicas of the pipeline.
        recompute_attention: attention scores are not kept but computed again, in I.

    Raises:
        PlanError: the sizes do not divide, or the efficiency is none.

    Source: FLOPs and activation bytes of arXiv:2205.05198, sections 4 and 5 and appendix A.
    """
    gpu, t = cluster.accelerator, tensor_parallel
    _check(shape, cluster, efficiency, microbatch_size, t, data_parallel)
    h, s, heads, b = shape.hidden, shape.sequence, shape.heads, microbatch_size
    tokens = b * s
    scores_bytes = 5 * heads * s * tokens / t
    kept_bytes = 34 * tokens * h / t
    hidden_bytes = 2.0 * tokens * h

    def seconds(work: _Work) -> float:
        ring = 2 * (t - 1) / t * work.collective_bytes / gpu.link_bytes_per_s
        at_peak = (
            work.flops / gpu.peak_flops + work.traffic_bytes / gpu.memory_bytes_per_s + ring
        )
        return at_peak / efficiency

    weights = 24 * tokens * h**2 / t
    attention = 4 * tokens * s * h / t
    moved = TRAFFIC_PER_STORED_BYTE * (kept_bytes + scores_bytes)
    again = _Work(flops=attention, traffic_bytes=TRAFFIC_PER_STORED_BYTE * scores_bytes)
    block_f = _Work(
        flops=weights + attention, traffic_bytes=moved, collective_bytes=2 * hidden_bytes
    )
    block_i = _Work(
        flops=weights + 2 * attention + (again.flops if recompute_attention else 0.0),
        traffic_bytes=moved + (again.traffic_bytes if recompute_attention else 0.0),
        collective_bytes=2 * hidden_bytes,
    )
    block_w = _Work(flops=weights)
    # The embedding reads and writes one row a token; its gradient is added in fp32.
    embed_f = _Work(traffic_bytes=2 * hidden_bytes / t)
    embed_w = _Work(traffic_bytes=4 * hidden_bytes / t)
    logits_bytes = 4.0 * tokens * shape.vocab / t  # fp32, kept for the loss
    output = _Work(
        flops=2 * tokens * h * shape.vocab / t,
        traffic_bytes=TRAFFIC_PER_STORED_BYTE * logits_bytes,
    )
    output_w = _Work(flops=output.flops)

    def chain(first: _Work, block: _Work, last: _Work) -> tuple[float, ...]:
        return (seconds(first), *(seconds(block),) * shape.num_layers, seconds(last))

    embedding = (shape.vocab + shape.sequence) * h / t
    parameters = (
        embedding,
        *(shape.block_parameters / t,) * shape.num_layers,
        shape.vocab * h / t,
    )
    num_ranks = cluster.num_gpus // (t * data_parallel)
    block_bytes = kept_bytes + (0.0 if recompute_attention else scores_bytes)
    return LayerCosts(
        forward_s=chain(embed_f, block_f, output),
        input_s=chain(_Work(), block_i, output),
        weight_s=chain(embed_w, block_w, output_w),
        update_s=tuple(
            seconds(_Work(traffic_bytes=UPDATE_TRAFFIC_BYTES * n)) for n in parameters
        ),
        activation_bytes=(
            tokens * h / t,  # dropout mask
            *(block_bytes,) * shape.num_layers,
            4 * tokens * h / t + logits_bytes,
        ),
        output_bytes=(hidden_bytes / t,) * (shape.num_layers + 2),
        gradient_bytes=tuple(GRADIENT_BYTES * n for n in parameters),
        state_bytes=tuple(STATE_BYTES * n for n in parameters),
        memory_bytes=(gpu.memory_bytes,) * num_ranks,
        latency_s=HOP_LATENCY_S,
        bytes_per_s=gpu.link_bytes_per_s * LINK_SHARE,
        host_of=cluster.host_of(num_ranks=num_ranks, gpus_per_rank=t),
        inter_host_latency_s=HOP_LATENCY_S,
        inter_host_bytes_per_s=gpu.network_bytes_per_s,
        source=f"analytic, {gpu.name} at {efficiency:.3g} of its peak",
    )


def _check(
    shape: TransformerShape,
    cluster: Cluster,
    efficiency: float,
    microbatch_size: int,
    tensor_parallel: int,
    data_parallel: int,
) -> None:
    if not 0 < efficiency <= 1:
        raise PlanError(
            f"an efficiency of {efficiency} is no part of the peak",
            remedy="give more than 0 and at most 1",
        )
    for name, value in (
        ("microbatch_size", microbatch_size),
        ("tensor_parallel", tensor_parallel),
        ("data_parallel", data_parallel),
    ):
        if value < 1:
            raise PlanError(f"{name} {value} is too few", remedy="give at least 1")
    per_host = cluster.accelerator.gpus_per_host
    if (
        tensor_parallel > per_host
        or per_host % tensor_parallel
        or shape.heads % tensor_parallel
    ):
        raise PlanError(
            f"tensor_parallel {tensor_parallel} does not divide {shape.heads} heads and the "
            f"{per_host} GPUs of a host",
            remedy="choose a divisor of both, so that NVLink joins the GPUs of a rank",
        )
    if cluster.num_gpus % (tensor_parallel * data_parallel):
        raise PlanError(
            f"{cluster.num_gpus} GPUs do not form {data_parallel} pipeline(s) of ranks of "
            f"{tensor_parallel} GPUs",
            remedy="choose tensor_parallel x data_parallel as a divisor of the GPUs",
        )
