"""Backward of one autograd graph in two parts: input gradients first, chosen weights later.

For weights that no deferring operation serves: the graph itself is walked. The nodes on the way
to the inputs run in the first part. Where such a node has a branch that leads to a chosen weight
and to no input, the gradient that enters the node is kept, and the second part starts there.
The node at the fork runs in both parts, each time for the branches of that part only; nothing
else runs twice. The price is memory: what the graph saved stays until the second part.

It does not decide whether this is right or worth it for a layer: `weight_probe` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

Gradients = Sequence[torch.Tensor | None]


class SplitBackward:
    """One backward through one graph, in two parts.

    Args:
        roots: outputs that require a gradient, or their edges.
        inputs: leaves whose gradients the first part must give.
        weights: parameters whose gradients may come in the second part.

    Attributes:
        refused: weight -> why its gradient comes in the first part after all.
    """

    def __init__(
        self,
        roots: Sequence[torch.Tensor] | Sequence[GradientEdge],
        *,
        inputs: Sequence[torch.Tensor],
        weights: Sequence[torch.Tensor],
    ) -> None:
        self._roots = [
            root if isinstance(root, GradientEdge) else get_gradient_edge(root)
            for root in roots
        ]
        plan = _plan(
            [edge.node for edge in self._roots],
            inputs={id(leaf) for leaf in inputs},
            weights={id(weight) for weight in weights},
        )
        self._groups = plan.groups
        self._early = plan.early
        self.refused: dict[torch.Tensor, str] = plan.refused

    @property
    def later(self) -> tuple[torch.Tensor, ...]:
        """The leaves whose gradients the second part adds."""
        return tuple(leaf for group in self._groups for leaf in group.leaves)

    def run_inputs(self, grads: Gradients) -> None:
        """First part: add the gradients of the inputs, and of all weights that do not wait.

        Args:
            grads: one for each root.
        """
        for group in self._groups:
            for edge, grad in zip(self._roots, grads, strict=True):
                if edge.node in group.tops:
                    group.enter(edge, grad)
        handles = [
            fork.register_prehook(_keeper(group, fork))
            for group in self._groups
            for fork in group.forks
        ]
        try:
            if self._early:
                torch.autograd.backward(
                    self._roots, list(grads), inputs=self._early, retain_graph=True
                )
        finally:
            for handle in handles:
                handle.remove()
        self._roots = []

    def run_weights(self) -> None:
        """Second part: add the gradients of the weights that waited, and let go of the graph."""
        while self._groups:
            group = self._groups.pop(0)
            if group.edges:
                torch.autograd.backward(group.edges, group.grads, inputs=group.leaves)


@dataclass(slots=True)
class _Group:
    """Weights whose gradients are computed in one go.

    `forks` lie on the way to an input, `tops` are roots that do not; edges and grads are where
    the second part starts and with what.
    """

    leaves: list[torch.Tensor]
    forks: list[Node]
    tops: set[Node]
    edges: list[GradientEdge]
    grads: list[torch.Tensor | None]

    def enter(self, edge: GradientEdge, grad: torch.Tensor | None) -> None:
        self.edges.append(edge)
        self.grads.append(grad)


@dataclass(frozen=True, slots=True)
class _Plan:
    groups: list[_Group]
    early: list[torch.Tensor]
    refused: dict[torch.Tensor, str]


def has_leaf(root: Node, *, stop: Node) -> bool:
    """Whether a backward from a node adds to any leaf without passing another node.

    Args:
        root: node of the graph.
        stop: do not look behind this node.
    """
    # Each look at a node makes a Python object of it, at every micro-batch anew: no more looks than needed.
    seen = {root, stop}
    stack = [root] if root is not stop else []
    while stack:
        node = stack.pop()
        children = node.next_functions
        if not children and _is_leaf(node):
            return True
        for child, _ in children:
            if child is not None and child not in seen:
                seen.add(child)
                stack.append(child)
    return False


def _plan(roots: Sequence[Node], *, inputs: set[int], weights: set[int]) -> _Plan:
    order = _children_first(roots)
    leaves = [_variable(node) for node in order if _is_leaf(node)]
    bit_of = {id(leaf): 1 << i for i, leaf in enumerate(leaves)}
    reach: dict[Node, int] = {}  # the leaves behind each node, a bit each
    for node, children in order.items():
        own = bit_of[id(_variable(node))] if _is_leaf(node) else 0
        for child in children:
            own |= reach[child]
        reach[node] = own
    to_inputs = sum(bit_of[id(leaf)] for leaf in leaves if id(leaf) in inputs)
    chosen = sum(bit_of[id(leaf)] for leaf in leaves if id(leaf) in weights - inputs)

    # Branches that lead to a chosen weight and to no input. What else hangs on such a branch
    # (the scale of a normalised weight) moves along, or the branch would run twice.
    branches = [n for n in order if not reach[n] & to_inputs and not _is_leaf(n)]
    grown = -1
    while grown != chosen:
        grown = chosen
        for node in branches:
            if reach[node] & chosen:
                chosen |= reach[node]

    # Leaves that share a starting point form a group.
    starts: list[tuple[Node, int]] = []  # (node, the chosen leaves that it starts)
    for node in order:
        if reach[node] & to_inputs:
            mask = 0
            for child in order[node]:
                if not reach[child] & to_inputs:
                    mask |= reach[child] & chosen
        else:
            mask = reach[node] & chosen if node in roots else 0
        if mask:
            starts.append((node, mask))
    groups: list[_Group] = []
    refused: dict[torch.Tensor, str] = {}
    late = 0
    for mask in _merge([mask for _, mask in starts]):
        nodes = [node for node, own in starts if own & mask]
        members = [leaf for leaf in leaves if bit_of[id(leaf)] & mask]
        forks = [node for node in nodes if reach[node] & to_inputs]
        why = _objection(forks, order, reach, to_inputs=to_inputs, mask=mask)
        if why is not None:
            refused |= dict.fromkeys(members, why)
            continue
        late |= mask
        groups.append(
            _Group(
                leaves=members,
                forks=forks,
                tops={node for node in nodes if not reach[node] & to_inputs},
                edges=[],
                grads=[],
            )
        )
    early = [leaf for leaf in leaves if not bit_of[id(leaf)] & late]
    return _Plan(groups, early, refused)


def _objection(
    forks: Sequence[Node],
    order: dict[Node, list[Node]],
    reach: dict[Node, int],
    *,
    to_inputs: int,
    mask: int,
) -> str | None:
    """Why a group cannot wait; None when it can."""
    for fork in forks:
        if isinstance(fork, BackwardCFunction):
            name = type(fork).__name__.removesuffix("Backward")
            return f"custom autograd Function {name} would run twice"
        if any(reach[c] & to_inputs and reach[c] & mask for c in order[fork]):
            return "it is used at several places of the layer, one behind the other"
    return None


def _merge(masks: Sequence[int]) -> list[int]:
    """Sets of bits, joined where they meet."""
    joined: list[int] = []
    for mask in masks:
        apart = []
        for other in joined:
            if other & mask:
                mask |= other
            else:
                apart.append(other)
        joined = [*apart, mask]
    return joined


def _children_first(roots: Sequence[Node]) -> dict[Node, list[Node]]:
    """Every node behind the roots with its children, each after all of its children."""
    order: dict[Node, list[Node]] = {}
    seen: set[Node] = set()
    stack: list[tuple[Node, list[Node] | None]] = [(root, None) for root in reversed(roots)]
    while stack:
        node, children = stack.pop()
        if children is not None:
            order[node] = children
        elif node not in seen:
            seen.add(node)
            children = [child for child, _ in node.next_functions if child is not None]
            stack.append((node, children))
            stack += [(child, None) for child in children if child not in seen]
    return order


def _keeper(group: _Group, fork: Node) -> Callable[[tuple[torch.Tensor, ...]], None]:
    def keep(grads: tuple[torch.Tensor, ...]) -> None:
        for number, grad in enumerate(grads):
            if grad is not None:
                group.enter(GradientEdge(fork, number), grad)

    return keep


def _is_leaf(node: Node) -> bool:
    return node.name() == "torch::autograd::AccumulateGrad"


def _variable(node: Node) -> torch.Tensor:
    variable: torch.Tensor = node.variable  # type: ignore[attr-defined]
    return variable
