"""Small checkpoints for tests: two layers, AdamW moments, known values per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from deepopt.checkpoint.layer_state import LayerState
from deepopt.checkpoint.manifest import Manifest, ShardEntry
from deepopt.checkpoint.store import CheckpointStore
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton

LAYERS = ("embedding", "blocks.0")


def make_skeleton() -> ModelSkeleton:
    """Skeleton of the model of `make_states`; the second layer ties a weight."""
    return ModelSkeleton(
        factory="tests:build",
        kwargs={},
        layers=(
            LayerSkeleton(
                name="embedding",
                kind="Embedding",
                parameters=(
                    ParameterSkeleton(name="embedding.weight", shape=(7, 3), dtype="float32"),
                ),
            ),
            LayerSkeleton(
                name="blocks.0",
                kind="Block",
                parameters=(
                    ParameterSkeleton(name="blocks.0.weight", shape=(3, 3), dtype="float32"),
                    ParameterSkeleton(
                        name="blocks.0.out.weight",
                        shape=(7, 3),
                        dtype="float32",
                        tied_to="embedding.weight",
                    ),
                    ParameterSkeleton(name="blocks.0.bias", shape=(3,), dtype="bfloat16"),
                ),
                buffers=("blocks.0.counts",),
            ),
        ),
    )


def make_states(step: int) -> tuple[LayerState, ...]:
    """States of both layers with values that only this step has."""
    generator = torch.Generator().manual_seed(step)

    def parameter(name: str, *shape: int) -> dict[str, torch.Tensor]:
        return {
            f"parameter/{name}": torch.randn(shape, generator=generator),
            f"optimizer/{name}/exp_avg": torch.randn(shape, generator=generator) * 1e-3,
            f"optimizer/{name}/exp_avg_sq": torch.rand(shape, generator=generator) * 1e-8,
            f"optimizer/{name}/step": torch.tensor(float(step)),
        }

    return (
        LayerState(layer="embedding", tensors=parameter("embedding.weight", 7, 3)),
        LayerState(
            layer="blocks.0",
            tensors={
                **parameter("blocks.0.weight", 3, 3),
                **parameter("blocks.0.bias", 3),
                "buffer/blocks.0.counts": torch.randint(0, 9, (5,), generator=generator),
            },
        ),
    )


def make_manifest(
    step: int, generation: int = 1, shards: Sequence[ShardEntry] = ()
) -> Manifest:
    """A manifest of the two layers."""
    return Manifest(
        job_id="job-1",
        step=step,
        generation=generation,
        plan={"plan_id": 1, "layer_names": LAYERS},
        plan_fingerprint="plan",
        skeleton_fingerprint=make_skeleton().fingerprint(),
        seed=0,
        num_groups=2,
        tokens_seen=step * 100,
        data_fingerprint="text",
        data_state={"cursor": 1e-05},
        created_at="2026-01-01T00:00:00.000+00:00",
        shards=tuple(shards),
    )


def write_step(store: CheckpointStore, step: int, generation: int = 1) -> Manifest:
    """Write both layers of a step, each by its own rank, without committing."""
    store.begin(step, generation)
    shards = [
        store.write_layer(step, generation, state, rank)
        for rank, state in enumerate(make_states(step))
    ]
    return make_manifest(step, generation, shards)


def commit_step(store: CheckpointStore, step: int, generation: int = 1) -> Path:
    """Write and commit a step."""
    return store.commit(write_step(store, step, generation))


def without_shard(manifest: Manifest, layer: str) -> Manifest:
    """The manifest as if one layer had not been written."""
    return replace(manifest, shards=tuple(e for e in manifest.shards if e.layer != layer))


def assert_same_state(found: LayerState, wanted: LayerState) -> None:
    """Equal keys, dtypes, shapes and bits."""
    assert found.layer == wanted.layer
    assert found.tensors.keys() == wanted.tensors.keys()
    for key, tensor in wanted.tensors.items():
        other = found.tensors[key]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), key
        assert bits(other) == bits(tensor), key


def bits(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that -0.0, NaN and bf16 compare exactly."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
