"""Job files: what is read, what is refused and in which words, and the way back to text."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepopt.config import JobConfig
from deepopt.errors import JobFileError
from deepopt.job_file import (
    dump_job,
    init_template,
    job_file_reference,
    job_schema,
    load_job,
    make_job,
)
from deepopt.job_keys import keys_of, section_within, walk_keys
from deepopt.job_yaml import dotted, dump_yaml, parse_yaml

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str, *overrides: str) -> JobConfig:
    Path("job.yaml").write_text(text, encoding="utf-8")
    return load_job("job.yaml", overrides)


def failure(text: str, *overrides: str) -> JobFileError:
    with pytest.raises(JobFileError) as caught:
        load(text, *overrides)
    return caught.value


# Reading


@pytest.mark.parametrize(
    "text", ["", "\n# nothing\n", "---\n", "training:\n", "\ufeffname: deepopt"]
)
def test_a_file_that_sets_nothing_is_the_defaults(text: str) -> None:
    assert load(text) == JobConfig() == load_job()


def test_a_file_sets_what_it_names_and_nothing_else() -> None:
    job = load("training:\n  steps: 5\ndata: {files: [a.txt, 'b/**/*.txt']}\n")
    assert job.training.steps == 5
    assert job.training.microbatches == JobConfig().training.microbatches
    assert job.data.files == ("a.txt", "b/**/*.txt")


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("3e-4", 3e-4),
        ("1E+2", 100.0),
        ("-1.5", -1.5),
        (".5", 0.5),
        ("010", 10),
        ("0x1f", 31),
        ("0o17", 15),
        ("on", "on"),
        ("no", "no"),
        ("12:30", "12:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("true", True),
        ("~", None),
        ("", None),
        ('"3"', "3"),
    ],
)
def test_scalars_follow_yaml_1_2(scalar: str, value: object) -> None:
    read = load(f"model:\n  kwargs:\n    x: {scalar}\n").model.kwargs["x"]
    assert read == value
    assert type(read) is type(value)


def test_anchors_and_merges_work() -> None:
    job = load(
        "model:\n  kwargs:\n    a: &a {x: 1, y: 2}\n    b: {<<: *a, y: 3}\n    c: [*a, *a]\n"
    )
    assert job.model.kwargs["b"] == {"x": 1, "y": 3}
    assert job.model.kwargs["c"] == [{"x": 1, "y": 2}] * 2


# What is wrong, and where


@pytest.mark.parametrize(
    ("text", "message", "remedy"),
    [
        (
            "# first\ntraining:\n  seed: 1\n  stepz: 3\n",
            "job.yaml:4: training.stepz: unknown key",
            "did you mean training.steps?",
        ),
        ("pipline: {}\n", "job.yaml:1: pipline: unknown key", "did you mean pipeline?"),
        ("steps: 3\n", "job.yaml:1: steps: unknown key", "did you mean training.steps?"),
        (
            "data:\n  every: 3\n",
            "job.yaml:2: data.every: unknown key",
            "did you mean evaluation.every or checkpoint.every or logging.every?",
        ),
        (
            "learning_rat: 3\n",
            "job.yaml:1: learning_rat: unknown key",
            "did you mean optimizer.learning_rate?",
        ),
        (
            "precision: {xyzzy: 1}\n",
            "job.yaml:1: precision.xyzzy: unknown key",
            "known here: dtype, fp8, fp8_include, fp8_exclude",
        ),
        (
            "training.steps: 3\n",
            "job.yaml:1: training.steps: unknown key",
            "keys nest: write steps indented below training",
        ),
        (
            "training:\n  steps: '3'\n",
            'job.yaml:2: training.steps: expected a whole number, found "3"',
            "remove the quotes",
        ),
        (
            "training:\n  steps: 3.0\n",
            "job.yaml:2: training.steps: expected a whole number, found 3.0",
            "write 3",
        ),
        (
            "training:\n  steps: many\n",
            'job.yaml:2: training.steps: expected a whole number, found "many"',
            "training.steps: Optimizer steps; only says where to stop",
        ),
        (
            "training:\n  steps:\n",
            "job.yaml:2: training.steps: expected a whole number, found null",
            "training.steps: Optimizer steps; only says where to stop",
        ),
        (
            "training:\n  steps: 0\n",
            "job.yaml:2: training.steps: expected at least 1, found 0",
            "training.steps: Optimizer steps; only says where to stop",
        ),
        (
            "optimizer:\n  betas:\n  - 0.9\n  - 1\n",
            "job.yaml:4: optimizer.betas[1]: expected less than 1.0, found 1",
            "optimizer.betas: Decay of the first and second moment, each in [0, 1)",
        ),
        (
            "pipeline:\n  placement: miror\n",
            "job.yaml:2: pipeline.placement: "
            "expected one of 'auto', 'line', 'v' or 'mirror', found \"miror\"",
            "did you mean mirror?",
        ),
        (
            "logging: {tensorboard: yes}\n",
            'job.yaml:1: logging.tensorboard: expected true or false, found "yes"',
            "logging.tensorboard: Write TensorBoard event files",
        ),
        (
            "training: 3\n",
            "job.yaml:1: training: expected keys and values, found 3",
            "training: How much is trained, and in which portions",
        ),
        (
            "data:\n  files: corpus.txt\n",
            'job.yaml:2: data.files: expected a list, found "corpus.txt"',
            "data.files: Text files and globs (`**` too); "
            "empty: the Python standard library's own sources",
        ),
        (
            "model:\n  kwargs:\n    sizes: [1, .inf]\n",
            "job.yaml:3: model.kwargs.sizes[1]: expected a finite number, found Infinity",
            "model.kwargs.sizes: Keyword arguments for the factory",
        ),
        (
            "elb:\n  alpha: nan\n",
            'job.yaml:2: elb.alpha: expected a number, found "nan"',
            "elb.alpha: Gain of 1 + alpha x (mean load - load) / mean load, in (0, 1]: inside the "
            "step in mode `elb`, between steps in mode `formula`",
        ),
        (
            "model:\n  factory: my_model.py\n",
            "job.yaml:2: model.factory: 'my_model.py' is not an import path",
            'write "package.module:name", for example "my_project.model:build"',
        ),
        (
            "faults:\n  inject:\n  - kill: {rank: 1, step: 2}\n  - stop: {step: 2}\n",
            "job.yaml:4: faults.inject[1].stop.rank: missing",
            "faults.inject.stop.rank: The worker that it happens to",
        ),
        (
            "parallel:\n  data: 2\n  tensor: 2\n",
            "job.yaml:3: parallel.tensor: not built yet: tensor=2",
            "leave it at 1; what works: parallel.pipeline and parallel.data",
        ),
        (
            "training:\n  microbatches: 2\n  groups: 4\n",
            "job.yaml:3: training.groups: 4 gradient groups for 2 micro-batches",
            "set training.groups between 1 and 2",
        ),
        (
            "faults:\n  heartbeat_s: 20\n",
            "job.yaml:2: faults.heartbeat_s: heartbeat timeout 5.0 s is not above "
            "the time between heartbeats, 20.0 s",
            "set faults.heartbeat_timeout_s to several times faults.heartbeat_s",
        ),
        (
            "training:\n  steps: 3\n  seed: 1\n  steps: 4\n",
            "job.yaml:4: training.steps: set twice, first in line 2",
            "remove one of them",
        ),
        (
            "model:\n  kwargs: {1: 2}\n",
            "job.yaml:2: model.kwargs: the key 1 is not text",
            'quote it: "1"',
        ),
        (
            "- training\n",
            'job.yaml:1: expected keys and values, found ["training"]',
            "start with a key such as `training:`; `deepopt init` writes a whole file",
        ),
    ],
)
def test_an_error_names_the_line_the_key_the_value_and_the_next_step(
    text: str, message: str, remedy: str
) -> None:
    error = failure(text)
    assert (error.message, error.remedy) == (message, remedy)
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("text", "beginning"),
    [
        (
            "name: x\ntraining: [1\n",
            "job.yaml:3: not valid YAML: while parsing a flow sequence",
        ),
        ("training:\n\tsteps: 3\n", "job.yaml:2: not valid YAML: while scanning"),
        ("name: a: b\n", "job.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("name: x\n---\nname: y\n", "job.yaml:2: not valid YAML: expected a single document"),
        ("name: x\nseed: \x01\n", "job.yaml:2: not valid YAML: special characters"),
        (
            "name: !!python/name:os.system x\n",
            "job.yaml:1: not valid YAML: could not determine",
        ),
        ("name: *unknown\n", "job.yaml:1: not valid YAML: found undefined alias"),
        (f"name: {'9' * 5000}\n", "job.yaml:1: not valid YAML: Exceeds the limit"),
        ("model:\n  kwargs: &a [*a]\n", "job.yaml:2: model.kwargs[0]: an alias that contains"),
        ("[" * 3000, "job.yaml:1: nested too deeply"),
        ("? [1]\n: 2\n", "job.yaml:1: the key a collection is not text"),
    ],
)
def test_what_is_not_yaml_is_one_error_with_a_line(text: str, beginning: str) -> None:
    error = failure(text)
    assert error.message.startswith(beginning)
    assert error.remedy


def test_all_errors_are_listed_by_line() -> None:
    error = failure(
        "training:\n  seed: x\n  stepz: 3\nname: a b\nlogging: {every: 0}\n", "data.f=1"
    )
    lines = error.message.splitlines()
    assert [line.split(": ")[:2] for line in lines] == [
        ["--set data.f=1", "data.f"],
        ["job.yaml:2", "training.seed"],
        ["job.yaml:3", "training.stepz"],
        ["job.yaml:4", "name"],
        ["job.yaml:5", "logging.every"],
    ]
    assert lines[2].endswith("unknown key (did you mean training.steps?)")
    assert error.remedy == "correct these 5 places"


def test_a_long_value_is_cut_in_the_error() -> None:
    assert len(failure(f"training: {{steps: {'x' * 5000}}}\n").message) < 200


def test_a_missing_file_is_named() -> None:
    with pytest.raises(JobFileError, match=r"^nowhere/job\.yaml: no such file$"):
        load_job("nowhere/job.yaml")


def test_a_directory_is_not_a_job_file(tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="is a directory, not a job file"):
        load_job(tmp_path)


def test_a_path_through_a_file_is_named() -> None:
    Path("job.yaml").touch()
    with pytest.raises(JobFileError, match=r"job\.yaml/x: cannot be read: Not a directory"):
        load_job("job.yaml/x")


def test_a_file_that_is_not_utf_8_is_named_with_the_byte() -> None:
    Path("job.yaml").write_bytes("name: caf\u00e9".encode("latin-1"))
    with pytest.raises(JobFileError, match=r"job\.yaml: not UTF-8 text: byte 9 is 0xe9"):
        load_job("job.yaml")


# Overrides


def test_overrides_win_over_the_file_and_the_last_one_wins() -> None:
    job = load("training: {steps: 5, seed: 7}\n", "training.steps=6", "training.steps=8")
    assert (job.training.steps, job.training.seed) == (8, 7)


def test_an_override_reads_its_value_as_yaml() -> None:
    job = load(
        "",
        "data.files=[a.txt, b=c.txt]",
        "model.kwargs={depth: 2, inner: {x: 3e-3}}",
        "model.kwargs.inner.y=on",
        "optimizer.decay_steps=",
        " training.groups = 4 ",
        "name=a-b",
    )
    assert job.data.files == ("a.txt", "b=c.txt")
    assert job.model.kwargs == {"depth": 2, "inner": {"x": 3e-3, "y": "on"}}
    assert job.optimizer.decay_steps is None
    assert job.training.groups == 4


def test_an_override_of_a_section_replaces_it() -> None:
    assert load("training: {steps: 5, seed: 7}\n", "training={steps: 6}").training.seed == 0


def test_an_override_of_an_alias_changes_one_place() -> None:
    job = load("model: {kwargs: {a: &a {x: 1}, b: *a}}\n", "model.kwargs.a.x=2")
    assert job.model.kwargs == {"a": {"x": 2}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("override", "message", "remedy"),
    [
        (
            "training.steps",
            "--set training.steps: no '=' between key and value",
            "write --set KEY=VALUE, for example --set training.steps=100",
        ),
        ("=3", "--set =3: '' is not a key", "write the key as in the job file"),
        ("a..b=3", "--set a..b=3: 'a..b' is not a key", "write the key as in the job file"),
        (
            "training.stepz=3",
            "--set training.stepz=3: training.stepz: unknown key",
            "did you mean training.steps?",
        ),
        (
            "trainin.steps=3",
            "--set trainin.steps=3: trainin: unknown key",
            "did you mean training?",
        ),
        (
            "training.steps=many",
            '--set training.steps=many: training.steps: expected a whole number, found "many"',
            "training.steps: Optimizer steps",
        ),
        (
            "training.seed.x=3",
            "--set training.seed.x=3: training.seed is 7, which has no keys",
            "set training.seed itself",
        ),
        (
            "worker.count.x=3",
            '--set worker.count.x=3: worker.count: expected a whole number, found {"x": 3}',
            "worker.count: Workers",
        ),
        (
            "data.files=[a",
            "--set data.files=[a: not valid YAML: while parsing a flow sequence",
            "check indentation",
        ),
        (
            "training={steps: 1, steps: 2}",
            "--set training={steps: 1, steps: 2}: steps: set",
            "",
        ),
        (
            "training.groups=9",
            "--set training.groups=9: training.groups: 9 gradient groups for 8 micro-batches",
            "set training.groups between 1 and 8",
        ),
    ],
)
def test_an_error_in_an_override_names_the_override(
    override: str, message: str, remedy: str
) -> None:
    error = failure("training:\n  seed: 7\n", override)
    assert error.message.startswith(message)
    assert error.remedy.startswith(remedy)


def test_an_override_repairs_a_bad_value_of_the_file() -> None:
    assert load("training: {steps: x}\n", "training.steps=3").training.steps == 3


def test_a_rule_broken_by_file_and_override_together_names_one_of_them() -> None:
    error = failure("training:\n  groups: 8\n", "training.microbatches=4")
    assert error.message.startswith("job.yaml:2: training.groups: 8 gradient groups for 4")


# Jobs made in Python


def test_a_job_made_in_python_is_checked_with_the_same_words() -> None:
    assert make_job({"training": {"steps": 5}, "data": {"files": ["a"]}}).training.steps == 5
    with pytest.raises(JobFileError) as caught:
        make_job({"training": {"stepz": 5}})
    assert caught.value.message == "training.stepz: unknown key"
    assert caught.value.remedy == "did you mean training.steps?"


# The way back


texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]), st.sampled_from("\x85\u2028\t\n :#'\"-~<=")
    ),
    max_size=12,
)
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.sampled_from(["null", "yes", "1e3", "0x1", "<<", "=", "1:30", "2024-01-01", "-", "."]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
counts = st.integers(1, 2**40)
positive = st.floats(min_value=1e-300, max_value=1e300)
job_values = st.fixed_dictionaries(
    {},
    optional={
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"kwargs": st.dictionaries(texts, plain_values, max_size=3)},
            optional={"loss": st.none() | st.just("a.b:c.d")},
        ),
        "data": st.fixed_dictionaries(
            {"files": st.lists(texts.filter(bool), max_size=3)},
            optional={"tokenizer": texts.filter(bool), "sequence_length": counts},
        ),
        "training": st.fixed_dictionaries(
            {"grad_clip": st.none() | positive, "seed": st.integers(0, 2**63 - 1)},
            optional={"steps": counts, "groups": st.none() | st.integers(1, 8)},
        ),
        "optimizer": st.fixed_dictionaries({"learning_rate": positive, "eps": positive}),
        "logging": st.fixed_dictionaries(
            {"tensorboard": st.booleans(), "trace_steps": st.lists(counts, max_size=4)}
        ),
        "faults": st.fixed_dictionaries(
            {
                "inject": st.lists(
                    st.builds(
                        lambda kind, rank, step: {kind: {"rank": rank, "step": step}},
                        st.sampled_from(["kill", "stop", "raise"]),
                        st.integers(0, 99),
                        counts,
                    ),
                    max_size=2,
                )
            }
        ),
    },
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(job_values)
def test_a_written_job_reads_back_as_the_same_job(values: dict[str, Any]) -> None:
    job = make_job(values)
    Path("job.yaml").write_text(dump_job(job), encoding="utf-8")
    assert load_job("job.yaml") == job
    assert pickle.loads(pickle.dumps(job)) == job


@settings(max_examples=120, deadline=None, derandomize=True, database=None)
@given(plain_values)
def test_plain_values_survive_yaml(value: Any) -> None:
    written = dump_yaml({"key": value})
    read = parse_yaml(written, place=str).value["key"]
    # JSON keeps what equality forgets: 1, 1.0 and true are equal in Python.
    assert json.dumps(read) == json.dumps(value)


def test_a_written_job_names_every_key() -> None:
    written = parse_yaml(dump_job(JobConfig()), place=str)
    for key in walk_keys():
        if key[:2] != ("faults", "inject"):
            assert written.has(key), dotted(key)


# Descriptions


def test_the_template_loads_back_to_the_defaults() -> None:
    assert load(init_template()) == JobConfig()


def test_the_template_explains_every_key_in_short_lines() -> None:
    lines = init_template().splitlines()
    assert max(map(len, lines)) <= 96
    for position, line in enumerate(lines):
        if line and not line.lstrip().startswith("#"):
            assert lines[position - 1].lstrip().startswith("# "), line


def test_every_key_has_a_description_and_every_time_its_unit() -> None:
    for path in walk_keys():
        section: Any = JobConfig
        for part in path[:-1]:
            section = section_within(keys_of(section)[str(part)].annotation)
        description = keys_of(section)[str(path[-1])].description
        assert description, dotted(path)
        if str(path[-1]).endswith("_s"):
            assert "second" in description, dotted(path)


def test_the_schema_is_json_and_describes_every_section() -> None:
    schema = json.loads(json.dumps(job_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["TrainingConfig"]["description"]
    steps = schema["$defs"]["TrainingConfig"]["properties"]["steps"]
    assert (steps["type"], steps["default"], steps["minimum"]) == ("integer", 60, 1)
    assert "raise" in schema["$defs"]["FaultInjection"]["properties"]


def test_the_reference_page_is_the_generated_one() -> None:
    committed = (REPOSITORY / "docs" / "job-file.md").read_text(encoding="utf-8")
    assert committed == job_file_reference(), (
        "run: python -m deepopt.job_reference > docs/job-file.md"
    )


def test_the_reference_page_has_a_row_for_every_key() -> None:
    reference = job_file_reference()
    for path in walk_keys():
        heading = f"`{path[-1]}`"
        assert f"| {heading} |" in reference or f"## {heading}" in reference, dotted(path)
