"""The job's models: defaults, strict values, rules that tie fields together, pickling."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

from deepopt.config import LATER_AXES, JobConfig


def reason(values: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        JobConfig.model_validate(values)
    (detail,) = caught.value.errors()
    return str(detail["msg"])


def test_the_defaults_are_a_whole_job() -> None:
    job = JobConfig()
    assert job.model.factory == "deepopt.models.moe_transformer:build"
    assert job.training.groups is None
    assert job.parallel.data == 1
    assert job.worker.threads == 1


def test_a_job_cannot_be_changed() -> None:
    job = JobConfig()
    with pytest.raises(ValidationError, match="frozen"):
        job.training.steps = 3


def test_jobs_do_not_share_their_keyword_arguments() -> None:
    JobConfig().model.kwargs["dim"] = 1
    assert JobConfig().model.kwargs == {}


def test_a_job_survives_pickling() -> None:
    job = JobConfig.model_validate(
        {
            "model": {"kwargs": {"sizes": [1, 2], "nested": {"a": None}}},
            "faults": {"inject": [{"raise": {"rank": 1, "step": 2, "op": "1B0"}}]},
        }
    )
    assert pickle.loads(pickle.dumps(job)) == job


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training", "steps", True),
        ("training", "steps", "3"),
        ("training", "steps", 3.0),
        ("training", "steps", 0),
        ("training", "seed", -1),
        ("training", "seed", 2**63),
        ("training", "grad_clip", 0.0),
        ("optimizer", "learning_rate", "3e-4"),
        ("optimizer", "learning_rate", float("nan")),
        ("optimizer", "learning_rate", float("inf")),
        ("optimizer", "betas", [0.9, 1.0]),
        ("optimizer", "betas", [-0.1, 0.9]),
        ("optimizer", "betas", [0.9]),
        ("optimizer", "min_ratio", 1.5),
        ("pipeline", "placement", "sideways"),
        ("precision", "dtype", "float16"),
        ("checkpoint", "keep", 1),
        ("checkpoint", "every", -1),
        ("logging", "tensorboard", 1),
        ("logging", "trace_steps", [0]),
        ("cluster", "start_timeout_s", 0.0),
        ("data", "files", "one.txt"),
        ("data", "files", [""]),
        ("model", "kwargs", {"a": object()}),
        ("model", "factory", "package.module"),
        ("model", "factory", "package.module:"),
        ("model", "factory", "package/module.py:build"),
        ("model", "factory", ".module:build"),
        ("model", "loss", "loss"),
        ("data", "dataset", "a b:c"),
    ],
)
def test_a_value_of_the_wrong_kind_is_refused(section: str, key: str, value: object) -> None:
    reason({section: {key: value}})


@pytest.mark.parametrize("name", ["", "a b", "-a", "a/b", "a" * 65, "a\n"])
def test_a_name_that_cannot_be_part_of_a_path_is_refused(name: str) -> None:
    reason({"name": name})


def test_whole_numbers_stand_for_numbers() -> None:
    job = JobConfig.model_validate({"optimizer": {"learning_rate": 1, "eps": 1}})
    assert job.optimizer.learning_rate == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"training": {"groups": 9, "microbatches": 8}},
            "9 gradient groups for 8 micro-batches",
        ),
        (
            {"optimizer": {"decay_steps": 10}},
            "decay ends at step 10, not after the warm-up of 10",
        ),
        ({"pipeline": {"boundaries": [1, 2]}}, r"boundaries \[1, 2\] do not start with 0"),
        ({"pipeline": {"boundaries": [0, 2, 2]}}, r"boundaries \[0, 2, 2\] do not start"),
        ({"pipeline": {"boundaries": []}}, r"boundaries \[\] do not start with 0"),
        ({"faults": {"heartbeat_s": 15.0}}, "heartbeat timeout 5.0 s is not above"),
        ({"data": {"dataset": "a:b", "files": ["c"]}}, r"data.dataset \(a:b\) and data.files"),
        ({"data": {"kwargs": {"c": 1}}}, r"data.kwargs \(c\) is set without data.dataset"),
        ({"cluster": {"address": "a", "hostfile": "b"}}, r"\(a\) and cluster.hostfile \(b\)"),
        (
            {"faults": {"inject": [{}]}},
            "exactly one of kill, stop, hold, hang, raise, term, cut, flip, delay, full_disk",
        ),
        (
            {
                "faults": {
                    "inject": [{"kill": {"rank": 0, "step": 1}, "stop": {"rank": 0, "step": 1}}]
                }
            },
            "exactly one of kill, stop, hold, hang, raise, term, cut, flip, delay, full_disk",
        ),
    ],
)
def test_values_that_do_not_fit_together_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        JobConfig.model_validate(values)


@pytest.mark.parametrize("axis", LATER_AXES)
def test_an_axis_that_is_not_built_is_refused_by_name(axis: str) -> None:
    assert reason({"parallel": {axis: 2}}) == f"not built yet: {axis}=2"
    assert JobConfig.model_validate({"parallel": {axis: 1}}) == JobConfig()


def test_several_axes_that_are_not_built_are_one_error() -> None:
    wanted = reason({"parallel": {"data": 2, "tensor": 4, "expert": 2}})
    assert wanted == "not built yet: expert=2, tensor=4"


@pytest.mark.parametrize("kind", ["kill", "stop", "raise"])
def test_a_scripted_fault_tells_what_and_when(kind: str) -> None:
    values = {"faults": {"inject": [{kind: {"rank": 1, "step": 3}}]}}
    (fault,) = JobConfig.model_validate(values).faults.inject
    assert (fault.kind, fault.point.rank, fault.point.step) == (kind, 1, 3)
    assert fault.point.op is None
    assert fault.point.generation == 1


def test_the_job_needs_neither_torch_nor_ray() -> None:
    heavy = "{'torch', 'ray', 'triton', 'numpy'} & set(sys.modules)"
    command = f"import sys, deepopt.job_file, deepopt.import_path; sys.exit(bool({heavy}))"
    assert subprocess.run([sys.executable, "-c", command], check=False).returncode == 0
