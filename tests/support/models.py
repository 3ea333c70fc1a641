"""Small models for tests, each a model factory's target."""

from __future__ import annotations

import torch


def sequential(width: int = 8) -> torch.nn.Sequential:
    """A plain Sequential with values drawn in the constructor."""
    return torch.nn.Sequential(
        torch.nn.Linear(4, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
    )


class Tied(torch.nn.Module):
    """First and last layer share a weight; no layer-wise initialisation."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 6)
        self.body = torch.nn.Linear(6, 6)
        self.head = torch.nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight

    def deepopt_layers(self) -> list[tuple[str, torch.nn.Module]]:
        return [("embed", self.embed), ("body", self.body), ("head", self.head)]


def repeated_modules() -> torch.nn.Sequential:
    """One activation at two places, and one matrix at two others."""
    act, square = torch.nn.ReLU(), torch.nn.Linear(4, 4)
    return torch.nn.Sequential(square, act, square, act, torch.nn.Linear(4, 2))


class Residual(torch.nn.Module):
    """A layer around a norm that another layer may hold, too."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.body = torch.nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(self.norm(x))


def shared_norm() -> torch.nn.Sequential:
    """Two layers hold one module."""
    norm = torch.nn.LayerNorm(6)
    return torch.nn.Sequential(Residual(norm), Residual(norm))


class Uninitialised(torch.nn.Sequential):
    """Promises initialisation by layer, but its activation has none."""

    deepopt_layerwise_init = True

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(2, 2), torch.nn.ReLU())


class Stray(torch.nn.Module):
    """A parameter outside every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(2, 2)
        self.gain = torch.nn.Parameter(torch.ones(1))

    def deepopt_layers(self) -> list[tuple[str, torch.nn.Module]]:
        return [("body", self.body)]


def without_layers() -> torch.nn.Module:
    return torch.nn.Linear(2, 2)


def broken() -> torch.nn.Module:
    raise KeyError("hidden_size")


def not_a_module() -> int:
    return 3


def frozen() -> torch.nn.Module:
    """Nothing in it can be trained."""
    return sequential().requires_grad_(False)


def half_frozen() -> torch.nn.Module:
    """Of its first layer nothing is trained."""
    model = sequential()
    model[0].requires_grad_(False)
    return model
