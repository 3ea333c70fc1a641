"""What our router costs over plain top-k routing: forward and backward, on one CPU thread.

The peer is the usual router: logits, softmax over all experts, `torch.topk`, weights normalised over the k.
Ours has the same product, and chooses by biased scores, counts loads and a histogram. Both run in turns.
Bytes that the choice moves on a GPU are counted, not measured.

    python benchmarks/elb_overhead.py
    python benchmarks/elb_overhead.py --quick
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _machine import describe
from _report import ratio_line, say, table

from deepopt.moe import ElbRouter
from deepopt.moe.balancer import NUM_BINS

SMALLEST_S = 0.005  # of a plain router's call that the aim is for: below, fixed costs of calls count most
AIM = 1.3  # times the plain router's time, at most
SHAPES = (
    (2048, 1024, 256, 8),
    (2048, 512, 64, 4),
    (512, 128, 32, 2),
)  # tokens, width, experts, k
SEQUENCE = 256
SETTLING_STEPS = 10  # the warm-up, whose steps cost several times more, is behind
MODES: dict[str, dict[str, object]] = {
    "elb": {},
    "elb, devices, 16 chunks": {"devices": 8},
    "sign": {"mode": "sign"},
    "none": {"mode": "none"},
}


class PlainRouter(torch.nn.Module):
    """Logits, softmax, top-k.

    Args:
        d_model: features of a token.
        num_experts: experts.
        top_k: choices a token.
    """

    def __init__(self, d_model: int, *, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.weight = torch.nn.Parameter(torch.randn(num_experts, d_model) * 0.02)

    def forward(
        self, x_TD: torch.Tensor, *, sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights and ids."""
        scores_TE = F.linear(x_TD, self.weight).softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self.top_k, dim=-1)
        return weights_TK / weights_TK.sum(-1, keepdim=True), ids_TK


def seconds_of(router: torch.nn.Module, x_TD: torch.Tensor) -> float:
    """One forward and backward."""
    began = time.perf_counter()
    weights_TK = router(x_TD, sequence_length=SEQUENCE)[0]
    weights_TK.backward(torch.ones_like(weights_TK))
    ended = time.perf_counter()
    router.zero_grad()
    return ended - began


def in_turns(runs: dict[str, Callable[[], float]], *, rounds: int) -> dict[str, float]:
    """Median seconds of each, all in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return {name: statistics.median(times[2:]) for name, times in found.items()}


def choice_bytes(tokens: int, experts: int, top_k: int) -> tuple[int, int]:
    """Bytes that choosing reads and writes on a GPU, without the product: plain (softmax, then top-k), and
    ours (softmax, its sum with half the logits, and one kernel that reads that once, counts in the cache,
    and writes ids and counts)."""
    logits, chosen = 4 * tokens * experts, 12 * tokens * top_k
    plain = 3 * logits + chosen  # softmax reads and writes, top-k reads
    counts = 4 * (experts * (NUM_BINS + 1) + 2)
    # Softmax reads and writes, the sum reads two and writes one, the choice reads; gate weights are a softmax
    # over the k alone.
    ours = 6 * logits + 2 * counts + chosen + 8 * tokens * top_k
    return plain, ours


def main() -> None:
    """Measure all shapes and print the worst ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds, the smallest shape")
    options = parser.parse_args()
    rounds, shapes = (5, SHAPES[-1:]) if options.quick else (32, SHAPES)
    torch.set_num_threads(1)
    for line in describe():
        say(line)
    rows, worst = [], 0.0
    for tokens, width, experts, top_k in shapes:
        x_TD = torch.randn(tokens, width, requires_grad=True)
        runs: dict[str, Callable[[], float]] = {}
        plain = PlainRouter(width, num_experts=experts, top_k=top_k)
        runs["plain"] = lambda router=plain, x=x_TD: seconds_of(router, x)  # type: ignore[misc]
        for name, arguments in MODES.items():
            router = ElbRouter(width, num_experts=experts, top_k=top_k, **arguments)
            for _ in range(SETTLING_STEPS):
                router(x_TD, sequence_length=SEQUENCE)
                router.update()
            runs[name] = lambda router=router, x=x_TD: seconds_of(router, x)  # type: ignore[misc]
        found = in_turns(runs, rounds=rounds)
        moved = choice_bytes(tokens, experts, top_k)
        if found["plain"] > SMALLEST_S or options.quick:
            worst = max(worst, found["elb"] / found["plain"])
        rows.append(
            [
                f"{tokens} x {width}, top-{top_k} of {experts}",
                f"{1e3 * found['plain']:.2f} ms",
                *(f"{found[name] / found['plain']:.2f}" for name in MODES),
                f"{moved[0] / 2**20:.2f}",
                f"{moved[1] / 2**20:.2f}",
            ]
        )
    say(table(["shape", "plain", *MODES, "plain MiB", "elb MiB"], rows))
    say(
        "times of the plain router's; MiB: counted for a GPU, per forward, the product left out"
    )
    say(f"aim: where the plain router takes more than {1e3 * SMALLEST_S:.0f} ms")
    say(f"elb takes {worst:.2f}x the plain router at most (aim {AIM:.1f}x)")
    say(ratio_line(AIM / worst, aim=1.0))


if __name__ == "__main__":
    main()
