"""Throughputs that others measured on A100s, as data.

Source: arXiv:2401.10241 (Zero Bubble Pipeline Parallelism), tables 3, 4, 5, 6 and 9: up to 32 A100
SXM 80 GB on 4 hosts over RoCE, Megatron-LM. There B stands for our I. arXiv:2205.05198, tables 3
and 5: GPT-3 175B on 64 A100s.
"""

from __future__ import annotations

from typing import NamedTuple


class Setup(NamedTuple):
    """A row of settings.

    Args:
        model: key of `transformer_costs.MODELS`.
        num_ranks: pipeline ranks, one GPU each.
        microbatch_size: sequences.
        microbatches: of the three columns.
    """

    model: str
    num_ranks: int
    microbatch_size: int
    microbatches: tuple[int, int, int]


# Samples a GPU and second, one for each number of micro-batches.
TABLE_4: dict[Setup, dict[str, tuple[float, float, float]]] = {
    Setup("gpt-1.5b", 8, 6, (24, 32, 64)): {
        "1F1B": (11.8, 12.5, 13.6),
        "1F1B-I": (13.1, 13.4, 13.9),
        "ZB-1p": (12.9, 13.4, 14.2),
        "ZB-2p": (14.5, 14.8, 14.9),
    },
    Setup("gpt-6.2b", 8, 3, (24, 32, 64)): {
        "1F1B": (3.50, 3.70, 4.03),
        "1F1B-I": (4.01, 4.08, 4.19),
        "ZB-1p": (3.88, 4.00, 4.20),
        "ZB-2p": (4.32, 4.35, 4.39),
    },
    Setup("gpt-14.6b", 16, 1, (48, 64, 128)): {
        "1F1B": (1.40, 1.49, 1.64),
        "1F1B-I": (1.54, 1.59, 1.66),
        "ZB-1p": (1.61, 1.67, 1.76),
        "ZB-2p": (1.81, 1.83, 1.85),
    },
    Setup("gpt-28.3b", 32, 1, (96, 128, 256)): {
        "1F1B": (0.76, 0.80, 0.88),
        "1F1B-I": (0.82, 0.85, 0.90),
        "ZB-1p": (0.87, 0.90, 0.96),
        "ZB-2p": (0.99, 1.00, 1.00),
    },
}

# Its ZB-2p* (half the micro-batch, twice as many) stands here as a setup of its own.
TABLE_6: dict[Setup, dict[str, tuple[float, float, float]]] = {
    Setup("gpt-6.2b", 16, 6, (48, 64, 128)): {
        "1F1B": (3.38, 3.57, 3.91),
        "ZB-1p": (3.87, 4.00, 4.29),
        "ZB-V": (4.15, 4.21, 4.35),
    },
    Setup("gpt-6.2b", 16, 3, (96, 128, 256)): {"ZB-2p": (4.36, 4.37, 4.45)},
    Setup("gpt-14.6b", 24, 2, (72, 96, 192)): {
        "1F1B": (1.52, 1.61, 1.76),
        "ZB-1p": (1.72, 1.78, 1.89),
        "ZB-V": (1.85, 1.88, 1.93),
    },
    Setup("gpt-14.6b", 24, 1, (144, 192, 384)): {"ZB-2p": (1.84, 1.84, 1.85)},
    Setup("gpt-28.3b", 32, 2, (96, 128, 256)): {
        "1F1B": (0.82, 0.87, 0.95),
        "ZB-1p": (0.94, 0.97, 1.03),
        "ZB-V": (1.01, 1.02, 1.06),
    },
    Setup("gpt-28.3b", 32, 1, (192, 256, 512)): {"ZB-2p": (1.00, 1.00, 1.01)},
}

FIT = "1F1B"
"""Each model's efficiency is solved from this schedule in table 4, at its fewest micro-batches."""


class Profile(NamedTuple):
    """A row of table 9 (ms) with its rates of table 5.

    Args:
        model: key of `transformer_costs.MODELS`.
        num_ranks: pipeline ranks.
        num_microbatches: of a step.
        times_ms: T_F, T_B (our I), T_W, T_comm.
        bubbles: of the schedules in `TABLE_5_SCHEDULES`.
    """

    model: str
    num_ranks: int
    num_microbatches: int
    times_ms: tuple[float, float, float, float]
    bubbles: tuple[float, float, float, float, float]


TABLE_5_SCHEDULES = ("1F1B", "1F1B-I", "ZB-1p", "ZB-H2", "ZB-2p")  # ZB-H1's rates are ZB-1p's
TABLE_5: tuple[Profile, ...] = (
    Profile(
        "gpt-1.5b",
        8,
        24,
        (18.522, 18.086, 9.337, 0.601),
        (0.2431, 0.1055, 0.1585, 0.1083, 0.0433),
    ),
    Profile(
        "gpt-1.5b",
        8,
        32,
        (18.513, 18.086, 9.331, 0.626),
        (0.1985, 0.0818, 0.1242, 0.0837, 0.0039),
    ),
    Profile(
        "gpt-1.5b",
        8,
        64,
        (18.546, 18.097, 9.321, 0.762),
        (0.1240, 0.0443, 0.0674, 0.0444, 0.0026),
    ),
    Profile(
        "gpt-6.2b",
        8,
        24,
        (29.718, 29.444, 19.927, 0.527),
        (0.2347, 0.0808, 0.1323, 0.0698, 0.0029),
    ),
    Profile(
        "gpt-6.2b",
        8,
        32,
        (29.802, 29.428, 19.530, 0.577),
        (0.1898, 0.0628, 0.1045, 0.0559, 0.0022),
    ),
    Profile(
        "gpt-6.2b",
        8,
        64,
        (29.935, 29.621, 19.388, 0.535),
        (0.1091, 0.0320, 0.0554, 0.0294, 0.0010),
    ),
    Profile(
        "gpt-14.6b",
        16,
        48,
        (11.347, 11.248, 8.132, 0.377),
        (0.2552, 0.1104, 0.1397, 0.0672, 0.0066),
    ),
    Profile(
        "gpt-14.6b",
        16,
        64,
        (11.307, 11.254, 8.101, 0.379),
        (0.2082, 0.0852, 0.1088, 0.0516, 0.0054),
    ),
    Profile(
        "gpt-14.6b",
        16,
        128,
        (11.325, 11.308, 8.109, 0.378),
        (0.1251, 0.0445, 0.0576, 0.0266, 0.0028),
    ),
    Profile(
        "gpt-28.3b",
        32,
        96,
        (10.419, 10.207, 7.715, 0.408),
        (0.2646, 0.1493, 0.1421, 0.0641, 0.0038),
    ),
    Profile(
        "gpt-28.3b",
        32,
        128,
        (10.408, 10.204, 7.703, 0.408),
        (0.2168, 0.1164, 0.1106, 0.0490, 0.0029),
    ),
    Profile(
        "gpt-28.3b",
        32,
        256,
        (10.402, 10.248, 7.698, 0.460),
        (0.1352, 0.0624, 0.0594, 0.0257, 0.0018),
    ),
)


class Run175B(NamedTuple):
    """GPT-3 175B as trained by arXiv:2205.05198: table 3's sizes, table 5's seconds an iteration."""

    tensor_parallel: int = 8
    num_ranks: int = 8
    stages_per_rank: int = 3
    num_microbatches: int = 64
    step_s: float = 13.75


RUN_175B = Run175B()
