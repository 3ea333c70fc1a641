"""The costs of a job's layers as its `emulation` section states them. Pure."""

from __future__ import annotations

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.planner.layer_costs import LayerCosts

_SECONDS = 1e-3  # per millisecond
_BYTES = 1e6  # per megabyte


def emulated_costs(job: JobConfig, *, num_layers: int) -> LayerCosts:
    """What emulated devices and links take for each layer.

    Args:
        job: its `emulation` section gives the figures, `pipeline.recompute` whether there is an R.
        num_layers: layers of the model; a list of figures has one for each.

    Raises:
        PlanError: a list of another length.
    """
    section = job.emulation
    recompute = job.pipeline.recompute != "none"

    def figures(key: str, unit: float) -> tuple[float, ...]:
        value = getattr(section, key)
        if not isinstance(value, tuple):
            return (value * unit,) * num_layers
        if len(value) != num_layers:
            raise PlanError(
                f"emulation.{key} has {len(value)} figures, the model has {num_layers} layers",
                remedy="give one figure for all layers, or a list of one for each",
            )
        return tuple(figure * unit for figure in value)

    prepare_key = "forward_ms" if section.prepare_ms is None else "prepare_ms"
    output_bytes = figures("output_mb", _BYTES)
    rate = section.rate_gb_per_s
    return LayerCosts(
        forward_s=figures("forward_ms", _SECONDS),
        input_s=figures("input_ms", _SECONDS),
        weight_s=figures("weight_ms", _SECONDS),
        prepare_s=figures(prepare_key, _SECONDS) if recompute else (),
        update_s=figures("update_ms", _SECONDS),
        activation_bytes=figures("activation_mb", _BYTES),
        # The first layer's input is the batch: as large as its output, for want of a figure.
        input_bytes=(output_bytes[0], *output_bytes[:-1]) if recompute else (),
        output_bytes=output_bytes,
        gradient_bytes=figures("gradient_mb", _BYTES),
        state_bytes=figures("state_mb", _BYTES),
        rank_factor=section.rank_factor,
        memory_bytes=tuple(size * _BYTES for size in section.memory_mb),
        latency_s=section.latency_ms * _SECONDS,
        bytes_per_s=None if rate is None else rate * 1e9,
        source="emulated",
    )
