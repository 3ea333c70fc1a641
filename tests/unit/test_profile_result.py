"""What workers measured becomes layers, devices and links; what cannot be one program is refused."""

from __future__ import annotations

from typing import Any

import pytest

from deepopt.config import JobConfig
from deepopt.errors import ClusterError
from deepopt.planner.profile_result import (
    check_versions,
    deviations,
    factors,
    hardware_section,
    layer_sections,
    repeats,
)
from deepopt.planner.skeleton import LayerSkeleton, ModelSkeleton, ParameterSkeleton
from support.plan_files import rank_result

SKELETON = ModelSkeleton(
    factory="a:b",
    kwargs={},
    layers=tuple(
        LayerSkeleton(
            name=name,
            kind="Block",
            parameters=(ParameterSkeleton(name=f"{name}.w", shape=(1000,), dtype="float32"),),
        )
        for name in ("embed", "blocks.0", "blocks.1")
    ),
)
JOB = JobConfig()


def test_slow_gpus_have_factors_and_times_are_those_of_rank_0() -> None:
    results = [rank_result(), rank_result(factor=1.6)]
    assert factors(results) == (1.0, 1.6)
    layers = layer_sections(results, job=JOB, skeleton=SKELETON)
    assert layers[1].times_ms is not None
    assert layers[1].times_ms.forward == pytest.approx(1.0)


def test_what_scatters_is_one_speed() -> None:
    assert factors([rank_result(), rank_result(factor=1.03)]) == (1.0, 1.0)


def test_cpu_workers_of_one_host_share_a_speed() -> None:
    speeds = (1.0, 1.4, 1.0)
    cpus = [rank_result(factor=f, device="cpu") for f in speeds]
    assert factors(cpus) == (1.0, 1.0, 1.0)
    elsewhere = rank_result(factor=2.0, device="cpu", host="two")
    assert factors([*cpus, elsewhere]) == (1.0, 1.0, 1.0, 2.0)


def test_cpu_workers_that_the_job_slows_have_a_factor_of_their_own() -> None:
    slowed = {**rank_result(factor=1.6, device="cpu"), "slowed": 1.5}
    plain = [rank_result(factor=f, device="cpu") for f in (1.0, 1.2)]
    results = [plain[0], slowed, plain[1], slowed]
    assert factors(results) == pytest.approx((1.0, 1.6 / 1.1, 1.0, 1.6 / 1.1), rel=1e-3)
    assert [d.slowed for d in hardware_section(results, shared_cores=2).devices] == [
        1.0,
        1.5,
        1.0,
        1.5,
    ]


def test_layers_of_one_kind_refer_to_the_first_and_the_ends_fetch_the_batch() -> None:
    layers = layer_sections([rank_result()], job=JOB, skeleton=SKELETON)
    assert [layer.like for layer in layers] == [None, None, "blocks.0"]
    first, second = layers[0].times_ms, layers[1].times_ms
    assert first is not None
    assert second is not None
    assert first.forward == pytest.approx(1.1)
    assert second.forward == pytest.approx(1.0)
    sizes = layers[1].sizes_mb
    assert sizes is not None
    assert (sizes.parameters, sizes.gradients, sizes.optimizer) == (0.004, 0.004, 0.008)
    assert (sizes.activation, sizes.input, sizes.output) == (2.0, 0.5, 0.5)
    assert [(layer.name, count) for layer, count in repeats(layers)] == [
        ("embed", 1),
        ("blocks.0", 2),
    ]


def test_links_and_the_slowest_exchange_are_kept() -> None:
    other = {**rank_result(), "links": {}, "exchange_s": 0.0005}
    section = hardware_section([rank_result(), other], shared_cores=None)
    (link,) = section.links
    assert (link.ranks, link.latency_us, link.gb_per_s) == ((0, 1), 100.0, 4.0)
    assert section.exchange_us == 500.0


def test_each_worker_of_a_host_has_seen_all_processes_but_its_own_threads_alone() -> None:
    seen = [(0.05, 0.01), (0.07, 0.02), (0.06, 0.03)]
    results = [
        {**rank_result(), "links": {}, "background": {"processes": a, "threads": b}}
        for a, b in seen
    ]
    (own,) = hardware_section(results, shared_cores=2).background
    assert (own.host, own.processes, own.threads) == ("one", 0.06, pytest.approx(0.06))
    assert hardware_section([rank_result()] * 2, shared_cores=None).background == ()


@pytest.mark.parametrize("versions", [{"torch": "2.12.0", "python": "3.11.7"}, {}])
def test_hosts_of_different_versions_are_refused_by_name(versions: dict[str, Any]) -> None:
    other = rank_result(host="two", versions=versions)
    with pytest.raises(ClusterError, match=r"host one runs torch 2\.13\.0, host two"):
        check_versions([rank_result(), rank_result(), other])
    check_versions([rank_result(), rank_result()])


def test_the_check_of_repeated_layers_is_told_by_name() -> None:
    assert deviations([rank_result(), rank_result()], SKELETON) == {"blocks.0": 0.02}
