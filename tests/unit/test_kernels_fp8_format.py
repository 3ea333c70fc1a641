"""Matrices in FP8: within the format's error, nothing hidden, and the layouts that cuBLASLt takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt_kernels import fp8_scaled_mm
from deepopt_kernels.fp8_format import (
    FP8_FLOOR,
    FP8_MAX,
    FP8_ROUNDING,
    TILE,
    Quantised,
    dequantise,
    product_reference,
    quantise_activation,
    quantise_blocks,
    quantise_tiles,
)
from deepopt_kernels.fp8_scaled_mm import has_block_scales, product_scaled_mm

sides = st.sampled_from([1, 2, 16, 127, 128, 129, 200, 256, 300])
# To where squares overflow and products underflow; values of a tile may differ by 2**24 and more.
spreads = st.sampled_from([0.0, 1.0, 8.0])
exponents = st.integers(-70, 70)


def matrix(rows: int, columns: int, *, seed: int, spread: float, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    sizes = torch.randn(rows, columns, generator=generator) * spread
    return (values * sizes.exp2()) * 2.0**exponent


def scale_of_each(quantised: Quantised) -> torch.Tensor:
    ones = torch.ones_like(quantised.codes, dtype=torch.float32).to(quantised.codes.dtype)
    return dequantise(quantised._replace(codes=ones))


def error_bound(x: torch.Tensor, quantised: Quantised) -> torch.Tensor:
    """Of each value: half a unit in the last place, of normal or subnormal codes."""
    slack = 1 + 1e-6  # of the division by the scale and the product with it
    floor = scale_of_each(quantised) * FP8_FLOOR
    return torch.maximum(x.abs() * FP8_ROUNDING, floor) * slack


@settings(max_examples=4000, deadline=None)
@given(
    rows=sides,
    columns=sides,
    seed=st.integers(0, 99),
    spread=spreads,
    exponent=exponents,
    blocks=st.booleans(),
)
def test_each_value_is_within_half_a_unit_in_the_last_place(
    rows: int, columns: int, seed: int, spread: float, exponent: int, blocks: bool
) -> None:
    x = matrix(rows, columns, seed=seed, spread=spread, exponent=exponent)
    quantised = quantise_blocks(x) if blocks else quantise_tiles(x)
    assert ((dequantise(quantised) - x).abs() <= error_bound(x, quantised)).all()
    assert quantised.codes.float().abs().max() == FP8_MAX  # nothing of the range is given away


@settings(max_examples=40, deadline=None)
@given(
    rows=sides,
    inner=sides,
    columns=sides,
    seed=st.integers(0, 99),
    spread=spreads,
    exponent=st.integers(-40, 40),
)
def test_a_product_is_within_the_errors_of_its_factors(
    rows: int, inner: int, columns: int, seed: int, spread: float, exponent: int
) -> None:
    a = matrix(rows, inner, seed=seed, spread=spread, exponent=exponent)
    b = matrix(columns, inner, seed=seed + 1, spread=spread, exponent=-exponent)
    qa, qb = quantise_tiles(a), quantise_blocks(b)
    ea, eb = error_bound(a, qa).double(), error_bound(b, qb).double()
    a64, b64 = a.double().abs(), b.double().abs()
    bound = ea @ b64.t() + a64 @ eb.t() + ea @ eb.t()
    bound += 2 * inner * 2**-24 * ((a64 + ea) @ (b64 + eb).t())  # of adding up in fp32
    found = product_reference(qa, qb, out_dtype=torch.float32).double()
    assert ((found - a.double() @ b.double().t()).abs() <= bound).all()


def test_zeros_and_the_smallest_numbers_stay_finite() -> None:
    x = torch.zeros(3, 300)
    assert torch.equal(dequantise(quantise_tiles(x)), x)
    x[1, 5] = 2.0**-149  # the smallest float32, beside zeros in its tile
    x[2, 290] = 2.0**-120
    found = dequantise(quantise_tiles(x))
    assert found.isfinite().all()
    assert found[2, 290] == 2.0**-120


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_makes_its_tile_nan_and_no_other(bad: float) -> None:
    x = torch.randn(200, 300)
    x[130, 140] = bad
    rows = dequantise(quantise_tiles(x)).isnan()
    assert rows[130, 128:256].all()
    assert rows.sum() == TILE
    blocks = dequantise(quantise_blocks(x)).isnan()
    assert blocks[128:, 128:256].all()
    assert blocks.sum() == (200 - 128) * TILE


def test_the_largest_values_saturate_and_do_not_overflow() -> None:
    x = torch.tensor([[3.0e38, -3.4e38, 1.0]])
    found = dequantise(quantise_tiles(x))
    assert found.isfinite().all()
    assert found[0, 1] == pytest.approx(-3.4e38)


def test_a_gaussian_and_outliers_keep_their_products() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(256, 512), torch.randn(384, 512)
    outliers = x.clone()
    outliers[:, 7] *= 100  # a channel far larger than its neighbours
    for value in (x, outliers):
        exact = value.double() @ weight.double().t()
        found = product_reference(
            quantise_tiles(value), quantise_blocks(weight), out_dtype=torch.float32
        )
        assert (found - exact).norm() / exact.norm() <= 0.038  # two factors of rms 0.026 each


def test_transposed_copies_are_of_the_values_and_not_of_the_rounded_ones() -> None:
    x = torch.randn(70, 130)
    rows, columns = quantise_activation(x, transposed=True)
    assert columns is not None
    assert torch.equal(columns.codes, quantise_tiles(x.t()).codes)
    assert torch.equal(rows.codes, quantise_tiles(x).codes)
    blocks = quantise_blocks(x)
    assert torch.equal(dequantise(blocks.transposed()), dequantise(blocks).t())
    assert blocks.nbytes == 70 * 130 + 4 * 2


def scaled_mm_as_documented(
    mat_a: torch.Tensor,
    mat_b: torch.Tensor,
    scale_a: torch.Tensor,
    recipe_a: Any,
    scale_b: torch.Tensor,
    recipe_b: Any,
    *,
    output_dtype: torch.dtype,
) -> torch.Tensor:
    """What cuBLASLt demands of layouts (it reads raw memory), then the product of what it would read."""
    assert mat_a.is_contiguous()
    assert mat_b.t().is_contiguous()
    assert mat_a.shape[1] % 16 == 0
    assert mat_b.shape[1] % 16 == 0
    sides = []
    for mat, scale, recipe in ((mat_a, scale_a, recipe_a), (mat_b.t(), scale_b, recipe_b)):
        rows, inner = mat.shape
        tiles = -(-inner // TILE)
        storage = torch.as_strided(scale, (scale.numel(),), (1,))
        if recipe is F.ScalingType.BlockWise1x128:
            assert scale.shape == (rows, tiles)
            sides.append(Quantised(mat, storage.view(tiles, rows).t(), 1))
        else:
            padded = -(-tiles // 4) * 4
            assert scale.shape == (padded, -(-rows // TILE))
            sides.append(Quantised(mat, storage.view(-1, padded)[:, :tiles], TILE))
    assert sides[0].tile_rows == 1
    return product_reference(*sides, out_dtype=output_dtype)


@pytest.mark.parametrize("inner", [16, 128, 200, 600, 1024])
@pytest.mark.parametrize("tokens", [1, 24, 300])
@pytest.mark.parametrize("blocks", [True, False])
def test_cublas_gets_the_layouts_that_it_documents(
    inner: int, tokens: int, blocks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8_scaled_mm.F, "scaled_mm", scaled_mm_as_documented)
    a = quantise_tiles(torch.randn(tokens, inner))
    b = (quantise_blocks if blocks else quantise_tiles)(torch.randn(272, inner))
    found = product_scaled_mm(a, b, out_dtype=torch.float32)
    expected = product_reference(a, b, out_dtype=torch.float32)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_only_hopper_with_a_late_cuda_has_block_scales() -> None:
    assert has_block_scales((9, 0), "12.9")
    assert has_block_scales((9, 0), "13.0")
    assert not has_block_scales((9, 0), "12.8")
    assert not has_block_scales((8, 9), "12.9")
    assert not has_block_scales((10, 0), "13.0")
    assert not has_block_scales((9, 0), None)
