"""What cannot be a chain says where in the user's code, why, and what to do."""

from __future__ import annotations

import pytest
import torch

from deepopt import convert_to_deepopt
from deepopt.errors import InputError, TrainingError
from support import nasty_models

X = torch.rand(4, 6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("BranchingOnLayers", r"nasty_models\.py:\d+: .*__bool__ of the result of"),
        (
            "Collecting",
            r"nasty_models\.py:\d+: .*goes on holding a tensor \[4, 16\] .* inside blocks\.1",
        ),
        ("Differentiating", r"nasty_models\.py:\d+: .*computes gradients \(grad\)"),
        ("Replacing", "another tensor in the place of buffer calls"),
        ("SharedMemory", r"nasty_models\.py:\d+: mul_ writes to memory that another tensor"),
        ("Carrying", r"nasty_models\.py:\d+: blocks\.0 is given a Cache that carries tensors"),
    ],
)
def test_a_forward_that_cannot_be_cut_is_refused_with_its_place(
    name: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as refused:
        convert_to_deepopt(getattr(nasty_models, name)(), example_inputs=X)
    assert refused.value.remedy


def test_an_example_of_the_wrong_shape_is_refused_where_the_model_fails() -> None:
    with pytest.raises(
        InputError, match=r"Skips raised RuntimeError: .*shapes.* \(.*\.py:\d+\)"
    ):
        convert_to_deepopt(nasty_models.Skips(), example_inputs=torch.rand(4, 5))


def test_no_example_and_no_names_is_refused() -> None:
    with pytest.raises(InputError, match="a Skips does not name its layers") as refused:
        convert_to_deepopt(nasty_models.Skips())
    assert "example_inputs" in refused.value.remedy


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="parallel_mode 'ring' is unknown"):
        convert_to_deepopt(nasty_models.Skips(), "ring", X)  # type: ignore[arg-type]


def test_a_branch_that_goes_another_way_in_training_stops_it() -> None:
    converted = convert_to_deepopt(nasty_models.Branching(), example_inputs=X)
    converted(torch.rand(4, 6))
    with pytest.raises(TrainingError, match=r"nasty_models\.py:\d+: .*would go another way"):
        converted(-X)


def test_what_cannot_be_followed_leaves_the_model_as_it_was() -> None:
    model = nasty_models.BranchingOnLayers().eval()
    with pytest.raises(InputError):
        convert_to_deepopt(model, example_inputs=X)
    assert type(model.head) is torch.nn.Linear
    assert not model.head.training
    assert (
        torch.autograd.Function.__dict__["apply"].__func__.__module__
        == "torch.autograd.function"
    )
