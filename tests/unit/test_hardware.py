"""Tables of accelerators, and clusters read from a word."""

from __future__ import annotations

import pytest

from deepopt.errors import PlanError
from deepopt.planner.hardware import ACCELERATORS, Cluster, parse_cluster


def test_a_cluster_is_read_from_a_count_and_a_name() -> None:
    assert parse_cluster(" 128xA100 ") == Cluster(
        accelerator=ACCELERATORS["A100"], num_gpus=128
    )
    assert parse_cluster("8 x h200").accelerator.name == "H200"


def test_every_accelerator_has_a_dense_peak_and_newer_ones_are_no_slower() -> None:
    a100, h100, h200 = (ACCELERATORS[name] for name in ("A100", "H100", "H200"))
    assert a100.peak_flops == 312e12
    assert h100.peak_flops == h200.peak_flops == 989.4e12
    for old, new in ((a100, h100), (h100, h200)):
        assert old.memory_bytes_per_s < new.memory_bytes_per_s
        assert old.link_bytes_per_s <= new.link_bytes_per_s
        assert old.network_bytes_per_s <= new.network_bytes_per_s


def test_ranks_fill_hosts_in_order() -> None:
    cluster = parse_cluster("16xA100")
    assert cluster.host_of(num_ranks=16, gpus_per_rank=1) == (0,) * 8 + (1,) * 8
    assert cluster.host_of(num_ranks=4, gpus_per_rank=4) == (0, 0, 1, 1)
    assert cluster.host_of(num_ranks=2, gpus_per_rank=8) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        ("A100", "'A100' does not say how many", "write 128xA100"),
        ("8xA1000", "no table for accelerator 'A1000'", "did you mean A100"),
        ("0xH100", "cluster of 0 GPUs", "at least one"),
    ],
)
def test_a_cluster_that_cannot_be_read_names_the_next_step(
    text: str, message: str, remedy: str
) -> None:
    with pytest.raises(PlanError, match=message) as raised:
        parse_cluster(text)
    assert remedy in raised.value.remedy
