"""The order of samples: a permutation an epoch, a function of seed and epoch."""

from __future__ import annotations

import pytest

from deepopt.datasets.order import sample_index


def epoch_order(epoch: int, *, num_samples: int, seed: int) -> list[int]:
    start = epoch * num_samples
    return [
        sample_index(p, num_samples=num_samples, seed=seed)
        for p in range(start, start + num_samples)
    ]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 16, 17, 64, 100, 257])
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_an_epoch_has_every_sample_once(num_samples: int, seed: int) -> None:
    for epoch in range(3):
        order = epoch_order(epoch, num_samples=num_samples, seed=seed)
        assert sorted(order) == list(range(num_samples))


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = {
        tuple(epoch_order(epoch, num_samples=50, seed=seed))
        for epoch in range(4)
        for seed in range(4)
    }
    assert len(orders) == 16
    assert tuple(range(50)) not in orders


def test_small_permutations_are_about_equally_likely() -> None:
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(epoch_order(epoch, num_samples=3, seed=7))
        counts[order] = counts.get(order, 0) + 1
    # 6 orders, 200 each expected, standard deviation 13: five of them either way.
    assert len(counts) == 6
    assert all(135 < count < 265 for count in counts.values())


def test_the_order_never_changes_between_versions() -> None:
    assert epoch_order(0, num_samples=10, seed=0) == [7, 8, 9, 2, 1, 3, 6, 5, 4, 0]
    assert sample_index(10**15, num_samples=10**9 + 7, seed=5) == 935141564
