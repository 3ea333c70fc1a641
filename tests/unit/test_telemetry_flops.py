"""Peaks are found by the names that torch prints, and never guessed."""

from __future__ import annotations

import pytest

from deepopt.telemetry.flops import device_peak_flops


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H200", "bfloat16", 989.4),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4),
        ("NVIDIA H100 PCIe", "bfloat16", 756),
        ("NVIDIA H100 NVL", "bfloat16", 835.5),
        ("NVIDIA H20", "bfloat16", 148),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4),
        ("NVIDIA B200", "float8", 4500),
        ("NVIDIA GB200", "bfloat16", 2500),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5),
        ("NVIDIA A100-PCIE-40GB", "tfloat32", 156),
        ("NVIDIA A100-SXM4-80GB", "float16", 312),
        ("NVIDIA A10", "bfloat16", 125),
        ("NVIDIA A10G", "bfloat16", 70),
        ("NVIDIA L4", "bfloat16", 121),
        ("NVIDIA L40S", "bfloat16", 362.05),
        ("NVIDIA L40", "bfloat16", 181.05),
        ("NVIDIA GeForce RTX 4090", "bfloat16", 165.2),
        ("Tesla V100-SXM2-16GB", "float16", 125),
        ("Tesla V100-PCIE-32GB", "float16", 112),
        ("AMD Instinct MI300X", "bfloat16", 1307.4),
    ],
)
def test_a_known_device_has_its_dense_peak(name: str, dtype: str, tera: float) -> None:
    assert device_peak_flops(name, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("Intel(R) Xeon(R) Platinum 8480C", "float32"),
        ("NVIDIA A100-SXM4-80GB", "float8"),
        ("Tesla V100-SXM2-16GB", "bfloat16"),
        ("NVIDIA A1000", "bfloat16"),
        ("", "float32"),
    ],
)
def test_what_is_not_in_the_table_is_unknown(name: str, dtype: str) -> None:
    assert device_peak_flops(name, dtype) is None
