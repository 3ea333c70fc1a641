"""The update: global-norm clipping and one optimizer per layer over fp32 masters.

State belongs to a layer: what `export_state` gives is keyed by parameter name and does not know
which worker, stage or placement it came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from deepopt.config import OptimizerConfig
from deepopt.errors import CheckpointError
from deepopt.pipeline.stage import Layer

_NORM_EPSILON = 1e-6  # of torch.nn.utils.clip_grad_norm_, whose bits we keep


class LayerOptimizer:
    """Optimizer, masters and moments of one layer.

    Args:
        layer: its parameters may be bf16; then fp32 masters are kept beside them.
        config: the job's optimizer section.
    """

    def __init__(self, layer: Layer, config: OptimizerConfig) -> None:
        self.layer = layer
        self._masters: dict[str, torch.nn.Parameter] = {}
        for name, parameter in layer.trainable.items():
            if parameter.dtype == torch.float32:
                self._masters[name] = parameter
            else:
                self._masters[name] = torch.nn.Parameter(parameter.detach().float())
        # Decay acts on matrices; gains, biases and other vectors are left alone.
        decayed = [p for p in self._masters.values() if p.dim() >= 2]
        others = [p for p in self._masters.values() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self._optimizer = (
            torch.optim.AdamW(
                [group for group in groups if group["params"]],
                lr=config.learning_rate,
                betas=config.betas,
                eps=config.eps,
                foreach=False,  # one implementation everywhere: others differ in the last bit
                fused=False,
            )
            if self._masters
            else None
        )

    def step(self, grads: Mapping[str, torch.Tensor], learning_rate: float) -> None:
        """Update the layer.

        Args:
            grads: fp32, by parameter name, already clipped.
            learning_rate: of this step.
        """
        if self._optimizer is None:
            return
        for name, master in self._masters.items():
            master.grad = grads[name]
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        for name, parameter in self.layer.trainable.items():
            master = self._masters[name]
            if master is not parameter:
                parameter.data.copy_(master.data)
                master.grad = None

    def export_state(self) -> dict[str, torch.Tensor]:
        """The layer's state by key of `LayerState`: the live tensors, not copies."""
        tensors = {
            f"parameter/{name}": self._masters.get(name, parameter).detach()
            for name, parameter in self.layer.parameters.items()
        }
        tensors |= {f"buffer/{name}": buffer for name, buffer in self.layer.buffers.items()}
        for name, master in self._masters.items():
            assert self._optimizer is not None, "masters without an optimizer"
            for field, value in self._optimizer.state.get(master, {}).items():
                tensors[f"optimizer/{name}/{field}"] = value
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
            for name, buffer in self.layer.buffers.items():
                buffer.copy_(_fetch(tensors, f"buffer/{name}", buffer))
        for name, master in self._masters.items():
            assert self._optimizer is not None, "masters without an optimizer"
            prefix = f"optimizer/{name}/"
            state = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix)
            }
            if state:
                self._optimizer.state[master] = {
                    # `step` stays on the CPU, where torch's AdamW keeps it.
                    field: value.clone()
                    if value.dim() == 0
                    else value.to(master.device, copy=True)
                    for field, value in state.items()
                }


def _fetch(tensors: Mapping[str, torch.Tensor], key: str, like: torch.Tensor) -> torch.Tensor:
    if key not in tensors:
        raise CheckpointError(f"{key} is missing from the layer's state")
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
