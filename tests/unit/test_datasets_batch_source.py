"""Batches by (seed, step, micro-batch): from text and from users' datasets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.datasets.batch_source import BatchSource, build_batch_source
from deepopt.errors import InputError


def make_job(**data: Any) -> JobConfig:
    training = {"microbatches": 3, "microbatch_size": 2, **data.pop("training", {})}
    return JobConfig.model_validate(
        {"data": {"sequence_length": 4, **data}, "training": training}
    )


def source_of(dataset: str, **kwargs: Any) -> BatchSource:
    job = make_job(dataset=f"support.datasets:{dataset}", kwargs=kwargs)
    return build_batch_source(job, run_dir=None)


@pytest.fixture
def text_file(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(83)))  # 20 sequences of 4, and 3 bytes left over
    return str(path)


def starts(source: BatchSource, *, steps: range) -> list[int]:
    """The first token of every sample, in order."""
    return [
        int(sample[0])
        for step in steps
        for microbatch in range(3)
        for sample in source.batch(step, microbatch)[0]
    ]


def test_targets_are_the_next_bytes(text_file: str) -> None:
    source = build_batch_source(make_job(files=[text_file]), run_dir=None)
    inputs, targets = source.batch(2, 1)
    assert inputs.shape == targets.shape == (2, 4)
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.is_contiguous()
    assert targets.is_contiguous()
    assert torch.equal(targets, inputs + 1)
    assert (source.vocab_size, source.tokens_per_microbatch) == (256, 8)
    assert source.state_dict() is None
    assert "1 file(s)" in source.description
    assert "20 sequences of 4 bytes" in source.description


def test_an_epoch_shows_every_sequence_once(text_file: str) -> None:
    source = build_batch_source(make_job(files=[text_file]), run_dir=None)
    seen = starts(source, steps=range(1, 11))  # 60 samples: three epochs
    epochs = [seen[:20], seen[20:40], seen[40:]]
    assert [sorted(epoch) for epoch in epochs] == [list(range(0, 80, 4))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_a_batch_depends_on_seed_step_and_microbatch_alone(text_file: str) -> None:
    first = build_batch_source(make_job(files=[text_file]), run_dir=None)
    second = build_batch_source(make_job(files=[text_file]), run_dir=None)
    starts(first, steps=range(1, 6))
    assert torch.equal(first.batch(7, 2)[0], second.batch(7, 2)[0])
    other = make_job(files=[text_file], training={"seed": 1})
    assert starts(build_batch_source(other, run_dir=None), steps=range(1, 3)) != starts(
        first, steps=range(1, 3)
    )


def test_the_fingerprint_follows_text_and_tokenizer(text_file: str) -> None:
    first = build_batch_source(make_job(files=[text_file]), run_dir=None)
    same = build_batch_source(make_job(files=[text_file], sequence_length=5), run_dir=None)
    assert first.fingerprint == same.fingerprint
    Path(text_file).write_bytes(bytes(reversed(range(83))))
    other = build_batch_source(make_job(files=[text_file]), run_dir=None)
    assert other.fingerprint != first.fingerprint


def test_text_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1234")
    with pytest.raises(InputError, match=r"4 token\(s\).*4 \+ 1") as caught:
        build_batch_source(make_job(files=[f"{tmp_path}/a"]), run_dir=None)
    assert "data.sequence_length" in caught.value.remedy
    (tmp_path / "a").write_bytes(b"12345")
    assert build_batch_source(make_job(files=[f"{tmp_path}/a"]), run_dir=None).batch(1, 0)


def test_the_default_text_is_the_standard_library() -> None:
    source = build_batch_source(JobConfig(), run_dir=None)
    inputs, _ = source.batch(1, 0)
    assert inputs.shape == (4, 128)
    assert "standard library" in source.description


def test_a_dataset_by_index_gives_tokens() -> None:
    source = source_of("Tokens", size=20)
    inputs, targets = source.batch(1, 0)
    assert torch.equal(targets, inputs + 1)
    assert inputs.dtype == torch.int64
    assert sorted(starts(source, steps=range(1, 4)))[0] == 0
    assert len(set(starts(source, steps=range(1, 4)))) == 18
    assert source.tokens_per_microbatch == 8
    assert source.vocab_size == 1000
    assert source.fingerprint == source_of("Tokens", size=20).fingerprint
    assert source.fingerprint != source_of("Tokens", size=21).fingerprint


def test_a_dataset_by_index_gives_pairs() -> None:
    source = source_of("Pairs")
    inputs, targets = source.batch(1, 0)
    assert inputs.shape == (2, 3)
    assert torch.equal(targets, inputs[:, 0].long() % 2)
    assert source.tokens_per_microbatch == 2
    assert (source.fingerprint, source.description) == ("points-1", "points with a class")


def test_an_object_may_make_its_own_batches() -> None:
    source = source_of("Batches")
    inputs, targets = source.batch(4, 2)
    assert inputs.tolist() == [4, 2]
    assert torch.equal(targets, -inputs)
    assert source.tokens_per_microbatch == 7
    assert source.state_dict() is None


def test_a_state_of_a_stream_is_refused_by_what_is_none(text_file: str) -> None:
    for source in (
        source_of("Batches"),
        build_batch_source(make_job(files=[text_file]), run_dir=None),
    ):
        with pytest.raises(InputError, match=r"position of a stream \(after step 5\)"):
            source.load_state_dict({"step": 5, "stream": {}})


@pytest.mark.parametrize(
    ("dataset", "kwargs", "words"),
    [
        ("broken", {"a": 1}, r"raised KeyError: 'corpus' \(.*datasets\.py:\d+\)"),
        ("Tokens", {}, "raised TypeError"),
        ("Tokens", {"size": 0}, "without samples"),
        ("Tokens", {"size": 9, "length": 4}, r"sample 0 is torch.int64 of shape \(4,\)"),
        ("number", {}, "returned int"),
        ("plain_generator", {}, "without state_dict"),
        ("Counter", {"state": {"no": "JSON"}, "end": 0}, None),
        ("nothing", {}, "nothing"),
    ],
)
def test_factories_that_do_not_fit_are_refused(
    dataset: str, kwargs: dict[str, Any], words: str | None
) -> None:
    if words is None:
        assert source_of(dataset, **kwargs)
        return
    with pytest.raises(InputError, match=words) as caught:
        source_of(dataset, **kwargs)
    assert f"support.datasets:{dataset}" in caught.value.message
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("dataset", "kwargs", "words"),
    [("Ragged", {}, "differ in shape"), ("Batches", {"good": False}, r"batch\(1, 0\) gave")],
)
def test_batches_that_do_not_fit_are_refused(
    dataset: str, kwargs: dict[str, Any], words: str
) -> None:
    source = source_of(dataset, **kwargs)
    with pytest.raises(InputError, match=words):
        source.batch(1, 0)
