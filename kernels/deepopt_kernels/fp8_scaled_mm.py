"""The product of two FP8 matrices by cuBLASLt, where it takes their scales: on Hopper GPUs.

It hands over codes and scales in the layouts that `torch.nn.functional.scaled_mm` asks for; which
product is meant is defined in `fp8_format`.

Source: docs.nvidia.com/cuda/cublas, "1D and 2D block scaling for FP8 data types": compute capability
9.0, CUDA 12.9 or later, sides that are multiples of 16, scales of blocks padded to four along K.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
import torch.nn.functional as F

from deepopt_kernels.fp8_format import TILE, Quantised, product_reference

logger = logging.getLogger(__name__)

ALIGNMENT = 16  # sides of FP8 matrices must be multiples of it
_SCALES_ALONG_K = 4  # so many at a time: 16 bytes
_OLDEST_CUDA = (12, 9)


def product(a: Quantised, b: Quantised, *, out_dtype: torch.dtype) -> torch.Tensor:
    """`a @ b.T`: by cuBLASLt where it can, else by the reference.

    Args:
        a: [M, K].
        b: [N, K].
        out_dtype: of the result.
    """
    codes = a.codes
    if codes.is_cuda and b.codes.shape[0] % ALIGNMENT == 0 and _serves(codes.device):
        return product_scaled_mm(a, b, out_dtype=out_dtype)
    return product_reference(a, b, out_dtype=out_dtype)


def product_scaled_mm(a: Quantised, b: Quantised, *, out_dtype: torch.dtype) -> torch.Tensor:
    """`a @ b.T` by cuBLASLt, with promotion to fp32 after each 128 of K.

    Args:
        a: [M, K], not in blocks if `b` is.
        b: [N, K], N a multiple of 16. K need not be: zeros are added.
        out_dtype: float32, bfloat16 or float16.
    """
    return F.scaled_mm(
        _with_full_columns(a.codes),
        _with_full_columns(b.codes).t(),
        _scale_layout(a),
        _recipe(a),
        _scale_layout(b),
        _recipe(b),
        output_dtype=out_dtype,
    )


def has_block_scales(capability: tuple[int, int], cuda: str | None) -> bool:
    """Whether cuBLASLt takes a scale a tile.

    Args:
        capability: compute capability of the GPU.
        cuda: version that torch was built for; None: none.
    """
    if cuda is None or capability[0] != 9:
        return False
    major, minor = (int(part) for part in cuda.split(".")[:2])
    return (major, minor) >= _OLDEST_CUDA


@cache
def _serves(device: torch.device) -> bool:
    capability = torch.cuda.get_device_capability(device)
    served = has_block_scales(capability, torch.version.cuda)
    if not served:
        logger.warning(
            "FP8 products on %s (compute capability %d.%d, CUDA %s) are computed in float32 from "
            "dequantised values: right, but slower than bfloat16; a Hopper GPU and CUDA 12.9 have them",
            device,
            *capability,
            torch.version.cuda,
        )
    return served


def _recipe(matrix: Quantised) -> F.ScalingType:
    blocks = matrix.tile_rows == TILE
    return F.ScalingType.BlockWise128x128 if blocks else F.ScalingType.BlockWise1x128


def _scale_layout(matrix: Quantised) -> torch.Tensor:
    """Tiles: [R, K / 128] with R running fastest. Blocks: [K / 128, R / 128] with K running
    fastest, padded along K."""
    scale = matrix.scale
    if matrix.tile_rows == TILE:
        return F.pad(scale, (0, -scale.shape[1] % _SCALES_ALONG_K)).t()
    return scale.t().contiguous().t()


def _with_full_columns(codes: torch.Tensor) -> torch.Tensor:
    missing = -codes.shape[1] % ALIGNMENT
    if not missing:
        return codes
    return F.pad(codes.view(torch.uint8), (0, missing)).view(codes.dtype)  # code 0 is 0.0
