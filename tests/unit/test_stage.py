"""A stage runs its layers where they are, whatever device its tensors come from."""

from __future__ import annotations

import torch

from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.stage import Layer, Stage


def test_batches_go_to_the_device_of_the_layers() -> None:
    device = torch.device("meta")  # the only second device there is everywhere
    module = torch.nn.Linear(4, 3, device=device)
    parameters = {f"layer.{name}": p for name, p in module.named_parameters()}
    stage = Stage(
        0,
        [Layer(index=0, name="layer", module=module, parameters=parameters)],
        gradients=StageGradients(parameters, apart=(), groups=(0,), device=device),
        group_of={0: 0},
        seed=0,
        device=device,
        num_microbatches=1,
        loss=torch.nn.functional.mse_loss,
    )
    stage.begin_step(1)
    stage.forward(0, (torch.zeros(2, 4),), torch.zeros(2, 3))
    stage.backward(0)
    assert stage.losses[0].device == device
