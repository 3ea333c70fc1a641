"""From which step a group goes on, and who sends what to whom: pure."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from deepopt.head.survivors import restore
from deepopt.planner.plan import Plan
from deepopt.schedule.ir import PlacementKind
from deepopt.worker.messages import Standing

LAYERS = ("a", "b", "c", "d")


def make_plan(placement: PlacementKind) -> Plan:
    return Plan(
        plan_id=1,
        layer_names=LAYERS,
        boundaries=(0, 1, 2, 3),
        placement=placement,
        schedule="bi_stream" if placement is PlacementKind.MIRROR else "1f1b",
        pipeline_size=4,
        data_size=1,
        num_microbatches=4,
        num_groups=2,
    )


MIRROR, LINE = make_plan(PlacementKind.MIRROR), make_plan(PlacementKind.LINE)


def standing(plan: Plan, rank: int, version: int, **more: object) -> Standing:
    layers = tuple(LAYERS[stage] for stage in plan.held_stages(rank))
    return Standing(version=version, ready=False, layers=layers, **more)  # type: ignore[arg-type]


def test_a_lost_worker_gets_its_layers_from_those_who_train_them_too() -> None:
    found = restore(MIRROR, survivors={r: standing(MIRROR, r, 7) for r in (0, 1, 3)})
    assert found is not None
    assert (found.step, found.source) == (7, "copies")
    assert {(t.layer, t.source, t.target) for t in found.transfers} == {
        ("b", 1, 2),
        ("c", 1, 2),
    }


def test_who_is_ready_makes_the_step_that_another_has_made() -> None:
    behind = Standing(version=6, ready=True, layers=("a", "d"))
    found = restore(MIRROR, survivors={0: behind, 1: standing(MIRROR, 1, 7)})
    assert found is not None
    assert found.step == 7


def test_who_is_not_ready_takes_nobody_along() -> None:
    """It cannot be: nobody ends an exchange that not all have begun. Then the disk decides."""
    behind = Standing(version=6, ready=False, layers=("a", "d"))
    assert restore(MIRROR, survivors={0: behind, 1: standing(MIRROR, 1, 7)}) is None


def test_copies_of_an_earlier_step_take_all_back_to_it() -> None:
    survivors = {
        0: standing(LINE, 0, 9, held=(6, 8)),
        1: standing(LINE, 1, 9, held=(6, 8), replicas={6: ("d",), 8: ("d",)}),
        2: standing(LINE, 2, 9, held=(6, 8)),
    }
    found = restore(LINE, survivors=survivors)
    assert found is not None
    assert (found.step, found.source) == (8, "replicas")
    (transfer,) = found.transfers
    assert (transfer.layer, transfer.source, transfer.target, transfer.replica) == (
        "d",
        1,
        3,
        True,
    )


def test_a_copy_that_is_not_whole_gives_the_one_before() -> None:
    survivors = {
        0: standing(LINE, 0, 9, held=(6, 8)),
        1: standing(LINE, 1, 9, held=(6, 8), replicas={6: ("d",)}),
        2: standing(LINE, 2, 9, held=(6, 8)),
    }
    found = restore(LINE, survivors=survivors)
    assert found is not None
    assert found.step == 6


def test_a_layer_without_any_copy_needs_the_disk() -> None:
    survivors = {r: standing(LINE, r, 9) for r in (0, 1, 2)}
    assert restore(LINE, survivors=survivors) is None
    assert restore(LINE, survivors={}) is None


def test_under_another_plan_who_keeps_a_copy_of_its_new_layers_takes_it_itself() -> None:
    fewer = replace(LINE, boundaries=(0, 2), pipeline_size=2)
    survivors = {  # ranks 0 and 2 of four; those after them are lost, and their copies are here
        0: standing(LINE, 0, 7, replicas={7: ("c", "d")}),
        1: standing(LINE, 2, 7, replicas={7: ("a", "b")}),
    }
    found = restore(fewer, survivors=survivors)
    assert found is not None
    assert (found.step, found.source) == (7, "replicas")
    assert {(t.layer, t.source, t.target, t.replica) for t in found.transfers} == {
        ("b", 1, 0, True),
        ("d", 0, 1, True),
    }
    nearer = {**survivors, 1: standing(LINE, 2, 7, replicas={7: ("b", "d")})}
    found = restore(fewer, survivors=nearer)
    assert found is not None
    assert ("d", 1, 1) in {(t.layer, t.source, t.target) for t in found.transfers}


def test_before_the_first_step_every_layer_is_as_initialised() -> None:
    found = restore(LINE, survivors={r: standing(LINE, r, 0) for r in (0, 1, 2)})
    assert found is not None
    assert (found.step, found.transfers) == (0, ())


def test_a_broken_link_alone_moves_nothing() -> None:
    found = restore(LINE, survivors={r: standing(LINE, r, 3) for r in range(4)})
    assert found is not None
    assert (found.step, found.transfers, found.source) == (3, (), "survivors")


@given(
    alive=st.sets(st.integers(0, 3), min_size=1),
    behind=st.sets(st.integers(0, 3)),
    version=st.integers(1, 50),
)
def test_every_rank_ends_with_its_layers_or_the_disk_is_asked(
    alive: set[int], behind: set[int], version: int
) -> None:
    survivors = {}
    for rank in alive:
        late = rank in behind
        layers = tuple(LAYERS[stage] for stage in MIRROR.held_stages(rank))
        survivors[rank] = Standing(version=version - late, ready=late, layers=layers)
    found = restore(MIRROR, survivors=survivors)
    left = {layer for s in survivors.values() for layer in s.layers}
    assert (found is None) == (
        left != set(LAYERS) and max(s.version for s in survivors.values()) > 0
    )
    if found is None:
        return
    assert found.step == max(s.version for s in survivors.values())
    for rank in range(4):
        has = set(survivors[rank].layers) if rank in survivors else set()
        gets = {t.layer for t in found.transfers if t.target == rank}
        assert not has & gets
        assert all(t.layer in survivors[t.source].layers for t in found.transfers)
        if found.step:
            assert has | gets == {LAYERS[stage] for stage in MIRROR.held_stages(rank)}
