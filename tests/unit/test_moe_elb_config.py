"""`elb_config` maps to keys of the job, and says what they mean."""

from __future__ import annotations

import subprocess
import sys

import pytest

from deepopt.config import ElbConfig, JobConfig
from deepopt.errors import InputError
from deepopt.moe import map_elb_config


def test_the_short_form_maps_to_keys_of_the_job_and_says_so() -> None:
    mapped = map_elb_config({"alpha": 0.3, "monitor_freq": 100})
    assert mapped.elb == ElbConfig(
        mode="elb", alpha=0.3, monitor_freq=100, replace_routers=True
    )
    assert JobConfig.model_validate({"elb": mapped.section}).elb == mapped.elb
    text = "\n".join(mapped.lines)
    assert "elb.mode = elb" in text
    assert (
        "elb.alpha = 0.3: gain of 1 + alpha x (mean - load) / mean, applied inside the step"
        in text
    )
    assert "elb.monitor_freq = 100: loads are reported over windows of 100 steps" in text


def test_what_alpha_does_depends_on_how_many_share_the_experts() -> None:
    def says(**config: object) -> str:
        return map_elb_config({"alpha": 0.3, **config}).lines[1]

    assert "where one device holds all experts (parallel.expert" in says()
    assert "where one device holds all experts (elb.devices)" in says(devices=1)
    for config in ({"devices": 8}, {"level": "expert"}):
        assert says(**config).endswith("over 16 position chunks")
    assert "of no effect" in says(chunks=1)
    assert "of no effect in mode sign" in says(mode="sign")


def test_in_formula_mode_both_keys_drive_the_update() -> None:
    lines = map_elb_config({"mode": "formula", "alpha": 0.2, "monitor_freq": 50}).lines
    assert (
        "elb.alpha = 0.2: gain of 1 + alpha x (mean - load) / mean, applied every 50 steps"
        in lines
    )


def test_nothing_given_is_the_default() -> None:
    assert map_elb_config(None).elb == ElbConfig()
    assert map_elb_config(None).section == {"mode": "elb"}
    assert map_elb_config({}).section == {"mode": "elb", "replace_routers": True}


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"alpha": "0.3"}, "alpha is '0.3'"),
        ({"monitor_freq": 0}, "monitor_freq is 0"),
        ({"monitor_freq": 2.5}, "monitor_freq is 2.5"),
        ({"mode": "fast"}, "mode is 'fast'"),
        ({"decay": 1.0}, "decay is 1.0"),
        ({"monitor_frequency": 10}, "no key 'monitor_frequency'"),
    ],
)
def test_bad_values_are_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(InputError, match=named) as caught:
        map_elb_config(given)
    assert caught.value.remedy


def test_a_close_name_is_suggested() -> None:
    with pytest.raises(InputError) as caught:
        map_elb_config({"monitor_frequency": 10})
    assert caught.value.remedy == "did you mean 'monitor_freq'?"


def test_the_mapping_needs_no_torch() -> None:
    code = (
        "import sys, deepopt.moe as m; m.map_elb_config({}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
