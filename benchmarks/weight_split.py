"""What weight gradients cost when they wait: I and W against one backward, and the bytes held between.

First table: a stage of transformer blocks (dense, of the built-in model) on one thread, all
contenders in turns:
- `plain`: nn.Sequential and `backward()`, gradients added in place: what PyTorch itself takes.
- `stage B`: Stage.backward; `stage I + W`: Stage.backward_input, then Stage.backward_weight.
- `torch split`: stage_backward_input and stage_backward_weight of torch.distributed.pipelining.
- `our graph split`: the way of layers that no deferring operation serves, here for every matrix.
The ratio is time of `stage B` over that of `stage I + W`, F left out.

Second table: a head and cross-entropy as the last stage, the gradient of the loss computed with F
or kept for B.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from _machine import describe
from _report import progress, ratio_line, say, table
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from deepopt.models.moe_transformer import build
from deepopt.pipeline.gradients import StageGradients
from deepopt.pipeline.graph_split import SplitBackward
from deepopt.pipeline.stage import Layer, Stage

AIM = 0.98
CPU = torch.device("cpu")
MIB = 2**20

# One micro-batch: F gives the output, I and W (B, and nothing) do the rest.
Part = Callable[[], object]
Contender = Callable[[torch.Tensor, torch.Tensor], tuple[Part, Part, Part]]


@dataclass
class Measured:
    """One contender's figures, a list entry a micro-batch."""

    f_s: list[float] = field(default_factory=list)
    i_s: list[float] = field(default_factory=list)
    w_s: list[float] = field(default_factory=list)
    after_f: int = 0  # bytes
    after_i: int = 0

    @property
    def backward_s(self) -> list[float]:
        """I and W together, or B."""
        return [i + w for i, w in zip(self.i_s, self.w_s, strict=True)]


def main() -> None:
    """Measure and print both tables and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run")
    parser.add_argument("--width", type=int, default=512, help="features of the blocks")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--runs", type=int, default=40)
    options = parser.parse_args()
    runs = 3 if options.quick else options.runs
    torch.set_num_threads(1)
    say("\n".join(describe()))
    width, tokens = options.width, options.tokens
    say(
        f"stage:    {options.blocks} blocks, width {width}, {tokens} tokens, fp32, 1 thread, {runs} runs"
    )
    contenders = {
        "plain": _plain(_blocks(options)),
        "stage B": _stage(_blocks(options), apart=False),
        "stage I + W": _stage(_blocks(options), apart=True),
        "torch split": _torch_split(_blocks(options)),
        "our graph split": _graph_split(_blocks(options)),
    }
    progress("measuring the split")
    shape = (tokens // 128, 128, width)
    measured = _measure(contenders, torch.randn(shape), torch.randn(shape), runs=runs)
    say("\n" + _split_table(measured) + "\n")
    progress("measuring the loss")
    say(_loss_table(width=width, tokens=tokens, runs=runs) + "\n")
    say(ratio_line(_ratio(measured["stage B"], measured["stage I + W"]), aim=AIM))


def _measure(
    contenders: Mapping[str, Contender], x: torch.Tensor, grad: torch.Tensor, *, runs: int
) -> dict[str, Measured]:
    measured = {name: Measured() for name in contenders}
    for run in range(-2, runs):  # two to warm up
        # In reverse every second time: nobody always runs into the same one's caches.
        for name in contenders if run % 2 else reversed(contenders):
            one = measured[name]
            x_own = x.clone().requires_grad_(x.is_floating_point())
            forward, first, second = contenders[name](x_own, grad)
            before = _allocated() if run == -1 else 0
            began = time.perf_counter()
            forward()
            forwarded = time.perf_counter()
            if run == -1:
                one.after_f = _allocated() - before
            starting = time.perf_counter()
            first()
            middle = time.perf_counter()
            x_own.grad = None
            if run == -1:
                one.after_i = _allocated() - before
            resumed = time.perf_counter()
            second()
            ended = time.perf_counter()
            if run >= 0:
                one.f_s.append(forwarded - began)
                one.i_s.append(middle - starting)
                one.w_s.append(ended - resumed)
    return measured


def _ratio(base: Measured, other: Measured) -> float:
    """Median over neighbouring runs of the backward time of one over that of the other."""
    pairs = zip(base.backward_s, other.backward_s, strict=True)
    return statistics.median(b / o for b, o in pairs)


def _split_table(measured: Mapping[str, Measured]) -> str:
    rows = []
    for name, one in measured.items():
        median_ms = [statistics.median(v) * 1e3 for v in (one.f_s, one.i_s, one.w_s)]
        rows.append(
            [
                name,
                *(f"{value:.2f}" for value in median_ms),
                f"{1 / _ratio(measured['stage B'], one):.3f}",
                f"{1 / _ratio(measured['plain'], one):.3f}",
                f"{one.after_f / MIB:.1f}",
                f"{one.after_i / MIB:.1f}",
            ]
        )
    header = ["way", "F ms", "I or B ms", "W ms", "I+W / stage B", "I+W / plain B"]
    return table([*header, "MiB after F", "MiB after I"], rows)


# Contenders. -----------------------------------------------------------------------------


def _blocks(options: argparse.Namespace) -> list[torch.nn.Module]:
    torch.manual_seed(0)
    model = build(
        num_blocks=options.blocks,
        num_dense_layers=options.blocks,
        d_model=options.width,
        expert_hidden=options.width // 2,
    )
    return [module.train() for name, module in model.deepopt_layers()[1:-1]]


def _make_stage(modules: Sequence[torch.nn.Module], **options: object) -> Stage:
    layers = []
    for index, module in enumerate(modules):
        parameters = {f"{index}.{name}": p for name, p in module.named_parameters()}
        layers.append(Layer(index=index, name=str(index), module=module, parameters=parameters))
    named = {name: p for layer in layers for name, p in layer.parameters.items()}
    return Stage(
        0,
        layers,
        gradients=StageGradients(named, apart=(), groups=(0,), device=CPU),
        group_of={0: 0},
        seed=0,
        device=CPU,
        num_microbatches=1,
        **options,  # type: ignore[arg-type]
    )


def _stage(modules: Sequence[torch.nn.Module], *, apart: bool) -> Contender:
    stage = _make_stage(modules, defer_weights=apart)

    def prepare(x: torch.Tensor, grad: torch.Tensor) -> tuple[Part, Part, Part]:
        def forward() -> None:
            stage.forward(0, (x,))

        def backward() -> None:
            (stage.backward_input if apart else stage.backward)(0, (grad,))

        return forward, backward, lambda: stage.backward_weight(0) if apart else None

    return prepare


def _plain(modules: Sequence[torch.nn.Module]) -> Contender:
    model = torch.nn.Sequential(*modules)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def prepare(x: torch.Tensor, grad: torch.Tensor) -> tuple[Part, Part, Part]:
        outputs: list[torch.Tensor] = []

        def backward() -> None:
            outputs.pop().backward(grad)

        return lambda: outputs.append(model(x)), backward, lambda: None

    return prepare


def _torch_split(modules: Sequence[torch.nn.Module]) -> Contender:
    model = torch.nn.Sequential(*modules)
    parameters = list(model.parameters())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def prepare(x: torch.Tensor, grad: torch.Tensor) -> tuple[Part, Part, Part]:
        outputs: list[torch.Tensor] = []
        groups: list[list[dict[str, object]]] = []

        def first() -> None:
            found = stage_backward_input([outputs.pop()], [grad], [x], iter(parameters))
            groups.append(found[1])

        def second() -> None:
            stage_backward_weight(iter(parameters), groups.pop())

        return lambda: outputs.append(model(x)), first, second

    return prepare


def _graph_split(modules: Sequence[torch.nn.Module]) -> Contender:
    model = torch.nn.Sequential(*modules)
    weights = [p for p in model.parameters() if p.dim() >= 2]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def prepare(x: torch.Tensor, grad: torch.Tensor) -> tuple[Part, Part, Part]:
        outputs: list[torch.Tensor] = []
        divided: list[SplitBackward] = []

        def first() -> None:
            divided.append(SplitBackward([outputs.pop()], inputs=[x], weights=weights))
            divided[0].run_inputs([grad])

        return lambda: outputs.append(model(x)), first, lambda: divided.pop().run_weights()

    return prepare


# The loss. -------------------------------------------------------------------------------

_VOCABULARY = 8192


def _loss_table(*, width: int, tokens: int, runs: int) -> str:
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        contenders = {}
        for name, with_f in (("loss kept in the graph", False), ("its gradient with F", True)):
            torch.manual_seed(0)
            head = torch.nn.Linear(width, _VOCABULARY, bias=False).to(dtype)
            contenders[name] = _loss_stage(head, with_f=with_f)
        measured = _measure(
            contenders,
            torch.randn(tokens, width).to(dtype),
            torch.randint(_VOCABULARY, (tokens,)),
            runs=runs,
        )
        for name, one in measured.items():
            whole = [f + b for f, b in zip(one.f_s, one.backward_s, strict=True)]
            figures = (one.f_s, one.backward_s, whole)
            rows.append(
                [
                    f"{str(dtype).removeprefix('torch.')}: {name}",
                    *(f"{statistics.median(values) * 1e3:.2f}" for values in figures),
                    f"{one.after_f / MIB:.1f}",
                ]
            )
    return table(["last stage", "F ms", "B ms", "F + B ms", "MiB after F"], rows)


def _loss_stage(head: torch.nn.Module, *, with_f: bool) -> Contender:
    # A loss with a leaf of its own keeps its graph until B: the stage as it would be.
    leaf = torch.zeros((), requires_grad=True)

    def loss(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        value = F.cross_entropy(output.float(), targets)
        return value if with_f else value + leaf

    stage = _make_stage([head], loss=loss)

    def prepare(x: torch.Tensor, targets: torch.Tensor) -> tuple[Part, Part, Part]:
        return (
            lambda: stage.forward(0, (x,), targets),
            lambda: stage.backward(0),
            lambda: None,
        )

    return prepare


class _MallocInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc 2.33 and later."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd",
            "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


def _allocated() -> int:
    """Bytes that the C allocator has handed out, torch's CPU tensors among them."""
    gc.collect()
    libc = ctypes.CDLL("libc.so.6")
    libc.mallinfo2.restype = _MallocInfo
    found = libc.mallinfo2()
    return int(found.uordblks) + int(found.hblkhd)


if __name__ == "__main__":
    main()
