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
