"""A job that gives only its batch gets the number of micro-batches whose step is the shortest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from deepopt.config import JobConfig
from deepopt.errors import PlanError
from deepopt.job_file import dump_job, load_job
from deepopt.launch.batch_choice import with_microbatches
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.microbatch_count import (
    MOST_TRIED,
    TriedCount,
    choose_count,
    counts_to_try,
    with_count,
)
from deepopt.planner.plan_text import write_plan_file
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton
from support.plan_files import plan_file

LAYERS = 4
MODEL = ModelSkeleton(
    factory="package.module:build",
    kwargs={},
    layers=tuple(
        LayerSkeleton(name=f"blocks.{i}", kind="Block", parameters=()) for i in range(LAYERS)
    ),
)


def job(batch_size: int, **sections: dict[str, Any]) -> JobConfig:
    sections["training"] = {"batch_size": batch_size, **sections.get("training", {})}
    return JobConfig.model_validate({"pipeline": {"schedule": "1f1b"}, **sections})


def chosen(
    fixed_s: float, *, held_bytes: float = 0.0, memory_bytes: float | None = None
) -> tuple[int, tuple[TriedCount, ...]]:
    """Four ranks on which a layer takes a fixed time and one for each of 32 sequences."""

    def costs_of(sized: JobConfig) -> LayerCosts:
        size = sized.training.microbatch_size
        return LayerCosts(
            forward_s=(fixed_s + size,) * LAYERS,
            input_s=(fixed_s + size,) * LAYERS,
            weight_s=(0.0,) * LAYERS,
            activation_bytes=(held_bytes * size,) * LAYERS,
            memory_bytes=() if memory_bytes is None else (memory_bytes,) * 4,
            source="measured",
        )

    found, tried = choose_count(job(32), MODEL, num_workers=4, cores=None, costs_of=costs_of)
    assert found.training.batch_size is None
    assert found.training.microbatches * found.training.microbatch_size == 32
    return found.training.microbatches, tried


def test_many_fill_the_pipeline_until_what_each_costs_on_top_weighs_more() -> None:
    counts = [chosen(fixed_s)[0] for fixed_s in (0.0, 1.0, 4.0, 100.0)]
    assert counts[0] == 32
    assert counts[-1] == 2
    assert counts == sorted(counts, reverse=True)
    assert len(set(counts)) > 2


def test_what_does_not_fit_the_memory_is_not_taken_and_the_reason_is_kept() -> None:
    assert chosen(100.0, held_bytes=1.0)[0] == 2
    # Two micro-batches of 16 sequences in flight are 32 bytes on the first rank.
    count, tried = chosen(100.0, held_bytes=1.0, memory_bytes=20.0)
    assert count > 2
    assert tried[0].step_s is None
    assert tried[0].reason
    with pytest.raises(PlanError, match="fits in no number of micro-batches"):
        chosen(1.0, held_bytes=1.0, memory_bytes=0.5)


@given(
    batch_size=st.integers(1, 512),
    ranks=st.integers(1, 16),
    replicas=st.integers(1, 4),
    groups=st.none() | st.integers(1, 8),
)
def test_every_count_cuts_the_batch_evenly_over_the_replicas(
    batch_size: int, ranks: int, replicas: int, groups: int | None
) -> None:
    counts = counts_to_try(batch_size, ranks=ranks, replicas=replicas, groups=groups)
    assert len(counts) <= MOST_TRIED
    assert list(counts) == sorted(set(counts))
    for count in counts:
        assert batch_size % count == 0
        assert count % replicas == 0
        assert count >= (groups or 1)


def test_a_batch_that_cannot_be_shared_is_refused_with_what_would_do() -> None:
    with pytest.raises(PlanError, match="3 cannot be cut") as raised:
        choose_count(
            job(3, parallel={"data": 2}),
            MODEL,
            num_workers=4,
            cores=None,
            costs_of=lambda _: None,
        )
    assert "multiple of 2" in raised.value.remedy


def test_a_chosen_count_is_part_of_the_job_from_then_on(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(dump_job(with_count(job(32), 8)))
    training = load_job(path).training
    assert (training.microbatches, training.microbatch_size) == (8, 4)
    assert training.batch_size is None


def test_the_batch_is_said_once() -> None:
    with pytest.raises(ValidationError, match="batch_size 32 with microbatches"):
        job(32, training={"microbatches": 8})


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"cluster": {"address": "host:1"}}, "other machines"),
        ({"worker": {"device": "emulated"}}, "stated for one size"),
        ({"data": {"dataset": "package.module:build"}}, "batches have one size"),
    ],
)
def test_what_cannot_be_tried_before_the_launch_is_refused(
    sections: dict[str, Any], why: str
) -> None:
    with pytest.raises(PlanError, match=why):
        with_microbatches(job(32, **sections), num_workers=4, cores=None)


def test_a_plan_file_says_the_count(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(write_plan_file(plan_file()))  # 4 micro-batches of 4 sequences
    found, tried = with_microbatches(job(16), num_workers=2, cores=None, plan_file=path)
    assert (found.training.microbatches, found.training.microbatch_size) == (4, 4)
    assert not tried
    with pytest.raises(PlanError, match="4 micro-batches of 4 sequences, the job"):
        with_microbatches(job(32), num_workers=2, cores=None, plan_file=path)
