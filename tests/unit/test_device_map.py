"""A device map says which device holds which layers; one that cannot be is refused in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepopt.errors import PlanError
from deepopt.trainer.device_map import parse_device, read_device_map

LAYERS = [f"layers.{i}" for i in range(8)]


def names(placing: object) -> list[str]:
    return [str(device) for device in placing.devices]  # type: ignore[attr-defined]


def test_a_range_a_device_is_a_line() -> None:
    placing = read_device_map({"gpu0": [0, 1, 2, 3], "gpu1": [4, 5, 6, 7]}, layer_names=LAYERS)
    assert (names(placing), placing.boundaries) == (["gpu0", "gpu1"], (0, 4))
    assert placing.placement is None


def test_lists_may_be_uneven_and_out_of_order() -> None:
    placing = read_device_map(
        {"cpu7": [7, 6], "cpu0": [5, 3, 4, 2, 1], "cpu3": [0]}, layer_names=LAYERS
    )
    assert (names(placing), placing.boundaries) == (["cpu3", "cpu0", "cpu7"], (0, 1, 6))


def test_folded_once_is_a_v() -> None:
    placing = read_device_map({"gpu0": [0, 1, 6, 7], "gpu1": [2, 3, 4, 5]}, layer_names=LAYERS)
    assert (placing.boundaries, placing.placement) == ((0, 2, 4, 6), "v")


def test_the_same_round_again_is_a_line_with_several_stages_a_device() -> None:
    placing = read_device_map({"gpu0": [0, 1, 4, 5], "gpu1": [2, 3, 6, 7]}, layer_names=LAYERS)
    assert (placing.boundaries, placing.placement) == ((0, 2, 4, 6), "line")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpu0", ("cuda", 0, None)),
        ("cuda:1", ("cuda", 1, None)),
        ("cpu12", ("cpu", 12, None)),
        ("node-1:gpu3", ("cuda", 3, "node-1")),
        ("me@10.0.0.5/cuda:0", ("cuda", 0, "me@10.0.0.5")),
    ],
)
def test_devices_have_names(name: str, expected: tuple[str, int, str | None]) -> None:
    device = parse_device(name)
    assert (device.kind, device.index, device.host) == expected


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"gpu0": [0, 1, 2], "gpu1": [4, 5, 6, 7]}, r"no device for layer 3: .*3 is layers\.3"),
        ({"gpu0": [0], "gpu1": [7]}, "no device for layer 1 to 6"),
        ({"gpu0": [0, 1, 2, 3], "gpu1": [3, 4, 5, 6, 7]}, "layer 3 is on gpu0 and on gpu1"),
        ({"gpu0": list(range(9))}, "has layer 8, the model has layers 0 to 7"),
        ({"gpu0": [-1, *range(8)]}, "has layer -1"),
        ({"tpu0": list(range(8))}, "'tpu0' is not a device"),
        ({0: list(range(8))}, "0 is not a device"),
        ({"gpu0": [0, 1, 2, 3], "cuda:0": [4, 5, 6, 7]}, "one device twice: gpu0 and cuda:0"),
        ({"gpu0": [0, 1, 2, 3], "cpu0": [4, 5, 6, 7]}, "mixes GPUs and CPUs"),
        ({"a:gpu0": [0, 1, 2, 3], "gpu0": [4, 5, 6, 7]}, "hosts for some devices only"),
        ({"gpu0": 3}, "gpu0 has 3, not layers"),
        ({"gpu0": []}, r"gpu0 has \[\], not layers"),
        ({"gpu0": ["0"]}, "gpu0 has '0', not a layer"),
        ({}, "not a mapping"),
        (
            {"gpu0": [0, 3, 5], "gpu1": [1, 6], "gpu2": [2, 4, 7]},
            "makes no pipeline: .* gpu0, gpu1, gpu2, gpu0, gpu2, gpu0, gpu1, gpu2",
        ),
    ],
)
def test_a_wrong_map_is_one_clear_error(device_map: object, message: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        read_device_map(device_map, layer_names=LAYERS)
    assert caught.value.remedy


def test_a_fold_needs_two_layers_at_its_end() -> None:
    with pytest.raises(PlanError, match="gpu1, which has one layer for two stages"):
        read_device_map({"gpu0": [0, 2], "gpu1": [1]}, layer_names=LAYERS[:3])


@given(st.lists(st.integers(1, 4), min_size=1, max_size=6), st.randoms())
def test_any_cut_into_ranges_is_read_back(sizes: list[int], random: object) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    device_map = {
        f"gpu{i}": random.sample(range(start, start + size), size)  # type: ignore[attr-defined]
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    }
    placing = read_device_map(device_map, layer_names=[str(i) for i in range(sum(sizes))])
    assert placing.boundaries == tuple(starts)
