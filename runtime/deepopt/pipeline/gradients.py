"""Gradients of one stage, kept apart by micro-batch group until they are summed.

Inside a group autograd adds micro-batch after micro-batch into one fp32 tensor a parameter: the
first gradient is taken as it is, so nothing is zeroed and nothing is added to zeros. Where other
workers hold terms of the same sum, and for tied weights, the tensors are regions of one matrix
[local groups, elements], which `reduction` sends and sums; elsewhere `sum_groups` adds them up. Both
sum in the order of the groups.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

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
        exchanged: whether other workers hold groups of this stage, so that all its gradients lie in
            `rows`; otherwise only those of `apart` do.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        *,
        apart: Collection[str],
        groups: Sequence[int],
        device: torch.device,
        exchanged: bool = False,
    ) -> None:
        self.groups = tuple(groups)
        self._names = tuple(parameters)
        self._parameters = tuple(parameters.values())
        in_rows = [name for name in parameters if exchanged and name not in apart]
        self._regions: dict[str, slice] = {}
        end = 0
        for name in in_rows:
            end = self._add_region(name, parameters[name].numel(), start=end)
        self.own = slice(0, end)  # columns of the parameters with a single use
        for name in (name for name in parameters if name in apart):
            end = self._add_region(name, parameters[name].numel(), start=end)
        self.rows = torch.zeros(len(self.groups), end, dtype=torch.float32, device=device)
        self._views = [
            [
                row[self._regions[name]].view(parameter.shape)
                if name in self._regions
                else None
                for name, parameter in parameters.items()
            ]
            for row in self.rows
        ]
        # Autograd can add into a gradient only of the parameter's own type.
        self._in_place = [p.dtype == torch.float32 for p in self._parameters]
        self._sums: list[list[torch.Tensor | None]] = []
        self._open: list[list[int]] = []  # positions that `collect` has still to look at
        self._aimed: int | None = None
        self.zero()

    def region(self, name: str) -> slice:
        """Columns of a parameter that lies in `rows`."""
        return self._regions[name]

    def zero(self) -> None:
        """Forget the last step."""
        self._aimed = None
        everything = range(len(self._parameters))
        self._sums = [[None for _ in everything] for _ in self.groups]
        self._open = [list(everything) for _ in self.groups]
        for parameter in self._parameters:
            parameter.grad = None

    def aim(self, group: int) -> None:
        """Make the coming backward add to a group.

        Args:
            group: global index of the group.
        """
        row = self.groups.index(group)
        if self._aimed == row:
            return
        self._aimed = row
        for parameter, in_place, total in zip(
            self._parameters, self._in_place, self._sums[row], strict=True
        ):
            parameter.grad = total if in_place else None

    def collect(self) -> None:
        """Take what the last backward left: a parameter's first gradient of a group, and bf16
        gradients, which add up in fp32."""
        assert self._aimed is not None, "collect() before aim()"
        row = self._aimed
        if not self._open[row]:
            return
        left = []
        for i in self._open[row]:
            gradient = self._parameters[i].grad
            if gradient is not None:
                self._take(gradient.detach(), row=row, position=i)
            if gradient is None or not self._in_place[i]:
                left.append(i)
        self._open[row] = left

    def finish(self) -> None:
        """Complete the groups when the last backward of a step is done: where a parameter got no
        gradient, it has zeros."""
        for i, parameter in enumerate(self._parameters):
            # Not `None in terms`, which asks each tensor whether it equals None: 10 us each.
            missing = [sums[i] is None for sums in self._sums]
            in_rows = self._views[0][i] is not None
            if not any(missing) or (all(missing) and not in_rows):
                continue
            for sums, views in zip(self._sums, self._views, strict=True):
                if sums[i] is None:
                    view = views[i]
                    sums[i] = _zeros_like(parameter) if view is None else view.zero_()

    @torch.no_grad()
    def sum_groups(self) -> None:
        """Sum the groups, each parameter in the order of the groups; all are held here."""
        for i, name in enumerate(self._names):
            if name in self._regions:
                continue  # `reduction` does that
            first, *others = (sums[i] for sums in self._sums)
            if first is not None:
                for term in others:
                    assert term is not None, "sum_groups() before finish()"
                    first.add_(term)

    def totals(self) -> dict[str, torch.Tensor]:
        """The summed gradients by name, after the reduction, fp32; zeros where there was none."""
        found = {}
        for i, (name, total) in enumerate(zip(self._names, self._sums[0], strict=True)):
            if total is None:
                total = self._sums[0][i] = _zeros_like(self._parameters[i])
            found[name] = total
        return found

    @torch.no_grad()
    def scale(self, coefficient: float) -> None:
        """Multiply the summed gradients."""
        for total in self.totals().values():
            total.mul_(coefficient)

    def _add_region(self, name: str, numel: int, *, start: int) -> int:
        self._regions[name] = slice(start, start + numel)
        return start + -(-numel // _ALIGNMENT) * _ALIGNMENT

    @torch.no_grad()
    def _take(self, gradient: torch.Tensor, *, row: int, position: int) -> None:
        parameter, view = self._parameters[position], self._views[row][position]
        total = self._sums[row][position]
        if not self._in_place[position]:
            parameter.grad = None
            if total is not None:
                total.add_(gradient)
            elif view is not None:
                self._sums[row][position] = view.copy_(gradient)
            else:
                self._sums[row][position] = gradient.to(torch.float32)
            return
        if view is not None:
            gradient = view.copy_(gradient)
        elif gradient.layout is not torch.strided:
            gradient = gradient.to_dense()
        elif not gradient.is_contiguous() or _is_shared(gradient):
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        parameter.grad = self._sums[row][position] = gradient


def _zeros_like(parameter: torch.nn.Parameter) -> torch.Tensor:
    return torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)


def _is_shared(tensor: torch.Tensor) -> bool:
    """Whether other tensors lie in the same memory, so that adding to this one would change them.

    Args:
        tensor: whose caller holds it twice: as this, and as a parameter's gradient.
    """
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) > 3  # and `storage` itself
