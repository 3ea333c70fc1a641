"""From a model to a chain of layers: described without memory, or built where it will train.

A model that is an `nn.Sequential` or has `deepopt_layers()` says what its layers are:
`deepopt_layers()` gives (name, module) pairs in the order of the forward, each name the module's path
in the model. Any other model is recorded: its own forward runs once, and is cut where modules with
parameters are called (docs/models.md). Optional on the model: `loss(output, targets)`;
`deepopt_layerwise_init = True`: every layer has `reset_parameters()`, which initialises all of it, so
that a worker builds only its own layers. Optional on a layer:
`forward_flops_per_token(sequence_length)`.
"""

from __future__ import annotations

from deepopt.convert.build import build_chain, build_layers, describe
from deepopt.convert.deep_model import DeepModel, convert_to_deepopt
from deepopt.convert.loss import find_loss

__all__ = [
    "DeepModel",
    "build_chain",
    "build_layers",
    "convert_to_deepopt",
    "describe",
    "find_loss",
]
