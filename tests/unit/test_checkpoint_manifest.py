"""The manifest: its text detects damage, and it knows whether a checkpoint is whole."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.checkpoint.manifest import (
    Manifest,
    ShardEntry,
    TensorSlice,
    check_complete,
    new_digest,
)
from deepopt.errors import CheckpointError
from support.checkpoints import LAYERS, make_manifest


def part(
    shape: tuple[int, ...], offset: tuple[int, ...], extent: tuple[int, ...]
) -> TensorSlice:
    return TensorSlice(global_shape=shape, offset=offset, extent=extent)


def entry(
    layer: str, *parts: TensorSlice, writer: int = 0, dtype: str = "float32"
) -> ShardEntry:
    return ShardEntry(
        layer=layer,
        writer=writer,
        file=f"{layer}.{writer}",
        size_bytes=8,
        digest="00",
        tensors={f"parameter/{i}": (dtype, one) for i, one in enumerate(parts)},
    )


WHOLE = part((4, 2), (0, 0), (4, 2))
TOP = part((4, 2), (0, 0), (2, 2))
BOTTOM = part((4, 2), (2, 0), (2, 2))
MANIFEST = make_manifest(50, shards=[entry(name, WHOLE) for name in LAYERS])


def reseal(fields: Any) -> str:
    """A manifest text with a right digest and whatever content."""
    body = json.dumps(fields)
    digest = new_digest()
    digest.update(body.encode())
    return f'{{"digest":"{digest.hexdigest()}","manifest":{body}}}\n'


def fields_of(manifest: Manifest) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(manifest.to_json())["manifest"]
    return fields


def test_a_manifest_comes_back_equal_from_its_text():
    assert Manifest.from_json(MANIFEST.to_json()) == MANIFEST
    assert Manifest.from_json(reseal(fields_of(MANIFEST))) == MANIFEST


@settings(deadline=None, derandomize=True)
@given(st.data())
def test_every_flipped_bit_of_the_text_is_detected(data: st.DataObject):
    text = bytearray(MANIFEST.to_json().encode())
    position = data.draw(st.integers(0, len(text) - 1))
    text[position] ^= 1 << data.draw(st.integers(0, 6))
    with pytest.raises(CheckpointError, match=r"damaged|truncated"):
        Manifest.from_json(text.decode())


def test_every_truncation_and_every_addition_is_detected():
    text = MANIFEST.to_json()
    for length in range(len(text)):
        with pytest.raises(CheckpointError):
            Manifest.from_json(text[:length])
    for longer in (text + "\n", " " + text, text + text):
        with pytest.raises(CheckpointError):
            Manifest.from_json(longer)


def test_another_schema_version_is_refused_by_number():
    text = replace(MANIFEST, schema_version=99).to_json()
    with pytest.raises(CheckpointError, match="schema version 99"):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "50"),
        ("step", True),
        ("step", -1),
        ("step", 50.0),
        ("job_id", None),
        ("plan", []),
        ("tokens_seen", "many"),
        ("data_state", 3),
        ("schema_version", None),
        ("shards", {}),
        ("shards", ["x"]),
    ],
)
def test_a_field_of_a_wrong_type_is_named(name: str, value: object):
    with pytest.raises(CheckpointError, match=name.removesuffix("s")):
        Manifest.from_json(reseal({**fields_of(MANIFEST), name: value}))


def test_missing_and_unknown_fields_are_named():
    fields = fields_of(MANIFEST)
    del fields["seed"]
    with pytest.raises(CheckpointError, match=r"missing \['seed'\], unknown \['sed'\]"):
        Manifest.from_json(reseal({**fields, "sed": 1}))
    with pytest.raises(CheckpointError, match="must be dict"):
        Manifest.from_json(reseal([1]))


@pytest.mark.parametrize("file", ["../other", "/etc/passwd", "..", ""])
def test_a_shard_cannot_point_outside_its_folder(file: str):
    fields = fields_of(MANIFEST)
    fields["shards"][0]["file"] = file
    with pytest.raises(CheckpointError, match="inside the folder"):
        Manifest.from_json(reseal(fields))


def test_a_data_state_that_is_no_json_is_refused_when_the_manifest_is_made():
    with pytest.raises(CheckpointError, match="data_state cannot be written as JSON"):
        replace(MANIFEST, data_state={"rng": object()})
    with pytest.raises(CheckpointError, match="data_state"):
        replace(MANIFEST, data_state={"loss": float("nan")})


def test_slices_that_tile_every_tensor_are_complete():
    shards = [
        entry("embedding", WHOLE, part((), (), ()), part((0, 3), (0, 0), (0, 3))),
        entry("blocks.0", TOP, writer=0),
        entry("blocks.0", BOTTOM, writer=1),
    ]
    check_complete(make_manifest(1, shards=shards), LAYERS)


@pytest.mark.parametrize(
    ("shards", "reason"),
    [
        ([entry("embedding", WHOLE)], r"lacks layers \['blocks.0'\]"),
        ([*MANIFEST.shards, entry("blocks.9", WHOLE)], r"unknown layers \['blocks.9'\]"),
        ([*MANIFEST.shards, entry("blocks.0", WHOLE)], "lists files twice"),
        ([entry("embedding", WHOLE), entry("blocks.0", TOP)], "hold 4 of 8 elements"),
        ([*MANIFEST.shards, entry("blocks.0", WHOLE, writer=1)], "overlap"),
        ([*MANIFEST.shards, entry("blocks.0", BOTTOM, writer=1)], "overlap"),
        (
            [
                entry("embedding", WHOLE),
                entry("blocks.0", TOP),
                entry("blocks.0", part((5, 2), (2, 0), (3, 2)), writer=1),
            ],
            "global shapes differ",
        ),
        (
            [
                entry("embedding", WHOLE),
                entry("blocks.0", TOP),
                entry("blocks.0", BOTTOM, writer=1, dtype="bfloat16"),
            ],
            "dtypes differ",
        ),
    ],
)
def test_what_is_not_whole_is_named(shards: list[ShardEntry], reason: str):
    with pytest.raises(CheckpointError, match=reason):
        check_complete(make_manifest(1, shards=shards), LAYERS)


@pytest.mark.parametrize(
    ("shape", "offset", "extent"),
    [((4,), (1,), (4,)), ((4,), (-1,), (2,)), ((4,), (1,), (-1,)), ((4,), (0, 0), (1, 1))],
)
def test_a_slice_outside_its_tensor_is_refused(
    shape: tuple[int, ...], offset: tuple[int, ...], extent: tuple[int, ...]
):
    with pytest.raises(CheckpointError, match="does not lie inside"):
        part(shape, offset, extent)
