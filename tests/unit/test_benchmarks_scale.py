"""The parts of the study of large pipelines that decide what its figures mean."""

from __future__ import annotations

import importlib
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from deepopt.schedule.compact import CompactSchedule, expand
from deepopt.schedule.ir import Direction, PlacementKind, place
from deepopt.schedule.memory import Memory, peaks
from deepopt.schedule.simulate import CostTable
from deepopt.schedule.verify import verify

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module of the benchmarks as their scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_an_efficiency_is_solved_so_that_its_cell_comes_out(load: Any) -> None:
    published, module = load("_published_a100"), load("published_a100")
    setup = next(iter(published.TABLE_4))
    efficiency = module.fit(setup)
    assert 0 < efficiency < 1
    predicted = module.throughput(setup, "1F1B", num_microbatches=24, efficiency=efficiency)
    assert predicted == pytest.approx(11.8, rel=1e-3)


@pytest.mark.parametrize("weight_memory", [0.4, 1.0])
def test_weights_in_gaps_make_a_right_order_within_their_memory(
    load: Any, weight_memory: float
) -> None:
    ranks, count = 4, 12
    costs = CostTable.uniform(ranks, forward_s=20, input_s=20, weight_s=14, latency_s=1)
    rows = load("_published_orders").weights_in_gaps(
        costs,
        num_microbatches=count,
        memory=2.0 * ranks,
        weight_memory=weight_memory,
        gap=0.25,
        extra=0.0,
    )
    placement = place(PlacementKind.LINE, num_ranks=ranks)
    schedule = expand(
        CompactSchedule(
            name="zb_2p", placement=placement, directions=(Direction.DOWN,) * count, rows=rows
        )
    )
    verify(schedule)
    if weight_memory == 1.0:  # then what a micro-batch holds is what deepopt counts
        assert max(peaks(schedule, Memory.counted(placement, cap=None))) <= 2 * ranks


def test_every_stage_of_the_study_holds_as_many_blocks(load: Any) -> None:
    assert load("scale_175b").even(16)[:3] == (0, 7, 13)
    assert load("scale_175b").even(48)[-1] == 1 + 47 * 2


def test_the_study_makes_its_published_run_come_out(load: Any) -> None:
    module = load("scale_175b")
    assert module.fit() == pytest.approx(0.725, abs=0.001)


def test_a_chart_is_well_formed_and_names_every_line(load: Any) -> None:
    drawn = load("_chart").line_chart(
        {"a & b": (1.0, 1.5), "c": (1.0, 1.5)},
        positions=(1, 8),
        title="t",
        x_label="m/p",
        step=0.1,
    )
    texts = [element.text for element in ET.fromstring(drawn).iter() if element.text]
    assert {"a & b", "c", "m/p", "t"} <= set(texts)
    ends = [
        float(element.attrib["y"])
        for element in ET.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
        if element.text in ("a & b", "c")
    ]
    assert abs(ends[0] - ends[1]) >= 15  # names at one height are moved apart
