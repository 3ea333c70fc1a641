"""Matrices in FP8 (E4M3) with one scale a tile, and their product: the PyTorch definition.

A matrix has tiles of 1 x 128 along its rows (activations and gradients) or blocks of 128 x 128
(weights). A value is its code times the scale of its tile. Products contract the second dimension of
both matrices, along which their scales change, so that a kernel adds 128 products exactly as a tensor
core does and then multiplies by two scales. `fp8_scaled_mm` does that on Hopper GPUs.

What it does not do: keep scales from step to step; each matrix is looked at when it is quantised.

Shapes: R rows, C columns.
Source: arXiv:2412.19437 (DeepSeek-V3), section 3.3.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite e4m3fn
FP8_ROUNDING = 2.0**-4  # half a unit in the last of 3 places: relative error of a normal code
FP8_FLOOR = 2.0**-10  # half of the smallest code: absolute error of a subnormal one, in scales
TILE = 128  # values that share a scale
_LEAST_SCALE = 2.0**-126  # smallest normal float32: dividing by it never gives 0 / 0


class Quantised(NamedTuple):
    """A matrix in FP8.

    Args:
        codes: [R, C] float8_e4m3fn, contiguous.
        scale: fp32, [R / tile_rows, C / 128], both rounded up; value = code x scale.
        tile_rows: rows that share a scale: 1 or 128.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    tile_rows: int

    @property
    def nbytes(self) -> int:
        """Bytes held by codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def transposed(self) -> Quantised:
        """The transpose of a matrix in blocks, which has the same scales."""
        assert self.tile_rows == TILE, "tiles of one row have other scales when transposed"
        return Quantised(self.codes.t().contiguous(), self.scale.t().contiguous(), TILE)


def quantise_tiles(x_RC: torch.Tensor) -> Quantised:
    """Quantise with a scale for each 128 values of a row; see `quantise_blocks`."""
    return _quantise(x_RC, tile_rows=1)


def quantise_blocks(x_RC: torch.Tensor) -> Quantised:
    """Quantise with a scale for each block of 128 x 128.

    A scale is the largest magnitude of its tile over 448, so the largest becomes the largest code;
    codes are rounded to nearest even and saturate. A tile of zeros stays zeros. A value that is not
    finite makes its whole tile NaN: nothing that went wrong is hidden.

    Args:
        x_RC: floating point, of any layout; sides need not be multiples of 128.
    """
    return _quantise(x_RC, tile_rows=TILE)


def quantise_activation(
    x_TD: torch.Tensor, *, transposed: bool
) -> tuple[Quantised, Quantised | None]:
    """Tiles along the features, and on demand those of the transpose: along the tokens.

    The second is for a product that contracts the tokens (the gradient of a weight). Both are made
    of the same values, so no value is rounded twice.

    Args:
        x_TD: tokens by features.
        transposed: whether the second is wanted.
    """
    return quantise_tiles(x_TD), quantise_tiles(x_TD.t()) if transposed else None


def dequantise(matrix: Quantised) -> torch.Tensor:
    """[R, C] fp32."""
    rows, columns = matrix.codes.shape
    scale = matrix.scale.repeat_interleave(TILE, dim=1)[:, :columns]
    if matrix.tile_rows > 1:
        scale = scale.repeat_interleave(matrix.tile_rows, dim=0)[:rows]
    return matrix.codes.float() * scale


def product_reference(a: Quantised, b: Quantised, *, out_dtype: torch.dtype) -> torch.Tensor:
    """`a @ b.T` of the dequantised values, accumulated in fp32 and rounded once.

    Args:
        a: [M, K].
        b: [N, K].
        out_dtype: of the result.
    """
    return dequantise(a).mm(dequantise(b).t()).to(out_dtype)


def _quantise(x_RC: torch.Tensor, *, tile_rows: int) -> Quantised:
    rows, columns = x_RC.shape
    padded = F.pad(x_RC.float(), (0, -columns % TILE, 0, -rows % tile_rows))
    tiles = padded.reshape(
        padded.shape[0] // tile_rows, tile_rows, padded.shape[1] // TILE, TILE
    )
    amax = tiles.abs().amax(dim=(1, 3))
    scale = (amax / FP8_MAX).clamp_min(_LEAST_SCALE)
    # Clamped: the division may round up, and older torch makes NaN of what is above 464.
    scaled = (tiles / scale[:, None, :, None]).clamp(-FP8_MAX, FP8_MAX)
    codes = scaled.to(FP8).reshape(padded.shape)[:rows, :columns]
    return Quantised(codes.contiguous(), scale, tile_rows)
