"""Layers that write to their inputs, pass masks on, turn tensors round or share modules: cut,
recomputed or whole, they train to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.worker_processes import losses_of, make_plan, tiny_job, train

STEPS = 3

CUT = {"boundaries": (0, 2), "pipeline_size": 2}
FOLDED = {
    "boundaries": (0, 2, 3, 4),
    "pipeline_size": 2,
    "placement": "v",
    "schedule": "zb_v",
}


@pytest.mark.parametrize(
    ("factory", "where", "recompute"),
    [
        pytest.param("in_place", FOLDED, "none", id="in-place-cut"),
        pytest.param("in_place", CUT, "full", id="in-place-recomputed"),
        pytest.param("masked", CUT, "full", id="tensor-without-gradient-recomputed"),
        pytest.param("turned", CUT | {"boundaries": (0, 4)}, "none", id="not-contiguous-cut"),
        pytest.param("turned", {}, "full", id="not-contiguous-recomputed"),
        pytest.param("shared_norm", CUT, "none", id="shared-module-cut"),
        pytest.param("mixed", FOLDED, "none", id="weights-that-wait-in-different-ways"),
        pytest.param("mixed", FOLDED, "full", id="weights-that-wait-recomputed"),
    ],
)
def test_losses_equal_those_of_one_process(
    factory: str, where: dict[str, Any], recompute: str, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": {"factory": f"support.chains:{factory}", "kwargs": {}},
        "optimizer": {"learning_rate": 3e-2},
    }
    alone = tiny_job(**sections)
    job = tiny_job(**sections, pipeline={"recompute": recompute})
    expected = losses_of(alone, make_plan(alone), run_dir=tmp_path / "alone", last_step=STEPS)
    losses = losses_of(job, make_plan(job, **where), run_dir=tmp_path / "cut", last_step=STEPS)
    assert losses == expected


def test_a_worker_says_which_weight_gradients_do_not_wait_and_why(tmp_path: Path) -> None:
    job = tiny_job(model={"factory": "support.chains:mixed", "kwargs": {}})
    outcome = train(job, make_plan(job, **FOLDED), run_dir=tmp_path, last_step=2)
    assert not outcome.failures, "\n".join(f.traceback for f in outcome.failures.values())
    notes = [note for work in outcome.weight_work.values() for note in work.notes]
    (custom,) = [note for note in notes if note.startswith("layer 3 ")]
    assert custom == (
        "layer 3 (3, _Custom): fused: weight: custom autograd Function _Doubled would run twice"
    )
    assert not [note for note in notes if note.startswith("layer 4 ")]  # a plain nn.Linear
