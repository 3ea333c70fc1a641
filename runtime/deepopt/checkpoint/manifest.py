"""The manifest of a checkpoint: which file holds which part of which tensor. Pure data.

It says whether a checkpoint is whole (`check_complete`) and whether its own text is undamaged
(the digest in front of it). It reads no file (`store` does) and knows no tensor library
(`shard_file` does).
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import prod
from typing import Any

from deepopt.checkpoint.fields import (
    as_json,
    check_names,
    check_type,
    take,
    take_count,
    take_list,
    take_optional,
)
from deepopt.errors import CheckpointError

SCHEMA_VERSION = 1
_PREFIX = '{"digest":"'
_MIDDLE = '","manifest":'
_SUFFIX = "}\n"
_DIGEST_CHARACTERS = 32


def new_digest() -> hashlib.blake2b:
    """The 128-bit hash of shards and manifests."""
    return hashlib.blake2b(digest_size=_DIGEST_CHARACTERS // 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSlice:
    """The part of a global tensor that a shard holds.

    Args:
        global_shape: shape of the whole tensor.
        offset: first index held, per dimension.
        extent: indices held, per dimension.
    """

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    extent: tuple[int, ...]

    def __post_init__(self) -> None:
        inside = len(self.global_shape) == len(self.offset) == len(self.extent) and all(
            min(offset, extent) >= 0 and offset + extent <= size
            for size, offset, extent in zip(
                self.global_shape, self.offset, self.extent, strict=True
            )
        )
        if not inside:
            raise CheckpointError(
                f"slice at {self.offset} of {self.extent} does not lie inside "
                f"the shape {self.global_shape}"
            )

    @classmethod
    def whole(cls, shape: Sequence[int]) -> TensorSlice:
        """The slice that is all of a tensor of that shape."""
        return cls(global_shape=tuple(shape), offset=(0,) * len(shape), extent=tuple(shape))

    def overlaps(self, other: TensorSlice) -> bool:
        """Whether some element lies in both; two slices of one global shape."""
        return all(
            max(a, b) < min(a + length_a, b + length_b)
            for a, length_a, b, length_b in zip(
                self.offset, self.extent, other.offset, other.extent, strict=True
            )
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardEntry:
    """One file of a checkpoint: one layer's state from one writer.

    Args:
        layer: the layer's fully qualified name.
        writer: rank that wrote it.
        file: path relative to the checkpoint folder.
        size_bytes: file size.
        digest: 128-bit hash of the file, hexadecimal.
        tensors: key -> (dtype name, slice).
    """

    layer: str
    writer: int
    file: str
    size_bytes: int
    digest: str
    tensors: dict[str, tuple[str, TensorSlice]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint is and what belongs to it.

    Args:
        job_id: the job.
        step: optimizer steps done.
        generation: worker group that wrote it.
        plan: the plan's `to_json()`; its `layer_names` say which layers must be there.
        plan_fingerprint: the plan's hash.
        skeleton_fingerprint: the model skeleton's hash.
        seed: the job's seed.
        num_groups: gradient groups of one step; fixed at the first launch.
        tokens_seen: tokens trained on so far; None when the data has no tokens.
        data_fingerprint: hash of the data source; None when it has none.
        data_state: state of a stream source; None for an indexed one.
        created_at: date and time for people.
        shards: every file.
        schema_version: version of this layout.
    """

    job_id: str
    step: int
    generation: int
    plan: dict[str, Any]
    plan_fingerprint: str
    skeleton_fingerprint: str
    seed: int
    num_groups: int
    tokens_seen: int | None
    data_fingerprint: str | None
    data_state: dict[str, Any] | None
    created_at: str
    shards: tuple[ShardEntry, ...]
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in ("plan", "data_state"):
            object.__setattr__(self, name, as_json(name, getattr(self, name)))

    def to_json(self) -> str:
        """The manifest as one JSON text that carries the digest of its own bytes."""
        body = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return f"{_PREFIX}{_digest_of(body)}{_MIDDLE}{body}{_SUFFIX}"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Parse what `to_json` gave.

        Raises:
            CheckpointError: a byte is missing, added or changed; another schema version; a
                field is missing, unknown or of a wrong type.
        """
        body = _checked_body(text)
        fields = check_type("manifest", json.loads(body), kind=dict)
        version = take(fields, "schema_version", int)
        if version != SCHEMA_VERSION:
            raise CheckpointError(
                f"manifest: schema version {version!r}, this deepopt reads {SCHEMA_VERSION}",
                remedy="use the deepopt version that wrote the checkpoint",
            )
        check_names(fields, wanted=cls.__dataclass_fields__)
        return cls(
            job_id=take(fields, "job_id", str),
            step=take_count(fields, "step"),
            generation=take_count(fields, "generation"),
            plan=take(fields, "plan", dict),
            plan_fingerprint=take(fields, "plan_fingerprint", str),
            skeleton_fingerprint=take(fields, "skeleton_fingerprint", str),
            seed=take(fields, "seed", int),
            num_groups=take_count(fields, "num_groups"),
            tokens_seen=take_optional(fields, "tokens_seen", int),
            data_fingerprint=take_optional(fields, "data_fingerprint", str),
            data_state=take_optional(fields, "data_state", dict),
            created_at=take(fields, "created_at", str),
            shards=tuple(_shard(entry) for entry in take(fields, "shards", list)),
            schema_version=version,
        )

    @property
    def layer_names(self) -> tuple[str, ...]:
        """The layers that the plan knows, in chain order."""
        return take_list(self.plan, "layer_names", str)

    def shards_of(self, layer: str) -> tuple[ShardEntry, ...]:
        """The files of one layer, in the manifest's order.

        Raises:
            CheckpointError: there is none.
        """
        shards = tuple(entry for entry in self.shards if entry.layer == layer)
        if not shards:
            raise CheckpointError(f"step {self.step} holds no layer {layer!r}")
        return shards


def check_complete(manifest: Manifest, layer_names: Iterable[str]) -> None:
    """Check that exactly these layers are there and that each tensor is whole.

    Args:
        manifest: what was written.
        layer_names: what must be there.

    Raises:
        CheckpointError: a layer is missing or unknown, a file is listed twice, or the slices of
            a tensor leave a hole, overlap, or disagree about shape or dtype.
    """
    wanted = set(layer_names)
    found = {entry.layer for entry in manifest.shards}
    for what, names in (("lacks", wanted - found), ("has unknown", found - wanted)):
        if names:
            raise CheckpointError(f"step {manifest.step} {what} layers {sorted(names)}")
    files = [entry.file for entry in manifest.shards]
    if len(set(files)) != len(files):
        twice = sorted({file for file in files if files.count(file) > 1})
        raise CheckpointError(f"step {manifest.step} lists files twice: {twice}")
    parts: dict[tuple[str, str], list[tuple[str, TensorSlice]]] = defaultdict(list)
    for entry in manifest.shards:
        for key, part in entry.tensors.items():
            parts[entry.layer, key].append(part)
    for (layer, key), held in parts.items():
        where = f"step {manifest.step}, layer {layer!r}, {key}"
        if len({dtype for dtype, _ in held}) > 1:
            raise CheckpointError(f"{where}: dtypes differ: {[dtype for dtype, _ in held]}")
        check_tiling(where, slices=[part for _, part in held])


def check_tiling(where: str, *, slices: Sequence[TensorSlice]) -> None:
    """Check that slices cover one tensor exactly.

    Args:
        where: what the slices belong to, for the message.
        slices: at least one.

    Raises:
        CheckpointError: a hole, an overlap, or different global shapes.
    """
    shapes = {part.global_shape for part in slices}
    if len(shapes) != 1:
        raise CheckpointError(f"{where}: global shapes differ: {sorted(shapes)}")
    for one, other in combinations(slices, 2):
        if one.overlaps(other):
            raise CheckpointError(f"{where}: slices overlap: {one} and {other}")
    held = sum(prod(part.extent) for part in slices)
    total = prod(shapes.pop())
    if held != total:
        raise CheckpointError(f"{where}: slices hold {held} of {total} elements")


def _digest_of(body: str) -> str:
    digest = new_digest()
    digest.update(body.encode())
    return digest.hexdigest()


def _checked_body(text: str) -> str:
    start = len(_PREFIX) + _DIGEST_CHARACTERS
    body = text[start + len(_MIDDLE) : -len(_SUFFIX)]
    digest = text[len(_PREFIX) : start]
    if text != f"{_PREFIX}{digest}{_MIDDLE}{body}{_SUFFIX}":
        raise CheckpointError("manifest is truncated or not a manifest")
    if _digest_of(body) != digest:
        raise CheckpointError(f"manifest is damaged: its text does not have digest {digest!r}")
    return body


def _shard(value: Any) -> ShardEntry:
    entry = check_type("shard", value, kind=dict)
    check_names(entry, wanted=ShardEntry.__dataclass_fields__)
    file = take(entry, "file", str)
    if not file or "/" in file or file in (".", ".."):
        raise CheckpointError(
            f"manifest: file must be a name inside the folder, found {file!r}"
        )
    return ShardEntry(
        layer=take(entry, "layer", str),
        writer=take_count(entry, "writer"),
        file=file,
        size_bytes=take_count(entry, "size_bytes"),
        digest=take(entry, "digest", str),
        tensors={key: _tensor(part) for key, part in take(entry, "tensors", dict).items()},
    )


def _tensor(value: Any) -> tuple[str, TensorSlice]:
    pair = check_type("tensor", value, kind=list)
    if len(pair) != 2:
        raise CheckpointError(f"manifest: tensor must be [dtype, slice], found {value!r}")
    part = check_type("slice", pair[1], kind=dict)
    check_names(part, wanted=TensorSlice.__dataclass_fields__)
    return check_type("dtype", pair[0], kind=str), TensorSlice(
        global_shape=take_list(part, "global_shape", int),
        offset=take_list(part, "offset", int),
        extent=take_list(part, "extent", int),
    )
