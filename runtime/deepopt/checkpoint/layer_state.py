"""`LayerState`: the one unit that checkpoints, replicas, moves and resumes carry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from deepopt.checkpoint.manifest import TensorSlice


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerState:
    """Everything that belongs to one layer and must outlive its process.

    Args:
        layer: the layer's fully qualified name.
        tensors: CPU tensors by key. Keys: `parameter/NAME` (fp32 master), `buffer/NAME`,
            `optimizer/NAME/FIELD` (for AdamW: `exp_avg`, `exp_avg_sq` like the parameter, and
            `step`, a 0-dim fp32 tensor). NAME is the parameter's name in the model.
        slices: the part of the global tensor that each tensor holds; a key that is absent
            holds the whole.
    """

    layer: str
    tensors: Mapping[str, torch.Tensor]
    slices: Mapping[str, TensorSlice] = field(default_factory=dict)
