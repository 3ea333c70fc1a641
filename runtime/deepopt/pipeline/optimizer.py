"""The update: global-norm clipping, and one optimizer per layer over fp32 masters.

State belongs to a layer: what `export_state` gives is keyed by parameter name and does not know
which worker, stage or placement it came from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch.optim.adamw import adamw

from deepopt.config import OptimizerConfig
from deepopt.errors import CheckpointError
from deepopt.pipeline.stage import Layer

_NORM_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_, whose bits we keep


class LayerOptimizer(ABC):
    """What updates one layer: its masters, and moments by parameter and field.

    Args:
        layer: its parameters may be bf16; then fp32 masters are kept beside them.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._masters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in layer.trainable.items():
            if parameter.dtype == torch.float32:
                self._masters[name] = parameter
            else:
                self._masters[name] = torch.nn.Parameter(parameter.detach().float())
        self._saved: list[torch.Tensor] | None = None

    def save(self) -> None:
        """Keep a copy of the masters and moments as they are: twice their memory from the first
        call on."""
        state = self._state()
        if self._saved is None:
            self._saved = [torch.empty_like(tensor) for tensor in state]
        _copy(self._saved, state)

    def restore(self) -> None:
        """Make weights and moments what they were at the last `save`, bit for bit."""
        assert self._saved is not None, "restore() before save()"
        _copy(self._state(), self._saved)
        self._copy_masters()

    def _state(self) -> list[torch.Tensor]:
        """Everything that an update changes."""
        masters = [master.detach() for master in self._masters.values()]
        moments = [value for fields in self._moments().values() for value in fields.values()]
        return [*masters, *moments]

    @abstractmethod
    def step(self, grads: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """Update the layer.

        Args:
            grads: fp32, by parameter name, already clipped.
            learning_rate: of this step.
        """

    @abstractmethod
    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """The state of each parameter: the same fields of the same shapes at any time."""

    @abstractmethod
    def _set_moments(self, moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take over what `_moments` gave, of the same shapes."""

    @torch.no_grad()
    def _copy_masters(self) -> None:
        for name, parameter in self.layer.trainable.items():
            if self._masters[name] is not parameter:
                parameter.copy_(self._masters[name])

    def export_state(self) -> dict[str, torch.Tensor]:
        """The layer's state by key of `LayerState`: the live tensors, not copies."""
        full = {**self.layer.parameters, **self._masters, **self.layer.frozen}
        tensors = {f"parameter/{name}": full[name].detach() for name in self.layer.parameters}
        tensors |= {f"buffer/{name}": buffer for name, buffer in self.layer.buffers.items()}
        for name, moments in self._moments().items():
            tensors |= {f"optimizer/{name}/{field}": value for field, value in moments.items()}
        return tensors

    def load_state(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take over a state that `export_state` of the same layer gave, on whatever worker.

        Args:
            tensors: as from `export_state`; copied.

        Raises:
            CheckpointError: a parameter is missing or has another shape.
        """
        with torch.no_grad():
            for name, parameter in self.layer.parameters.items():
                value = _fetch(tensors, f"parameter/{name}", parameter)
                parameter.copy_(value)
                if name in self._masters:
                    self._masters[name].copy_(value)
                if name in self.layer.frozen:
                    self.layer.frozen[name].copy_(value)
            for name, buffer in self.layer.buffers.items():
                buffer.copy_(_fetch(tensors, f"buffer/{name}", buffer))
            self._set_moments(
                {
                    name: {
                        field: _fetch(tensors, f"optimizer/{name}/{field}", value)
                        for field, value in fields.items()
                    }
                    for name, fields in self._moments().items()
                }
            )


class AdamWOptimizer(LayerOptimizer):
    """AdamW with decoupled decay (arXiv:1711.05101).

    The arithmetic is torch's functional `adamw`; its `Optimizer` class would import torch's
    compiler into every worker. On CPU it is the fused one, which goes through memory once. It knows
    no strides: masters that are not contiguous go through torch's loop of operations, as on GPUs.
    Which one a parameter gets depends on nothing but the parameter, or its bits would depend on
    the placement.

    Args:
        layer: as for `LayerOptimizer`.
        config: the job's optimizer section.
    """

    def __init__(self, layer: Layer, config: OptimizerConfig) -> None:
        super().__init__(layer)
        self._config = config
        self._own = {
            name: {
                "step": torch.zeros((), dtype=torch.float32),
                "exp_avg": torch.zeros_like(master.data),
                "exp_avg_sq": torch.zeros_like(master.data),
            }
            for name, master in self._masters.items()
        }
        self._alike: dict[tuple[bool, bool], list[str]] = defaultdict(list)  # (decays, fused)
        for name, master in self._masters.items():
            # Decay acts on matrices; gains, biases and other vectors are left alone.
            decays = master.dim() >= 2
            fused = master.device.type == "cpu" and master.is_contiguous()
            self._alike[decays, fused].append(name)

    def step(self, grads: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """Update the layer.

        Args:
            grads: fp32, by parameter name, already clipped.
            learning_rate: of this step.
        """
        with torch.no_grad():
            for (decays, fused), names in self._alike.items():
                self._adamw(
                    names,
                    grads,
                    learning_rate,
                    weight_decay=self._config.weight_decay if decays else 0.0,
                    fused=fused,
                )
        self._copy_masters()

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        return self._own

    def _set_moments(self, moments: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        for name, fields in self._own.items():
            for field, value in fields.items():
                value.copy_(moments[name][field])

    def _adamw(
        self,
        names: Sequence[str],
        grads: Mapping[str, torch.Tensor],
        learning_rate: float,
        *,
        weight_decay: float,
        fused: bool,
    ) -> None:
        moments = [self._own[name] for name in names]
        beta1, beta2 = self._config.betas
        adamw(
            [self._masters[name] for name in names],
            [grads[name].contiguous() if fused else grads[name] for name in names],
            [m["exp_avg"] for m in moments],
            [m["exp_avg_sq"] for m in moments],
            [],
            [m["step"] for m in moments],
            foreach=False,  # others differ in the last bit
            fused=fused,
            capturable=False,
            amsgrad=False,
            maximize=False,
            beta1=beta1,
            beta2=beta2,
            lr=learning_rate,
            weight_decay=weight_decay,
            eps=self._config.eps,
        )


@torch.no_grad()
def _copy(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _fetch(tensors: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(
            f"{key} is missing from the layer's state",
            remedy="it was written by another model or another version of deepopt: use those, or start a "
            "new run",
        )
    if tensors[key].shape != like.shape:
        raise CheckpointError(
            f"{key} has shape {list(tensors[key].shape)}, the model wants {list(like.shape)}"
        )
    return tensors[key]


def clip_coefficient(norms: Sequence[float], *, max_norm: float | None) -> tuple[float, float]:
    """The global gradient norm and what to multiply gradients with.

    Args:
        norms: fp32 norm of each parameter's gradient, tied ones once, in model order.
        max_norm: None means no clipping.

    Returns:
        (global norm before clipping, coefficient in (0, 1]). Bit for bit those of
        `torch.nn.utils.clip_grad_norm_`.
    """
    total = torch.linalg.vector_norm(torch.tensor(norms, dtype=torch.float32))
    if max_norm is None:
        return total.item(), 1.0
    coefficient = torch.clamp(max_norm / (total + _NORM_EPSILON), max=1.0)
    return total.item(), coefficient.item()
