"""A chain of tiny layers that stands in for a model of which only the costs are known.

With `worker.device: emulated` it shows how a plan for a large model would run: as many layers, as
many gradients of inputs and weights, and next to no arithmetic.
"""

from __future__ import annotations

import torch

from deepopt.errors import InputError
from deepopt_kernels.weight_grad import WeightGradHolder, linear


class StandInLayer(torch.nn.Module):
    """A residual linear map: has a gradient of its input and one of its weights.

    Args:
        width: features.
    """

    weight_grad_holder: WeightGradHolder | None = None

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: small, so that any number of layers keeps its values finite."""
        torch.nn.init.normal_(self.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, width] to [rows, width]."""
        return x + linear(x, self.weight, holder=self.weight_grad_holder)


class StandIn(torch.nn.Module):
    """The chain.

    Args:
        num_layers: of the model that it stands in for.
        width: features of its own.
    """

    deepopt_layerwise_init = True

    def __init__(self, *, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(StandInLayer(width) for _ in range(num_layers))

    def deepopt_layers(self) -> list[tuple[str, torch.nn.Module]]:
        """The layers in the order of the forward."""
        return [(f"layers.{index}", layer) for index, layer in enumerate(self.layers)]

    @staticmethod
    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean squared error of [rows, width]."""
        return torch.nn.functional.mse_loss(output, targets)


class RandomRows:
    """Batches by (step, micro-batch): rows of random numbers, and others as targets.

    Args:
        rows: of a micro-batch.
        width: features.
    """

    description = "random rows"

    def __init__(self, *, rows: int, width: int) -> None:
        self._shape = (2, rows, width)
        self.tokens_per_microbatch = rows

    def batch(self, step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, [rows, width] each."""
        generator = torch.Generator().manual_seed(step * 1_000_003 + microbatch)
        inputs, targets = torch.randn(self._shape, generator=generator)
        return inputs, targets


def build(*, num_layers: int, width: int = 8) -> StandIn:
    """The model factory.

    Args:
        num_layers: of the model that it stands in for, at least 1.
        width: features of its own, at least 1.

    Raises:
        InputError: fewer than one layer or feature.
    """
    if num_layers < 1 or width < 1:
        raise InputError(
            f"model.kwargs: a stand-in of {num_layers} layers of {width} features is none",
            remedy="set num_layers and width to 1 or more",
        )
    return StandIn(num_layers=num_layers, width=width)


def batches(*, rows: int = 4, width: int = 8) -> RandomRows:
    """The dataset factory: as many features as the model.

    Args:
        rows: of a micro-batch.
        width: features.
    """
    return RandomRows(rows=rows, width=width)
