"""Which linear maps of a model, whoever wrote it, compute in FP8; and letting them.

`choose` decides from plain facts; `set_fp8_linears` looks at a model, asks it, and changes the class of
the chosen `nn.Linear`s in place (`deepopt_kernels.fp8_linear`): parameters, names, ties and hooks stay.

Without patterns the choice is that of published FP8 runs: the linear maps inside a model's repeated
blocks. The rest, from the output projection to routers, is few operations and sensitive to rounding.

What it does not do: reach products that are no `nn.Linear` (grouped experts, `nn.MultiheadAttention`,
`Conv1D`), or modules that read a linear's weight instead of calling it.

Source: arXiv:2412.19437 (DeepSeek-V3), section 3.3.1: embedding, output head, gates and norms keep their
precision.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch

from deepopt.errors import ClusterError, InputError
from deepopt_kernels.fp8_format import TILE
from deepopt_kernels.fp8_linear import Fp8Linear, from_fp8, to_fp8
from deepopt_kernels.fp8_scaled_mm import ALIGNMENT, has_block_scales

NONE = "none"  # of `precision.fp8`
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SHOWN = 3  # names of a kind before a count takes over


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearMap:
    """One linear map of a model.

    Args:
        path: of its module.
        outputs: rows of its weight.
        inputs: columns of it.
        obstacle: why it cannot compute in FP8 at all; empty when it can, as far as its shape allows.
        shares_weight: whether something that is no linear map holds its weight too.
    """

    path: str
    outputs: int
    inputs: int
    obstacle: str = ""
    shares_weight: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fp8Choice:
    """What computes in FP8.

    Args:
        taken: paths of linear maps.
        left: path of each other one -> why.
    """

    taken: tuple[str, ...]
    left: Mapping[str, str]


def choose(
    linears: Sequence[LinearMap],
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    section: str = "",
) -> Fp8Choice:
    """Choose the linear maps that compute in FP8.

    A pattern (`*`, `?`, `[...]`; `*` matches dots, too) names a linear map, or a module that holds it.

    Args:
        linears: of the model, in its order.
        include: patterns: all that they name, as far as possible; None: the default choice.
        exclude: patterns of those that do not.
        section: how errors call what the patterns are keys of, with a dot.

    Raises:
        InputError: a pattern names no linear map, or none is left.
    """
    for key, patterns in (("fp8_include", include or ()), ("fp8_exclude", exclude)):
        _check_patterns(patterns, linears, field=f"{section}{key}")
    taken, left = [], {}
    last = linears[-1].path if linears else ""
    for linear in linears:
        reason = _impossible(linear)
        if not reason and _names(exclude, linear.path):
            reason = "excluded"
        if not reason and include is not None and not _names(include, linear.path):
            reason = "not included"
        if not reason and include is None:
            reason = _undesirable(linear, is_last=linear.path == last)
        if reason:
            left[linear.path] = reason
        else:
            taken.append(linear.path)
    if not taken:
        found = "; ".join(grouped(left)) or "the model has no nn.Linear"
        raise InputError(
            f"{section}fp8: no linear map would compute in FP8: {found}",
            remedy=f"name some in {section}fp8_include, or set {section}fp8 to {NONE}",
        )
    return Fp8Choice(taken=tuple(taken), left=left)


def grouped(left: Mapping[str, str]) -> Iterator[str]:
    """`REASON (NAME, NAME, NAME and 7 more)` of each reason.

    Args:
        left: name -> reason.
    """
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"{reason} ({', '.join(names[:_SHOWN])}{more})"


def set_fp8_linears(
    model: torch.nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    section: str = "",
) -> Fp8Choice:
    """Let the chosen linear maps of a model, and no others, compute in FP8 from now on.

    Args:
        model: changed in place: the class of some `nn.Linear`s, nothing else.
        include: as for `choose`.
        exclude: as for `choose`.
        section: as for `choose`.

    Raises:
        InputError: as `choose`; the model is unchanged then.
    """
    choice = choose(linear_maps(model), include=include, exclude=exclude, section=section)
    for path in choice.taken:
        linear = model.get_submodule(path)
        if type(linear) is torch.nn.Linear:
            to_fp8(linear)
    for path in choice.left:
        linear = model.get_submodule(path)
        if isinstance(linear, Fp8Linear):  # of an earlier choice
            from_fp8(linear)
    return choice


def linear_maps(model: torch.nn.Module) -> list[LinearMap]:
    """The `nn.Linear`s of a model and what is derived from them, each once.

    Args:
        model: on any device.
    """
    elsewhere = _held_by_others(model)
    return [
        LinearMap(
            path=path,
            outputs=module.out_features,
            inputs=module.in_features,
            obstacle=_obstacle(module),
            shares_weight=id(module.weight) in elsewhere,
        )
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    ]


def fp8_weights(model: torch.nn.Module) -> frozenset[int]:
    """`id()`s of the weights of a module's linear maps that compute in FP8.

    Args:
        model: or a part of one.
    """
    return frozenset(id(m.weight) for m in model.modules() if isinstance(m, Fp8Linear))


def check_device(device: torch.device) -> None:
    """Refuse a GPU that has no products of FP8 matrices with a scale a tile.

    Args:
        device: of this process.

    Raises:
        ClusterError: it would be slower there than bfloat16.
    """
    if device.type != "cuda":
        return
    capability, cuda = torch.cuda.get_device_capability(device), torch.version.cuda
    if has_block_scales(capability, cuda):
        return
    raise ClusterError(
        f"precision.fp8 is blockwise, and {torch.cuda.get_device_name(device)} (compute capability "
        f"{capability[0]}.{capability[1]}, torch for CUDA {cuda}) has no FP8 products with a scale a tile: "
        "they take a Hopper GPU (9.0) and torch for CUDA 12.9 or later",
        remedy=f"set precision.fp8 to {NONE}, or use such GPUs",
    )


def _names(patterns: Sequence[str], path: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns for name in _holders(path))


def _holders(path: str) -> list[str]:
    """The paths of the modules that hold a linear map, and its own."""
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _check_patterns(
    patterns: Sequence[str], linears: Sequence[LinearMap], *, field: str
) -> None:
    paths = [linear.path for linear in linears]
    for pattern in patterns:
        if any(_names([pattern], path) for path in paths):
            continue
        names = dict.fromkeys(name for path in paths for name in _holders(path))
        close = difflib.get_close_matches(pattern, names, n=1)
        known = f"linear maps here: {_some(paths)}" if paths else "the model has no nn.Linear"
        raise InputError(
            f"{field}: {pattern!r} names no linear map of the model",
            remedy=f"did you mean {close[0]!r}?" if close else known,
        )


def _some(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return f"{', '.join(paths[:_SHOWN])}{more}"


def _impossible(linear: LinearMap) -> str:
    if linear.obstacle:
        return linear.obstacle
    if linear.outputs % ALIGNMENT or linear.inputs % ALIGNMENT:
        return f"a side is no multiple of {ALIGNMENT}"
    return ""


def _undesirable(linear: LinearMap, *, is_last: bool) -> str:
    """Why a linear map is left as it is where nobody asks for it."""
    if linear.shares_weight:
        return "its weight is an embedding's, too"
    *holders, own = linear.path.split(".")
    if own in ("gate", "router") or own.endswith("_gate") or "router" in holders:
        return "it routes"
    if not any(holder.isdigit() for holder in holders):
        # An element of an nn.Sequential is a block by itself; the last one makes the output.
        if not own.isdigit():
            return "outside of repeated blocks"
        if is_last:
            return "the output projection"
    if min(linear.outputs, linear.inputs) < TILE:
        return f"a side is shorter than {TILE}, a tile"  # casts would outweigh the product
    return ""


def _obstacle(module: torch.nn.Linear) -> str:
    if type(module) not in (torch.nn.Linear, Fp8Linear):
        return f"a {type(module).__name__} may compute something else"
    if module.weight.dtype not in _TYPES:
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}"
    return ""


def _held_by_others(model: torch.nn.Module) -> frozenset[int]:
    """`id()`s of parameters that a module holds which is no linear map."""
    return frozenset(
        id(parameter)
        for module in model.modules()
        if not isinstance(module, torch.nn.Linear)
        for parameter in module.parameters(recurse=False)
    )
