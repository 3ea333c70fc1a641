"""Which models become pipelines as they are: ours against `torch.distributed.pipelining.pipeline`.

Ten architectures that nobody here wrote, with random weights, in train mode, with the same inputs. Ours
finds the layers and cuts at every one; torch is told where to cut, once, before the layer in the middle
that ours found. A model counts as converted if the pipeline, run part by part in this process, gives the
original's loss: ours bit for bit and all its gradients too, torch's within 1e-5. The times are medians of
three conversions in turns; torch gets a fresh copy each time, because `pipeline` leaves its marks in the
model. The ratio is of the shares converted.

NeMo AutoModel's AutoPipeline is not run: its column is what its documentation says (0.7, "Pipeline
Parallelism with AutoPipeline"): it is for decoder-only causal language models of Hugging Face;
encoder-decoder models and tied input and output embeddings are rejected.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _architectures import Make, Size, architectures
from _machine import describe
from _report import progress, ratio_line, say, table
from torch.distributed.pipelining import SplitPoint, pipeline

from deepopt import convert_to_deepopt

AIM = 1.0
# What AutoPipeline's documentation says of each; what is not named is none of the models it is for.
AUTO_PIPELINE = {
    **dict.fromkeys(("Llama", "Mixtral", "Qwen3-MoE", "DeepSeek-V3"), "in scope"),
    "GPT-2 (tied)": "rejected: tied",
    **dict.fromkeys(("T5", "BART"), "rejected: enc-dec"),
}
REPEATS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one side made of one model.

    Args:
        time_s: of the conversion; None when it failed.
        cut_bytes: carried forward by its largest cut, or by its one cut.
        num_layers: parts that it was run in.
        failure: the first line of why it was refused or is wrong.
    """

    time_s: float | None = None
    cut_bytes: int = 0
    num_layers: int = 0
    failure: str = ""


def main() -> None:
    """Convert all of them both ways and print the table and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two blocks of width 64")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    size = Size(width=256, depth=8, length=128, samples=4)
    if options.quick:
        size = Size(width=64, depth=2, length=16, samples=2)
    say("\n".join(describe()))
    say(f"{size}, float32, train mode, no dropout\n")
    rows, failures, converted = [], [], [0, 0]
    for name, make in architectures(size).items():
        progress(name)
        ours, theirs = compare(make)
        converted[0] += not ours.failure
        converted[1] += not theirs.failure
        rows.append(
            (name, *_cells(ours), *_cells(theirs)[1:], AUTO_PIPELINE.get(name, "not for it"))
        )
        failures += [
            f"{name}, {side}: {outcome.failure}"
            for side, outcome in (("deepopt", ours), ("torch", theirs))
            if outcome.failure
        ]
    header = (
        "model",
        "layers",
        "deepopt",
        "largest cut",
        "torch",
        "its cut",
        "AutoPipeline (documented)",
    )
    say(table(header, rows) + "\n")
    say("\n".join(failures) + "\n")
    say(f"converted: deepopt {converted[0]}, torch {converted[1]} of {len(rows)}")
    say(ratio_line(converted[0] / max(converted[1], 1), aim=AIM))


def compare(make: Make) -> tuple[Outcome, Outcome]:
    """Both sides' outcomes for one model.

    Args:
        make: gives the model and the arguments of its forward.
    """
    torch.manual_seed(0)
    model, inputs = make()
    model.train()
    middle = _middle_layer(model, inputs)
    loss = _loss(model(**inputs))
    loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ours, theirs = Outcome(), Outcome()
    our_times: list[float] = []
    their_times: list[float] = []
    for _ in range(REPEATS):
        if not ours.failure:
            ours = _attempt(
                partial(_ours, model, inputs, expected_loss=loss.detach(), expected=expected),
                our_times,
            )
        if not theirs.failure:
            fresh = copy.deepcopy(model)
            theirs = _attempt(
                partial(_torch, fresh, inputs, expected_loss=loss.detach(), middle=middle),
                their_times,
            )
    return ours, theirs


def _middle_layer(model: torch.nn.Module, inputs: dict[str, Any]) -> str:
    layers = convert_to_deepopt(model, example_inputs=inputs).layers
    return layers[len(layers) // 2].name


def _attempt(convert: Callable[[], tuple[float, int, int]], times: list[float]) -> Outcome:
    try:
        time_s, cut_bytes, num_layers = convert()
    except Exception as error:  # noqa: BLE001 - whatever it raises is what is reported
        line = next(iter(str(error).strip().splitlines()), "")
        return Outcome(failure=f"{type(error).__name__}: {line}")
    times.append(time_s)
    return Outcome(time_s=statistics.median(times), cut_bytes=cut_bytes, num_layers=num_layers)


def _ours(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    *,
    expected_loss: torch.Tensor,
    expected: dict[str, torch.Tensor],
) -> tuple[float, int, int]:
    began = time.perf_counter()
    converted = convert_to_deepopt(model, example_inputs=inputs)
    time_s = time.perf_counter() - began
    loss = _loss(converted(**inputs))
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if not torch.equal(loss, expected_loss):
        raise ValueError(f"loss {loss.item()}, the original's {expected_loss.item()}")
    wrong = [name for name, grad in expected.items() if not torch.equal(grads[name], grad)]
    if wrong:
        raise ValueError(f"{len(wrong)} gradients differ, {wrong[0]} first")
    largest = max(layer.cut_bytes or 0 for layer in converted.layers[1:])
    return time_s, largest, len(converted.layers)


def _torch(
    model: torch.nn.Module,
    inputs: dict[str, Any],
    *,
    expected_loss: torch.Tensor,
    middle: str,
) -> tuple[float, int, int]:
    began = time.perf_counter()
    pipe = pipeline(
        model, mb_args=(), mb_kwargs=inputs, split_spec={middle: SplitPoint.BEGINNING}
    )
    time_s = time.perf_counter() - began
    if pipe.num_stages != 2:
        raise ValueError(f"{pipe.num_stages} stages, 2 were asked for")
    loss = _loss(pipe(**inputs))
    if not torch.allclose(loss, expected_loss, rtol=1e-5, atol=1e-5):
        raise ValueError(f"loss {loss.item()}, the original's {expected_loss.item()}")
    (output,) = (n for n in pipe.get_stage_module(0).graph.nodes if n.op == "output")
    values = output.args[0] if isinstance(output.args[0], tuple | list) else output.args
    carried = [node.meta["val"] for node in values]
    return time_s, sum(t.numel() * t.element_size() for t in carried), 2


def _loss(output: Any) -> torch.Tensor:
    """The output's own loss, also where torch made a tuple of the output; else a mean square."""
    loss = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if loss is None:
        loss = output[0] if isinstance(output, tuple | list) else output
    return loss if loss.dim() == 0 else loss.square().mean()


def _cells(outcome: Outcome) -> tuple[str, str, str]:
    if outcome.failure or outcome.time_s is None:
        return "-", "fails", "-"
    cut = f"{outcome.cut_bytes / 1024:.0f} KiB"
    return str(outcome.num_layers), f"{outcome.time_s:.2f} s", cut


if __name__ == "__main__":
    main()
