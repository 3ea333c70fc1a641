"""Gradients of a stage: what autograd leaves, by group, and their sums."""

from __future__ import annotations

import pytest
import torch

from deepopt.pipeline.gradients import StageGradients

CPU = torch.device("cpu")


class Doubling(torch.autograd.Function):
    """A weight whose gradient lies in memory that somebody else needs again."""

    kept: torch.Tensor

    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: object, grad: torch.Tensor) -> torch.Tensor:
        Doubling.kept = grad * 2
        return Doubling.kept.view(-1).view(grad.shape)


def gradients(
    parameters: dict[str, torch.nn.Parameter], *, groups: int = 2, exchanged: bool = False
) -> StageGradients:
    return StageGradients(
        parameters, apart=(), groups=range(groups), device=CPU, exchanged=exchanged
    )


def run_backward(stage: StageGradients, group: int, loss: torch.Tensor) -> None:
    stage.aim(group)
    loss.backward()  # type: ignore[no-untyped-call]
    stage.collect()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exchanged", [False, True])
def test_groups_are_kept_apart_and_summed_in_their_order(
    exchanged: bool, dtype: torch.dtype
) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 5, dtype=dtype))
    stage = gradients({"w": weight}, exchanged=exchanged)
    terms = [torch.randn(3, 5).to(dtype) for _ in range(4)]
    for _ in range(2):  # nothing is left of the step before
        stage.zero()
        for group, term in zip((0, 1, 0, 1), terms, strict=True):
            run_backward(stage, group, (weight * term).sum())
        stage.finish()
        stage.sum_groups()
        wide = [term.float() for term in terms]
        if exchanged:
            assert torch.equal(stage.rows[0, :15].view(3, 5), wide[0] + wide[2])
            assert torch.equal(stage.rows[1, :15].view(3, 5), wide[1] + wide[3])
        else:
            expected = (wide[0] + wide[2]) + (wide[1] + wide[3])
            assert torch.equal(stage.totals()["w"], expected)


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_parameter_that_was_not_used_has_zeros(exchanged: bool) -> None:
    used, never = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    once = torch.nn.Parameter(torch.ones(2))
    stage = gradients({"used": used, "never": never, "once": once}, exchanged=exchanged)
    stage.rows.fill_(7.0)  # of a step before
    run_backward(stage, 0, used.sum())
    run_backward(stage, 1, used.sum() + once.sum())
    stage.finish()
    if exchanged:
        assert stage.rows[:, stage.region("never")].tolist() == [[0.0, 0.0]] * 2
        assert stage.rows[:, stage.region("once")].tolist() == [[0.0, 0.0], [1.0, 1.0]]
        return
    stage.sum_groups()
    totals = {name: total.tolist() for name, total in stage.totals().items()}
    assert totals == {"used": [2.0, 2.0], "never": [0.0, 0.0], "once": [1.0, 1.0]}


def test_adding_to_a_gradient_changes_no_tensor_that_shares_its_memory() -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    stage = gradients({"w": weight}, groups=1)
    for _ in range(2):
        out: torch.Tensor = Doubling.apply(weight)  # type: ignore[no-untyped-call]
        run_backward(stage, 0, out.sum())
        if stage.totals()["w"][0] == 2.0:
            first = Doubling.kept
    assert stage.totals()["w"].tolist() == [4.0] * 4
    assert first.tolist() == [2.0] * 4


def test_a_first_gradient_is_taken_without_a_copy_where_it_is_the_only_one() -> None:
    weight = torch.nn.Parameter(torch.ones(4, 4))
    stage = gradients({"w": weight}, groups=1)
    stage.aim(0)
    torch.nn.functional.linear(torch.ones(2, 4), weight).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    there = weight.grad.data_ptr()
    stage.collect()
    assert stage.totals()["w"].data_ptr() == there


@pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout")
def test_sparse_and_transposed_gradients_become_dense_and_contiguous() -> None:
    table = torch.nn.Embedding(4, 2, sparse=True)
    turned = torch.nn.Parameter(torch.ones(3, 2).t())
    stage = gradients({"table": table.weight, "turned": turned}, groups=1)
    for _ in range(2):
        loss = table(torch.tensor([1, 1, 3])).sum() + (turned * torch.arange(3.0)).sum()
        run_backward(stage, 0, loss)
    totals = stage.totals()
    assert totals["table"].tolist() == [[0.0, 0.0], [4.0, 4.0], [0.0, 0.0], [2.0, 2.0]]
    assert totals["turned"].is_contiguous()
    assert totals["turned"].tolist() == [[0.0, 2.0, 4.0]] * 2


def test_scaling_multiplies_the_sums_also_where_there_are_none() -> None:
    gradients({}, exchanged=True).scale(0.5)
    weight = torch.nn.Parameter(torch.ones(2))
    stage = gradients({"w": weight}, groups=1)
    run_backward(stage, 0, weight.sum())
    stage.scale(0.5)
    assert stage.totals()["w"].tolist() == [0.5, 0.5]
