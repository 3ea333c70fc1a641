"""Gradients of one stage, kept apart by micro-batch group until they are summed.

A stage's gradients live in one fp32 matrix [local groups, elements]. Inside a group autograd
adds micro-batch after micro-batch straight into the group's row; `reduction` sums the rows in
the order of the groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

_ALIGNMENT = 16  # elements: 64 bytes, a cache line and the widest vector load


class StageGradients:
    """Gradient storage of one stage copy.

    Args:
        parameters: trainable parameters by fully qualified name, in chain order.
        apart: names whose gradients are summed over several uses (tied weights): they lie
            behind the others, each in a region of its own.
        groups: global indices of the groups this copy owns, ascending.
        device: where the parameters are.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        apart: Sequence[str],
        groups: Sequence[int],
        device: torch.device,
    ) -> None:
        self.groups = tuple(groups)
        self._parameters = dict(parameters)
        self._regions: dict[str, slice] = {}
        offset = 0
        names = [n for n in parameters if n not in apart]
        for name in (*names, *(n for n in parameters if n in apart)):
            if name in apart and "own" not in self._regions:
                self._regions["own"] = slice(0, offset)
            numel = parameters[name].numel()
            self._regions[f"/{name}"] = slice(offset, offset + numel)
            offset += -(-numel // _ALIGNMENT) * _ALIGNMENT
        self._regions.setdefault("own", slice(0, offset))
        self.rows = torch.zeros(len(self.groups), offset, dtype=torch.float32, device=device)
        self._views = [
            [
                row[self._regions[f"/{name}"]].view(parameter.shape)
                for name, parameter in self._parameters.items()
            ]
            for row in self.rows
        ]
        # Autograd can add into a gradient only of the parameter's own type.
        self._in_place = all(p.dtype == torch.float32 for p in parameters.values())
        self._aimed: int | None = None

    @property
    def own(self) -> slice:
        """Columns of the parameters with a single use."""
        return self._regions["own"]

    def region(self, name: str) -> slice:
        """Columns of one parameter."""
        return self._regions[f"/{name}"]

    def zero(self) -> None:
        """Forget the last step."""
        self.rows.zero_()
        self._aimed = None

    def aim(self, group: int) -> None:
        """Make the coming backward add into a group's row.

        Args:
            group: global index of the group.
        """
        row = self.groups.index(group)
        if self._aimed == row:
            return
        self._aimed = row
        for parameter, view in zip(self._parameters.values(), self._views[row], strict=True):
            parameter.grad = view if self._in_place else None

    def collect(self) -> None:
        """Add what the last backward left beside the rows: bf16 gradients, into fp32."""
        if self._in_place:
            return
        assert self._aimed is not None, "collect() before aim()"
        for parameter, view in zip(
            self._parameters.values(), self._views[self._aimed], strict=True
        ):
            if parameter.grad is not None:
                view.add_(parameter.grad)
                parameter.grad = None

    def totals(self) -> dict[str, torch.Tensor]:
        """The summed gradients by name, after reduction: views of row 0, fp32."""
        return dict(zip(self._parameters, self._views[0], strict=True))
