"""Orders side by side: every one is right, and none beats its bound or its memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.planner.choose import candidates, compare, evaluate
from deepopt.planner.outcome import SEARCHED, Candidate, Misfit, Outcome
from deepopt.planner.shapes import SHAPES, Shape
from deepopt.planner.sketch import Pipeline, layers_of_ops, two_groups
from deepopt.schedule.builders import BUILDERS
from deepopt.schedule.ir import PlacementKind
from deepopt.schedule.verify import verify

EFFORT = 2_000


def sketch(
    ranks: int, microbatches: int, *, cap: float | None = None, **costs: Any
) -> Pipeline:
    layers = layers_of_ops([(20.0, 22.0, 16.0)], num_ranks=ranks, stages_per_rank=4, **costs)
    return Pipeline(
        num_ranks=ranks, replicas=two_groups(microbatches), layers=layers, memory_cap=cap
    )


def outcome(pipeline: Pipeline, kind: PlacementKind, name: str, per_rank: int = 1) -> Outcome:
    candidate = Candidate(shape=Shape(kind=kind, stages_per_rank=per_rank), schedule=name)
    found = evaluate(pipeline, candidate=candidate, effort=EFFORT, seed=0)
    assert isinstance(found, Outcome), found
    return found


def test_every_builder_is_a_candidate_on_some_placement() -> None:
    tried = candidates(4, most_stages_per_rank=2, with_search=True)
    assert {c.schedule for c in tried} == {*BUILDERS, SEARCHED}
    assert len(set(tried)) == len(tried)
    assert not any(
        c.schedule == SEARCHED for c in candidates(4, most_stages_per_rank=2, with_search=False)
    )


def test_a_reason_that_holds_for_every_candidate_is_said_once() -> None:
    pipeline = sketch(2, 4)
    sizes = (5.0,) * pipeline.layers.num_layers
    layers = replace(
        pipeline.layers, state_bytes=sizes, activation_bytes=sizes, memory_bytes=(4.0, 4.0)
    )
    tried = candidates(2, most_stages_per_rank=1, with_search=True)
    with pytest.raises(PlanError) as error:
        compare(replace(pipeline, layers=layers), tried=tried, effort=EFFORT)
    assert error.value.message.startswith("no placement fits: line, ")
    assert error.value.message.count("alone takes") == 1


def test_one_rank_has_no_mirror() -> None:
    kinds = {c.shape.kind for c in candidates(1, most_stages_per_rank=1, with_search=True)}
    assert kinds == {PlacementKind.LINE, PlacementKind.V}


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 8)),
    st.floats(0, 30),
)
def test_what_is_told_of_every_candidate_is_true(
    ranks: int, microbatches: int, cap: int | None, latency: float
) -> None:
    pipeline = sketch(ranks, microbatches, cap=cap, latency_s=latency)
    for candidate in candidates(ranks, most_stages_per_rank=3, with_search=True):
        found = evaluate(pipeline, candidate=candidate, effort=EFFORT, seed=0)
        if isinstance(found, Misfit):
            assert cap is not None
            continue
        verify(found.schedule, memory_cap=pipeline.stage_cap(found.schedule.placement))
        assert found.gap is not None
        assert found.gap >= -1e-9
        assert max(found.peak_activations) <= (microbatches if cap is None else cap) + 1e-9
        assert found.weight_copies == (2 if candidate.shape.kind is PlacementKind.MIRROR else 1)


def test_figures_of_1f1b_are_the_published_ones() -> None:
    found = outcome(sketch(4, 8), PlacementKind.LINE, "1f1b")
    assert found.timeline.makespan_s == pytest.approx((8 + 3) * 58)
    assert found.peak_activations == (4, 3, 2, 1)
    assert found.num_transfers == 2 * 3 * 8
    # Interleaved: the bubble divided by v.
    two = outcome(sketch(4, 8), PlacementKind.LINE, "interleaved_1f1b", 2)
    assert two.timeline.makespan_s == pytest.approx((8 + 3 / 2) * 58)


def test_activations_are_counted_in_shares_of_a_rank() -> None:
    found = outcome(sketch(4, 16), PlacementKind.V, "zb_v", 2)
    assert max(found.peak_activations) == 4


def test_a_second_copy_is_charged() -> None:
    free = outcome(sketch(4, 8), PlacementKind.MIRROR, "bi_stream")
    charged = outcome(
        sketch(4, 8, update_s=5.0, exchange_s=7.0), PlacementKind.MIRROR, "bi_stream"
    )
    assert charged.timeline.makespan_s >= free.timeline.makespan_s + 2 * 5.0
    line = outcome(sketch(4, 8, update_s=5.0, exchange_s=7.0), PlacementKind.LINE, "1f1b")
    assert line.timeline.makespan_s == pytest.approx((8 + 3) * 58 + 5.0)


def test_what_does_not_fit_says_why() -> None:
    candidate = Candidate(shape=SHAPES[0], schedule="zb_h2")
    found = evaluate(sketch(4, 8, cap=4), candidate=candidate, effort=1, seed=0)
    assert isinstance(found, Misfit)
    assert found.reason == "holds activations of 7 micro-batches on a rank, the cap is 4"


def test_a_tie_prefers_fewer_copies_then_less_memory() -> None:
    pipeline = sketch(4, 8)
    h1 = outcome(pipeline, PlacementKind.LINE, "1f1b")
    gpipe = outcome(pipeline, PlacementKind.LINE, "gpipe")
    assert h1.timeline.makespan_s == pytest.approx(gpipe.timeline.makespan_s)
    assert h1.preference < gpipe.preference


def test_steps_that_overlap_are_chosen_by_what_a_step_takes_among_others() -> None:
    pipeline = replace(sketch(4, 8), overlap=True)
    found = outcome(pipeline, PlacementKind.LINE, SEARCHED)
    assert found.step_s == found.timeline.steady_s < found.timeline.makespan_s
    assert found.lower_bound_s == max(found.timeline.busy_s)
    apart = outcome(sketch(4, 8), PlacementKind.LINE, SEARCHED)
    assert found.step_s <= apart.timeline.steady_s
