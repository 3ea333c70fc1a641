"""The store: what is committed is whole, what is damaged is found, what is old goes."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepopt.checkpoint.layer_files import MANIFEST_NAME, shard_name
from deepopt.checkpoint.manifest import Manifest, TensorSlice
from deepopt.checkpoint.store import CheckpointStore
from deepopt.errors import CheckpointError
from support.checkpoints import (
    LAYERS,
    assert_same_state,
    bits,
    commit_step,
    make_manifest,
    make_states,
    without_shard,
    write_step,
)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "checkpoints")


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def assert_newest_is(store: CheckpointStore, step: int) -> None:
    """The newest verified checkpoint is of that step and holds its values."""
    found = store.newest_verified()
    assert found is not None
    assert found.manifest.step == step
    for state in make_states(step):
        assert_same_state(store.read_layer(found.path, found.manifest, state.layer), state)


def read_all_layers(store: CheckpointStore, path: Path, manifest: Manifest) -> None:
    for layer in LAYERS:
        store.read_layer(path, manifest, layer)


# --- commit ------------------------------------------------------------------------------


def test_parameters_moments_and_buffers_come_back_bit_for_bit(store: CheckpointStore):
    path = commit_step(store, 50)
    assert path.name == "step-00000050"
    assert names(store) == ["step-00000050"]
    assert_newest_is(store, 50)
    tensors = store.read_layer(path, store.verify(path), "embedding").tensors
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors.values())


def test_single_tensors_are_read_without_naming_their_layer(store: CheckpointStore):
    path = commit_step(store, 50)
    keys = ["parameter/blocks.0.bias", "optimizer/embedding.weight/exp_avg"]
    found = store.read_tensors(path, store.verify(path), keys)
    embedding, block = make_states(50)
    assert list(found) == keys
    assert bits(found[keys[0]]) == bits(block.tensors[keys[0]])
    assert bits(found[keys[1]]) == bits(embedding.tensors[keys[1]])
    with pytest.raises(CheckpointError, match=r"does not hold \['parameter/nobody'\]"):
        store.read_tensors(path, store.verify(path), ["parameter/nobody"])
    with pytest.raises(CheckpointError, match=r"no layer 'blocks.9'"):
        store.read_layer(path, store.verify(path), "blocks.9")


def test_nothing_is_found_before_the_first_commit(store: CheckpointStore):
    assert store.newest_verified() is None
    assert store.checkpoints() == store.retire() == store.sweep(3) == []
    write_step(store, 50)
    assert store.newest_verified() is None


def test_a_commit_that_lacks_a_layer_a_file_or_bytes_is_refused(store: CheckpointStore):
    commit_step(store, 40)
    manifest = write_step(store, 50)
    with pytest.raises(CheckpointError, match="lacks layers"):
        store.commit(without_shard(manifest, LAYERS[1]))
    shard = store.begin(50, 1) / manifest.shards[1].file
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"has {len(content) - 1} bytes"):
        store.commit(manifest)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"cannot find .*ENOENT"):
        store.commit(manifest)
    assert_newest_is(store, 40)
    shard.write_bytes(content)
    store.commit(manifest)
    assert_newest_is(store, 50)


def test_a_repeated_commit_changes_nothing(store: CheckpointStore):
    manifest = write_step(store, 50)
    assert store.commit(manifest) == store.commit(manifest)
    with pytest.raises(CheckpointError, match="cannot find"):
        store.commit(replace(manifest, tokens_seen=1))
    assert_newest_is(store, 50)


def test_a_replayed_step_replaces_the_committed_one(store: CheckpointStore):
    commit_step(store, 50, generation=1)
    commit_step(store, 50, generation=2)
    assert names(store) == ["step-00000050"]
    found = store.newest_verified()
    assert found is not None
    assert found.manifest.generation == 2


def test_a_stale_generation_cannot_replace_what_a_newer_one_committed(store: CheckpointStore):
    stale = write_step(store, 50, generation=1)
    commit_step(store, 50, generation=2)
    with pytest.raises(
        CheckpointError, match="committed by generation 2, generation 1 is stale"
    ):
        store.commit(stale)
    found = store.newest_verified()
    assert found is not None
    assert found.manifest.generation == 2


def test_a_writer_whose_folder_was_swept_is_refused(store: CheckpointStore):
    store.begin(50, 1)
    store.begin(50, 2)
    store.sweep(2)
    with pytest.raises(CheckpointError, match="ENOENT"):
        store.write_layer(50, 1, make_states(50)[0], 0)
    assert names(store) == ["step-00000050.gen2.tmp"]


def test_everything_is_durable_before_it_gets_its_name(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    """A power cut keeps only what was fsynced, so the order of the calls is what matters."""
    unsynced: set[str] = set()
    log: list[str] = []
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def path_of(descriptor: int) -> str:
        return str(Path(f"/proc/self/fd/{descriptor}").readlink())

    def open_(path: str | Path, flags: int, *rest: int) -> int:
        if flags & os.O_CREAT:
            unsynced.update((str(path), str(Path(path).parent)))
        return real_open(path, flags, *rest)

    def fsync(descriptor: int) -> None:
        real_fsync(descriptor)
        unsynced.discard(path_of(descriptor))
        log.append(f"fsync {Path(path_of(descriptor)).name}")

    def rename(source: Path, target: Path) -> None:
        assert not [path for path in unsynced if path.startswith(str(source))]
        real_rename(source, target)
        log.append(f"rename {Path(target).name}")

    for name, call in (("open", open_), ("fsync", fsync), ("rename", rename)):
        monkeypatch.setattr(os, name, call)
    commit_step(store, 50)
    monkeypatch.undo()
    assert log[-4:] == [
        f"fsync {MANIFEST_NAME}",
        "fsync step-00000050.gen1.tmp",
        "rename step-00000050",
        "fsync checkpoints",
    ]


# --- damage ------------------------------------------------------------------------------


def flip_a_shard_bit(folder: Path, position: float) -> None:
    flip_bit(sorted(folder.glob("*.safetensors"))[0], position)


def flip_a_manifest_bit(folder: Path, position: float) -> None:
    flip_bit(folder / MANIFEST_NAME, position)


def flip_bit(path: Path, position: float) -> None:
    content = bytearray(path.read_bytes())
    bit = int(position * (len(content) * 8 - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def truncate_a_shard(folder: Path, position: float) -> None:
    truncate(sorted(folder.glob("*.safetensors"))[-1], position)


def truncate_the_manifest(folder: Path, position: float) -> None:
    truncate(folder / MANIFEST_NAME, position)


def truncate(path: Path, position: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(position * (len(content) - 1))])


def zero_a_block(folder: Path, position: float) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    content = path.read_bytes()
    start = int(position * (len(content) - 64))
    zeroed = content[:start] + bytes(64) + content[start + 64 :]
    path.write_bytes(zeroed if zeroed != content else bytes(len(content)))


def lose_a_shard(folder: Path, position: float) -> None:
    shards = sorted(folder.glob("*.safetensors"))
    shards[int(position * (len(shards) - 1))].unlink()


def lose_the_manifest(folder: Path, _: float) -> None:
    (folder / MANIFEST_NAME).unlink()


def mix_a_shard_of_another_step(folder: Path, _: float) -> None:
    name = shard_name("embedding", writer=0)
    shutil.copy(folder.with_name("step-00000040") / name, folder / name)


def put_the_manifest_of_another_step(folder: Path, _: float) -> None:
    shutil.copy(folder.with_name("step-00000040") / MANIFEST_NAME, folder / MANIFEST_NAME)


def copy_another_step_under_this_name(folder: Path, _: float) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000040"), folder)


DAMAGE = [
    flip_a_shard_bit,
    flip_a_manifest_bit,
    truncate_a_shard,
    truncate_the_manifest,
    zero_a_block,
    lose_a_shard,
    lose_the_manifest,
    mix_a_shard_of_another_step,
    put_the_manifest_of_another_step,
    copy_another_step_under_this_name,
]


@pytest.mark.parametrize("damage", DAMAGE)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(position=st.floats(0, 1))
def test_all_damage_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: Callable[[Path, float], None], position: float
):
    shutil.rmtree(tmp_path)
    store = CheckpointStore(tmp_path)
    commit_step(store, 40)
    newest = commit_step(store, 50)
    damage(newest, position)
    found = store.newest_verified()
    assert found is not None
    assert found.manifest.step == 40
    (rejected,) = found.rejected
    assert rejected.path == newest
    assert str(newest) in rejected.reason
    assert_newest_is(store, 40)


@pytest.mark.parametrize("damage", [flip_a_shard_bit, truncate_a_shard, lose_a_shard])
def test_damage_after_verification_is_found_while_reading(
    store: CheckpointStore, damage: Callable[[Path, float], None]
):
    path = commit_step(store, 50)
    manifest = store.verify(path)
    damage(path, 0.9)
    with pytest.raises(CheckpointError, match=r"layer-.*safetensors"):
        read_all_layers(store, path, manifest)


def test_when_all_are_damaged_each_reason_is_given(store: CheckpointStore):
    for step in (40, 50):
        lose_the_manifest(commit_step(store, step), 0)
    with pytest.raises(CheckpointError, match=r"step-00000050: .*; step-00000040: ") as caught:
        store.newest_verified()
    assert caught.value.remedy


def test_a_checkpoint_of_another_model_is_passed_over_with_that_reason(store: CheckpointStore):
    fingerprint = make_manifest(1).skeleton_fingerprint
    commit_step(store, 40)
    store.commit(replace(write_step(store, 50), skeleton_fingerprint="other"))
    found = store.newest_verified(fingerprint)
    assert found is not None
    assert found.manifest.step == 40
    assert "another model" in found.rejected[0].reason


def test_names_that_are_not_the_stores_are_left_alone(store: CheckpointStore):
    commit_step(store, 50)
    for name in ("step-5", "notes", "step-00000060.bak", "step-00000070.gen1.tmp.trash.x"):
        (store.root / name).mkdir()
    assert_newest_is(store, 50)
    store.sweep(9)
    store.retire()
    assert len(names(store)) == 5


# --- retention and sweeping --------------------------------------------------------------


def test_the_newest_two_verified_are_kept(store: CheckpointStore):
    for step in (10, 20, 30):
        commit_step(store, step)
    assert [path.name for path in store.checkpoints()] == [
        "step-00000030",
        "step-00000020",
        "step-00000010",
    ]
    assert store.retire() == [store.root / "step-00000010"]
    assert names(store) == ["step-00000020", "step-00000030"]
    assert store.retire() == []


def test_a_damaged_one_does_not_count_as_kept(store: CheckpointStore):
    for step in (10, 20):
        commit_step(store, step)
    store.retire()
    flip_a_shard_bit(commit_step(store, 30), 0.5)
    assert store.retire() == []
    assert_newest_is(store, 20)
    commit_step(store, 40)
    commit_step(store, 50)
    store.retire()
    assert names(store) == ["step-00000040", "step-00000050"]


def test_one_that_is_damaged_after_it_was_kept_does_not_count(store: CheckpointStore):
    for step in (10, 20):
        commit_step(store, step)
    store.retire()
    truncate_a_shard(store.root / "step-00000020", 0.5)
    commit_step(store, 30)
    assert store.retire() == []
    assert names(store) == ["step-00000010", "step-00000020", "step-00000030"]


def test_more_can_be_kept_and_fewer_cannot(tmp_path: Path):
    store = CheckpointStore(tmp_path, keep=3)
    for step in (10, 20, 30, 40):
        commit_step(store, step)
    store.retire()
    assert len(names(store)) == 3
    with pytest.raises(CheckpointError, match=r"keep is 1"):
        CheckpointStore(tmp_path, keep=1)


def test_work_folders_that_were_overtaken_go_and_later_ones_stay(store: CheckpointStore):
    store.begin(10, 1)
    commit_step(store, 20)
    store.begin(30, 1)
    assert store.retire() == [store.root / "step-00000010.gen1.tmp"]
    assert names(store) == ["step-00000020", "step-00000030.gen1.tmp"]


def test_a_discarded_checkpoint_gives_its_space_back(store: CheckpointStore):
    write_step(store, 50)
    store.discard(50, 1)
    store.discard(50, 1)
    assert names(store) == []


def test_sweeping_removes_what_older_generations_left(store: CheckpointStore):
    commit_step(store, 40)
    for generation in (1, 2, 3):
        store.begin(50, generation)
    (store.root / "step-00000030.trash").mkdir()
    removed = store.sweep(3)
    assert [path.name for path in removed] == [
        "step-00000030.trash",
        "step-00000050.gen1.tmp",
        "step-00000050.gen2.tmp",
    ]
    assert names(store) == ["step-00000040", "step-00000050.gen3.tmp"]


def test_one_moved_aside_is_found_and_gets_its_name_back(store: CheckpointStore):
    commit_step(store, 50).rename(store.root / "step-00000050.gen2.old")
    assert_newest_is(store, 50)
    assert store.sweep(2) == []
    assert names(store) == ["step-00000050"]
    assert_newest_is(store, 50)


@pytest.mark.parametrize("replacement_is_damaged", [False, True])
def test_of_one_moved_aside_and_its_replacement_the_whole_one_stays(
    store: CheckpointStore, replacement_is_damaged: bool
):
    commit_step(store, 50, generation=1)
    shutil.copytree(store.root / "step-00000050", store.root / "copy")
    replacement = commit_step(store, 50, generation=2)
    (store.root / "copy").rename(store.root / "step-00000050.gen2.old")
    if replacement_is_damaged:
        flip_a_shard_bit(replacement, 0.5)
    store.sweep(3)
    assert names(store) == ["step-00000050"]
    assert_newest_is(store, 50)
    assert store.verify(replacement).generation == (1 if replacement_is_damaged else 2)


# --- a disk that refuses -----------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["write", "fsync", "rename"])
def test_a_disk_that_refuses_a_commit_leaves_the_old_checkpoint(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, call: str, number: int
):
    commit_step(store, 40)
    manifest = write_step(store, 50)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(CheckpointError, match=errno.errorcode[number]):
        store.commit(manifest)
    monkeypatch.undo()
    assert names(store) == ["step-00000040", "step-00000050.gen1.tmp"]
    assert_newest_is(store, 40)
    store.commit(manifest)
    assert_newest_is(store, 50)


def test_a_replacement_that_fails_half_way_is_undone(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    commit_step(store, 50, generation=1)
    manifest = write_step(store, 50, generation=2)
    real_rename = os.rename

    def refuse_the_second(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real_rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_the_second)
    with pytest.raises(CheckpointError, match="EIO"):
        store.commit(manifest)
    monkeypatch.undo()
    assert names(store) == ["step-00000050", "step-00000050.gen2.tmp"]
    assert_newest_is(store, 50)


def test_a_commit_stands_when_the_replaced_one_cannot_be_removed(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
):
    commit_step(store, 50, generation=1)
    manifest = write_step(store, 50, generation=2)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    store.commit(manifest)
    monkeypatch.undo()
    assert_newest_is(store, 50)
    store.sweep(3)
    assert names(store) == ["step-00000050"]


# --- file names --------------------------------------------------------------------------


@settings(deadline=None, derandomize=True)
@given(st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_file_names_are_harmless_and_distinct_for_any_layer(layers: list[str]):
    files = [shard_name(layer, writer=0) for layer in layers]
    assert files[0] != files[1]
    for file in files:
        assert "/" not in file
        assert "\0" not in file
        assert len(file.encode()) <= 255


def test_long_and_odd_layer_names_can_be_written(store: CheckpointStore):
    folder = store.begin(1, 1)
    for layer in ("x" * 500, "x" * 501, "../up", "a/b", "", "ü" * 99, "\ud800", "a\nb"):
        state = replace(make_states(1)[0], layer=layer)
        entry = store.write_layer(1, 1, state, 0)
        assert (folder / entry.file).stat().st_size == entry.size_bytes
    assert len(list(folder.iterdir())) == 8


def test_a_tensor_that_is_not_its_slice_is_named(store: CheckpointStore):
    store.begin(1, 1)
    state = make_states(1)[0]
    key = "parameter/embedding.weight"
    part = TensorSlice(global_shape=(8, 3), offset=(4, 0), extent=(4, 3))
    with pytest.raises(CheckpointError, match=r"shape \(7, 3\), its slice says \(4, 3\)"):
        store.write_layer(1, 1, replace(state, slices={key: part}), 0)
