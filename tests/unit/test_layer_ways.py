"""Which findings of others about weight gradients hold for the layers of a process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.job_file import load_job
from deepopt.pipeline.stage import Layer
from deepopt.pipeline.weight_ways import Verdict, Way
from deepopt.worker import layer_ways
from deepopt.worker.layer_ways import LayerWays, code_of

SOURCE = """
import torch
from its_products import product
class Block(torch.nn.Linear):
    def forward(self, x):
        return product(x, self.weight)
"""
USED = {
    "its_products": "import its_sums\ndef product(a, b):\n    return its_sums.sum_up(a @ b)\n",
    "its_sums": "def sum_up(a):\n    return a\n",
}
FOUND = {"block": Verdict(way=Way.SPLIT, reason="why", split=frozenset({"weight"}))}
Make = Callable[..., LayerWays]


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Ways of one layer, in a process of its own: its class is imported anew."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def make(
        job: JobConfig | None = None,
        *,
        source: str = SOURCE,
        used: Mapping[str, str] | None = None,
        product: str = "CPU X",
    ) -> LayerWays:
        for name, content in {"its_blocks": source, **USED, **(used or {})}.items():
            (tmp_path / f"{name}.py").write_text(content)
            monkeypatch.delitem(sys.modules, name, raising=False)
        layer_ways._code_of_module.cache_clear()
        from its_blocks import Block  # type: ignore[import-not-found]

        layer = Layer(index=0, name="block", module=Block(2, 2), parameters={})
        return LayerWays(job or load_job(None, []), product=product, layers=[layer])

    return make


def told(ways: LayerWays) -> dict[str, dict[str, Verdict]]:
    """What the head is told, and tells others, in a journal's words."""
    signed = ways.signed(FOUND)
    return {ways.conditions: {n: Verdict.from_json(v.to_json()) for n, v in signed.items()}}


def test_what_was_found_holds_for_the_same_code_under_the_same_conditions(make: Make) -> None:
    found = make().fitting(told(make()))
    assert (found["block"].way, found["block"].split) == (Way.SPLIT, {"weight"})


@pytest.mark.parametrize(
    "other",
    [
        {"source": SOURCE + "# changed\n"},
        {"used": {"its_products": USED["its_products"] + "# changed\n"}},
        {"used": {"its_sums": "def sum_up(a):\n    return a + a\n"}},
        {"product": "CPU Y"},
        {"job": load_job(None, ["training.microbatch_size=3"])},
        {"job": load_job(None, ["data.sequence_length=17"])},
    ],
    ids=[
        "code",
        "a function that it calls",
        "one that that calls",
        "device",
        "micro-batch",
        "sequence",
    ],
)
def test_what_was_found_of_something_else_is_tried_again(
    other: dict[str, object], make: Make
) -> None:
    assert make(**other).fitting(told(make())) == {}


def test_another_version_of_torch_is_another_condition(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = told(make())
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert make().fitting(before) == {}


def test_steps_and_workers_are_no_condition(make: Make) -> None:
    more = load_job(None, ["training.steps=77", "checkpoint.every=3"])
    assert make(more).fitting(told(make())) != {}


def test_a_class_that_is_in_no_file_is_tried_each_time() -> None:
    block = type("Block", (torch.nn.Module,), {"__module__": "nowhere"})()
    assert code_of(block) == ""
    ways = LayerWays(
        load_job(None, []),
        product="CPU X",
        layers=[Layer(index=0, name="block", module=block, parameters={})],
    )
    assert ways.fitting(told(ways)) == {}
