"""Peak rates of known devices, for MFU: dense, as the vendors' data sheets state them.

Sources: the vendors' public data sheets and architecture white papers of each product. Sheets
often quote rates "with sparsity": half of those stands here. `float32` is IEEE fp32 outside the
tensor cores, which is what torch computes by default; TF32 is `tfloat32`, apart. A device that
is missing here is not an error: its users set `logging.peak_flops`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# (device name as torch.cuda.get_device_name prints it, TFLOP/s by dtype). The first match
# counts: a longer name stands before the name it contains.
_TABLE: tuple[tuple[str, Mapping[str, float]], ...] = (
    # NVIDIA Blackwell: HGX and GB200 data sheets, 2024-25, sparse figures halved.
    (r"GB200|GB300", {"float32": 80, "tfloat32": 1250, "bfloat16": 2500, "float8": 5000}),
    (r"B200", {"float32": 75, "tfloat32": 1125, "bfloat16": 2250, "float8": 4500}),
    (r"B300", {"float32": 75, "tfloat32": 1125, "bfloat16": 2250, "float8": 4500}),
    (r"B100", {"float32": 60, "tfloat32": 875, "bfloat16": 1750, "float8": 3500}),
    # RTX Blackwell architecture white paper, appendix; bf16 and fp8 with fp32 accumulation.
    (r"RTX 5090", {"float32": 104.8, "tfloat32": 104.8, "bfloat16": 209.5, "float8": 419}),
    # NVIDIA Hopper: H100, H200, GH200 data sheets, sparse figures halved.
    (r"H100 PCIe", {"float32": 51.2, "tfloat32": 378, "bfloat16": 756, "float8": 1513}),
    (r"H(100|200) NVL", {"float32": 60, "tfloat32": 417.5, "bfloat16": 835.5, "float8": 1671}),
    (
        r"GH200|H100|H200|H800",
        {"float32": 66.9, "tfloat32": 494.7, "bfloat16": 989.4, "float8": 1978.9},
    ),
    (r"H20", {"float32": 44, "tfloat32": 74, "bfloat16": 148, "float8": 296}),
    # NVIDIA Ada: L4, L40, L40S data sheets; Ada architecture white paper, appendix.
    (r"L40S", {"float32": 91.6, "tfloat32": 183, "bfloat16": 362.05, "float8": 733}),
    (r"L40", {"float32": 90.5, "tfloat32": 90.5, "bfloat16": 181.05, "float8": 362}),
    (r"L4", {"float32": 30.3, "tfloat32": 60, "bfloat16": 121, "float8": 242.5}),
    (r"RTX 6000 Ada", {"float32": 91.1, "tfloat32": 182.1, "bfloat16": 364.2, "float8": 728.5}),
    (r"RTX 4090", {"float32": 82.6, "tfloat32": 82.6, "bfloat16": 165.2, "float8": 330.3}),
    # NVIDIA Ampere: A100, A30, A40, A10 data sheets; GA102 white paper, appendix. No fp8.
    (r"A[18]00", {"float32": 19.5, "tfloat32": 156, "bfloat16": 312}),
    (r"A30", {"float32": 10.3, "tfloat32": 82, "bfloat16": 165}),
    (r"A40", {"float32": 37.4, "tfloat32": 74.8, "bfloat16": 149.7}),
    (r"A10G", {"float32": 31.5, "tfloat32": 35, "bfloat16": 70}),
    (r"A10", {"float32": 31.2, "tfloat32": 62.5, "bfloat16": 125}),
    (r"RTX A6000", {"float32": 38.7, "tfloat32": 77.4, "bfloat16": 154.8}),
    (r"RTX 3090", {"float32": 35.6, "tfloat32": 35.6, "bfloat16": 71}),
    # NVIDIA Volta and Turing data sheets: neither bf16 nor TF32.
    (r"V100[- ]SXM\w*", {"float32": 15.7, "float16": 125}),
    (r"V100", {"float32": 14, "float16": 112}),
    (r"T4", {"float32": 8.1, "float16": 65}),
    # AMD CDNA 3 and 4 data sheets; torch names them "AMD Instinct MI300X".
    (
        r"MI300X|MI325X",
        {"float32": 163.4, "tfloat32": 653.7, "bfloat16": 1307.4, "float8": 2614.9},
    ),
    (r"MI355X", {"float32": 157.3, "bfloat16": 2516.6, "float8": 5033.2}),
)
_PATTERNS = tuple((re.compile(rf"\b({name})\b"), rates) for name, rates in _TABLE)


def device_peak_flops(name: str, dtype: str) -> float | None:
    """The dense peak of a device in FLOP/s.

    Args:
        name: as `torch.cuda.get_device_name` prints it, for example `NVIDIA H200`.
        dtype: `float32`, `tfloat32`, `bfloat16`, `float16` or `float8`.

    Returns:
        FLOP/s; None when the device, or the format on it, is not in the table.
    """
    for pattern, rates in _PATTERNS:
        if pattern.search(name):
            # Tensor cores since Ampere run fp16 and bf16 at the same rate.
            rate = rates.get(dtype, rates.get("bfloat16") if dtype == "float16" else None)
            return None if rate is None else rate * 1e12
    return None
