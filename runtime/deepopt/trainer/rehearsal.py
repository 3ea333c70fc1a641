"""What of a script's model, data and optimizer can be seen not to fit before any process is started."""

from __future__ import annotations

import torch

from deepopt.config import JobConfig
from deepopt.convert import build_chain
from deepopt.convert.chain import Chain, chain_of_named, named_layers
from deepopt.convert.example import Example, example_of
from deepopt.convert.places import failure
from deepopt.pipeline.update_rule import TorchRule


def rehearse(model: torch.nn.Module, job: JobConfig) -> None:
    """Make the optimizer once; show a model that names its layers itself the first micro-batch.

    Other models are shown it when they are recorded. Nothing changes in the model.

    Args:
        model: of the script, with values.
        job: of it.

    Raises:
        InputError: the optimizer or its scheduler cannot be made or leaves a parameter out, the data give no
            batch, or the model cannot take it.
    """
    if job.optimizer.factory is not None:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if trained:
            TorchRule(job.optimizer).check(trained)
    if named_layers(model) is not None:
        _show(model, job, example_of(job))


def _show(model: torch.nn.Module, job: JobConfig, example: Example) -> None:
    values = (*example.args, *example.kwargs.values())
    try:
        # Without values or memory.
        _run(build_chain(job, device="meta"), tuple(value.to("meta") for value in values))
    except Exception:  # noqa: BLE001 - the user's modules may raise anything, also because there are no values
        layers = named_layers(model)
        assert layers is not None, "checked before"
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        was_training = model.training
        model.eval()  # so that no running statistics change
        try:
            _run(chain_of_named(model, layers), tuple(value.to(device) for value in values))
        except Exception as error:
            raise failure(model, error) from error
        finally:
            model.train(was_training)


def _run(chain: Chain, values: tuple[torch.Tensor, ...]) -> None:
    with torch.no_grad():
        for layer in chain.layers:
            output = layer.module(*values)
            values = (output,) if isinstance(output, torch.Tensor) else tuple(output)
