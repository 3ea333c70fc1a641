"""What peft would save of a model with adapters: which weights, their names in its file, its settings."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from deepopt.errors import InputError


def adapter_parts(model: Any) -> tuple[dict[str, str], dict[str, str]]:
    """The active adapter of a peft model.

    Args:
        model: a `PeftModel`; its weights are not looked at.

    Returns:
        (name -> content of the files beside the weights, name in the `state_dict` -> name in peft's file).

    Raises:
        InputError: several adapters are active.
    """
    from peft import get_peft_model_state_dict

    active = list(model.active_adapters)
    if len(active) != 1:
        raise InputError(
            f"{len(active)} adapters are active ({', '.join(active)}): one folder holds one",
            remedy="model.set_adapter(name) in the model's factory; or use --format weights",
        )
    # Values that can be told apart stand for the weights: peft says which it keeps and how it calls them.
    state = dict(model.state_dict())
    names = {id(value): name for name, value in state.items()}
    kept = get_peft_model_state_dict(model, state_dict=state, adapter_name=active[0])
    config = copy.deepcopy(model.peft_config[active[0]])
    config.inference_mode = True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        beside = {path.name: path.read_text() for path in sorted(Path(folder).glob("*.json"))}
    return beside, {names[id(value)]: name for name, value in kept.items()}
