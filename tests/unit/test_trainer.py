"""DeepTrainer checks its arguments before anything starts, and leaves nothing of a run that cannot."""

from __future__ import annotations

import io
import os
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from deepopt import convert_to_deepopt
from deepopt.cluster.hostfile import parse_hostfile
from deepopt.config import JobConfig, PrecisionConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.evaluation import evaluation_batches
from deepopt.errors import (
    CheckpointError,
    ClusterError,
    DeepoptError,
    InputError,
    PlanError,
    RunDirectoryError,
    TrainingError,
    WorkersLostError,
)
from deepopt.job_file import load_job
from deepopt.launch.follow import Outcome
from deepopt.launch.run_view import Supervisor
from deepopt.moe.configure import configure_routers
from deepopt.run_directory import RunDirectory
from deepopt.trainer import Callback, DeepTrainer, progress
from deepopt.trainer import run as runs
from deepopt.trainer.device_map import parse_device
from deepopt.trainer.job import gpu_names, order_hosts
from deepopt.trainer.progress import (
    ForwardLinesView,
    LinesView,
    NotebookView,
    figures,
    make_forward_view,
)
from deepopt.worker.device import pin_gpu


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))


def make_data(length: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(length, 4, generator=generator), torch.randn(length, 4, generator=generator)
    )


def mean_square(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (output - targets).square().mean()


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        while True:
            yield torch.zeros(4), torch.zeros(4)


class Launched(Exception):
    """The job would have started."""


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Calls fit up to where the supervisor would be started; returns the job that is written."""

    def refuse(run: RunDirectory, **_: Any) -> None:
        raise Launched

    monkeypatch.setattr(runs, "follow", refuse)

    def fit(
        dataset: Any = None, *, fit: dict[str, Any] | None = None, **arguments: Any
    ) -> JobConfig:
        given = {"model": make_model(), "loss_fn": mean_square, "progress": False}
        trainer = DeepTrainer(**{**given, "run_dir": tmp_path / "run", **arguments})
        with pytest.raises(Launched):
            trainer.fit(make_data() if dataset is None else dataset, **(fit or {}))
        return load_job(tmp_path / "run" / "job.yaml")

    return fit


def test_arguments_become_a_job(launched: Any) -> None:
    job = launched(
        batch_size=8,
        microbatches=4,
        device_map={"cpu0": [0], "cpu1": [3, 2, 1]},
        grad_clip=0.5,
        seed=3,
        optimizer={"learning_rate": 0.1},
        elb_config={"alpha": 0.2, "monitor_freq": 50},
        settings={"checkpoint": {"every": 7}},
        fit={"epochs": 3},
    )
    assert (job.training.steps, job.training.microbatches, job.training.seed) == (6, 4, 3)
    assert (job.training.microbatch_size, job.training.grad_clip) == (2, 0.5)
    assert (job.worker.count, job.worker.device) == (2, "cpu")
    assert job.pipeline.boundaries == (0, 1)
    assert (job.optimizer.learning_rate, job.checkpoint.every) == (0.1, 7)
    assert (job.elb.alpha, job.elb.monitor_freq) == (0.2, 50)


def test_gpus_are_pinned_by_the_names_that_this_process_sees() -> None:
    devices = [parse_device("gpu1"), parse_device("gpu0")]
    assert gpu_names(devices, visible=None) == ("1", "0")
    assert gpu_names(devices, visible="GPU-a, GPU-b") == ("GPU-b", "GPU-a")
    assert gpu_names([parse_device("cpu0")], visible="3") == ()


def test_hosts_get_the_ranks_that_the_map_gives_them() -> None:
    hosts = parse_hostfile("a slots=2\nb slots=4 port=22\n", source="hosts")
    devices = [parse_device(name) for name in ("b:gpu3", "b:gpu1", "a:gpu0")]
    assert order_hosts(devices, hosts=hosts) == "b slots=2 port=22\na slots=1\n"
    for names, message in (
        (["c:gpu0"], "host c is unknown"),
        (["a:gpu0", "b:gpu0", "a:gpu1"], "leaves host a and comes back"),
        (["a:gpu0", "a:gpu1", "a:gpu2"], r"3 devices on a, which has 2 slot\(s\)"),
    ):
        with pytest.raises(PlanError, match=message):
            order_hosts([parse_device(name) for name in names], hosts=hosts)


def test_a_worker_sees_the_gpu_of_its_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    job = JobConfig.model_validate({"worker": {"gpus": ["1", "GPU-b"]}})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    pin_gpu(job, rank=1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b"
    with pytest.raises(InputError, match=r"names 2 GPU\(s\), and there is a rank 2"):
        pin_gpu(job, rank=2)


def test_a_validation_set_is_carried_and_measured_whole_in_its_own_order(launched: Any) -> None:
    job = launched(
        make_data(16),
        batch_size=8,
        microbatches=4,
        fit={"epochs": 2, "validation": make_data(21), "validate_every": 3},
    )
    assert job.evaluation.every == 3
    batches = evaluation_batches(job, run_dir=None)
    assert batches.num_microbatches == 8  # 16 of 21 samples: whole batches of 8
    found = torch.cat([batches.batch(1, number)[0] for number in range(8)])
    assert torch.equal(found, make_data(21).tensors[0][:16])


def test_evaluate_is_a_job_that_trains_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def refuse(run: RunDirectory, **_: Any) -> None:
        seen.append(load_job(run.job))
        raise Launched

    monkeypatch.setattr(runs, "follow", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Launched):
        DeepTrainer(make_model(), batch_size=8, progress=False).evaluate(make_data(19))
    (job,) = seen
    assert job.evaluation.alone
    assert evaluation_batches(job, run_dir=None).num_microbatches == 19  # none is left out
    with pytest.raises(InputError, match="is a stream"):
        DeepTrainer(make_model(), batch_size=8).evaluate(Endless())


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"validate_every": 2}, "validate_every=2 without a validation set"),
        ({"validation": make_data(3)}, "3 samples"),
        ({"validation": [make_data(4)[:]]}, "batches have 4 samples, those of training 8"),
    ],
)
def test_a_validation_set_that_does_not_fit_is_refused(
    fit: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = DeepTrainer(
        make_model(), batch_size=8, microbatches=4, run_dir=tmp_path / "run", progress=False
    )
    with pytest.raises(InputError, match=message):
        trainer.fit(make_data(16), **fit)
    assert not (tmp_path / "run").exists()


def test_a_converted_model_keeps_its_placement(launched: Any) -> None:
    job = launched(model=convert_to_deepopt(make_model()), workers=2)
    assert job.pipeline.placement == "mirror"


def test_other_people_s_experts_are_balanced_and_the_model_has_a_place_for_it(
    launched: Any,
) -> None:
    from support import transformers_models as hf

    class Tokens(Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return {"input_ids": torch.arange(12) + index, "labels": torch.arange(12)}

    model = hf.mixtral()
    job = launched(Tokens(), model=model, elb_config={"alpha": 0.3}, loss_fn=None, workers=2)
    assert job.elb.replace_routers
    layers, _ = build_layers(job, range(4), device=torch.device("cpu"))
    trained = {name for layer in layers for name in (*layer.parameters, *layer.buffers)}
    here = {n for n, _ in (*model.named_parameters(), *model.named_buffers())}
    assert not trained <= here
    configure_routers(model, job.elb, devices=job.parallel.expert)
    assert trained <= {n for n, _ in (*model.named_parameters(), *model.named_buffers())}


def test_fit_says_what_elb_config_comes_to(
    launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    launched(elb_config={"alpha": 0.3, "monitor_freq": 100}, progress=True)
    said = capsys.readouterr().err
    assert "elb.alpha = 0.3: gain of 1 + alpha x (mean - load) / mean" in said
    assert "elb.monitor_freq = 100: loads are reported over windows of 100 steps" in said


def test_a_model_converted_to_fp8_is_trained_so_and_fit_says_it(
    launched: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4)))
    converted = convert_to_deepopt(model, fp8="blockwise", fp8_include=["*"], fp8_exclude=["3"])
    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(*(torch.randn(16, 16, generator=generator) for _ in range(2)))
    job = launched(data, model=converted, workers=2, progress=True)
    assert job.precision.fp8_include == ("0", "1", "2")
    assert "fp8: 3 linear maps with 71 % of the parameters, a scale" in capsys.readouterr().err
    weights = [p for layer in describe(job).layers for p in layer.parameters if p.fp8]
    assert [p.name for p in weights] == ["0.weight", "1.weight", "2.weight"]
    now = job.model_copy(update={"precision": PrecisionConfig()})
    with pytest.raises(InputError, match=r"precision\.fp8 was 'blockwise' and is 'none' now"):
        runs.going_on(job, now, path=Path("run"))


def test_max_steps_ends_epochs_early(launched: Any) -> None:
    assert launched(batch_size=8, fit={"epochs": 9, "max_steps": 5}).training.steps == 5


class Odd(Callback):
    pass


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"model": 3}, InputError, "model is a int, not a torch.nn.Module"),
        (
            {"elb_config": {"alpha": 0.0}},
            InputError,
            r"elb_config: alpha is 0\.0: .*greater than 0",
        ),
        (
            {"elb_config": {"alpha": 0.3, "monitor_freq": 0}},
            InputError,
            "elb_config: monitor_freq is 0",
        ),
        ({"elb_config": {"beta": 1}}, InputError, "elb_config has no key 'beta'"),
        ({"elb_config": 3}, InputError, "elb_config is a int"),
        ({"callbacks": [Odd]}, InputError, "neither a Callback nor a function"),
        ({"loss_fn": 3}, InputError, "loss_fn is a int"),
        ({"loss_fn": torch.nn.Linear(1, 1)}, InputError, "has parameters"),
        ({"placement": "round"}, DeepoptError, "placement: expected one of"),
        ({"optimizer": {"momentum": 1}}, DeepoptError, "optimizer.momentum: unknown key"),
        ({"device_map": {"gpu99": [0, 1, 2, 3]}}, PlanError, "gpu99 is unknown: torch sees"),
        ({"device_map": {"cpu0": [0, 1]}}, PlanError, "no device for layer 2 to 3"),
        ({"device_map": {"a:cpu0": [0, 1, 2, 3]}}, PlanError, "there is no hostfile"),
        (
            {"device_map": {"cpu0": [0, 1, 2, 3]}, "workers": 2},
            PlanError,
            "workers=2, and device_map names 1 devices",
        ),
        (
            {"device_map": {"cpu0": [0, 3], "cpu1": [1, 2]}, "placement": "bi_stream"},
            PlanError,
            "as v, and the placement is mirror",
        ),
        ({"workers": 9}, PlanError, "the model has 4"),
    ],
)
def test_a_wrong_argument_is_one_clear_error_and_leaves_nothing(
    arguments: dict[str, Any], kind: type[DeepoptError], message: str, tmp_path: Path
) -> None:
    given = {"model": make_model(), "loss_fn": mean_square, "progress": False}
    with pytest.raises(kind, match=message) as caught:
        DeepTrainer(**{**given, "run_dir": tmp_path / "run", **arguments}).fit(make_data())
    assert caught.value.remedy
    assert not (tmp_path / "run").exists()


def test_a_dataset_that_cannot_be_pickled_is_one_clear_error(tmp_path: Path) -> None:
    data: Any = make_data()
    data.connection = threading.Lock()
    trainer = DeepTrainer(make_model(), run_dir=tmp_path / "run", progress=False)
    with pytest.raises(InputError, match=r"^the dataset\.connection cannot be carried"):
        trainer.fit(data)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"epochs": 0}, "epochs is 0"), ({"max_steps": 1.5}, "max_steps is 1.5")],
)
def test_a_wrong_length_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeepTrainer(make_model(), progress=False).fit(make_data(), **arguments)


def test_a_used_run_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    trainer = DeepTrainer(make_model(), run_dir=tmp_path, batch_size=16, progress=False)
    with pytest.raises(RunDirectoryError, match="is not empty"):
        trainer.fit(make_data())
    assert (tmp_path / "notes.txt").exists()


@pytest.mark.parametrize(
    ("code", "kind"),
    [(1, InputError), (3, ClusterError), (4, WorkersLostError), (5, TrainingError)],
)
def test_a_failed_job_raises_its_error_with_the_worker_s_traceback(
    code: int, kind: type[DeepoptError], tmp_path: Path
) -> None:
    error = {
        "message": "rank 1 failed in step 1: the loss of micro-batch 0 is nan",
        "remedy": "lower the learning rate",
        "culprit": {"traceback": "Traceback: here"},
    }
    status = {"state": "failed", "exit_code": code, "error": error}
    with pytest.raises(kind, match="loss of micro-batch 0 is nan") as caught:
        runs.raise_failure(
            Outcome(status=status, ended=True, interrupts=0),
            run=RunDirectory(tmp_path),
            supervisor=Supervisor(process=None, pid=1, host="here"),
        )
    notes = "\n".join(caught.value.__notes__)
    assert "Traceback: here" in notes
    assert "hint: lower the learning rate" in notes


def test_what_was_trained_is_carried_on_only_as_the_same_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, launched: Any
) -> None:
    launched(batch_size=8, seed=1)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        DeepTrainer(make_model()).load(tmp_path / "run")
    with pytest.raises(CheckpointError, match="there is no folder"):
        DeepTrainer(make_model()).fit(make_data(), resume_from=tmp_path / "other")
    before = load_job(tmp_path / "run" / "job.yaml")
    now = before.model_copy(update={"training": before.training.model_copy(update={"seed": 2})})
    with pytest.raises(InputError, match=r"training\.seed was 1 and is 2 now"):
        runs.going_on(before, now, path=tmp_path / "run")


def test_a_stream_without_a_position_cannot_resume(tmp_path: Path) -> None:
    class Endless(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(make_data())

    with pytest.raises(InputError, match=r"has no state_dict\(\) .* cannot go on"):
        DeepTrainer(make_model()).fit(Endless(), max_steps=3, resume_from=tmp_path)
    with pytest.raises(InputError, match=r"a stream without len\(\)"):
        DeepTrainer(make_model()).fit(Endless())


def test_save_needs_a_fit(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no fit has been made"):
        DeepTrainer(make_model()).save(tmp_path)


def test_stop_needs_a_fit() -> None:
    with pytest.raises(InputError, match="no fit has begun"):
        DeepTrainer(make_model()).stop()


class Handle:
    def __init__(self) -> None:
        self.shown: list[str] = []

    def update(self, text: str) -> None:
        self.shown.append(text)


def test_a_notebook_gets_a_bar_without_widgets() -> None:
    handle = Handle()
    view = NotebookView(last_step=4, display=lambda text, display_id: handle, html_class=str)
    view.status({"state": "running"})
    view.step({"step": 2, "loss": 1.5, "tokens_per_s": 1000.0})
    view.note("<b>")
    assert "running <progress value='2' max='4'></progress> 2/4 loss 1.5000" in handle.shown[-1]
    assert handle.shown[-1].endswith("&lt;b&gt;")


EVALUATING = {"state": "running", "evaluation": {"begun": 3, "total": 40}}


def test_an_evaluation_has_a_bar_of_its_micro_batches_in_a_notebook() -> None:
    handle = Handle()
    view = NotebookView(last_step=4, display=lambda text, display_id: handle, html_class=str)
    view.status(EVALUATING)
    assert "evaluating <progress value='3' max='40'></progress> 3/40" in handle.shown[-1]
    view.status({"state": "running", "evaluation": None})
    assert "running <progress value='0' max='4'></progress> 0/4" in handle.shown[-1]


def test_a_long_evaluation_has_lines_and_a_short_one_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    clock = iter((0.0, 4.0, 6.0, 20.0, 21.0))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    view = ForwardLinesView(last_step=1, stream=stream)
    view.status(EVALUATING)
    view.status(EVALUATING)
    view.status({"evaluation": {"begun": 9, "total": 40}})
    view.status({"evaluation": None})
    view.status(EVALUATING)
    view.step({"step": 1, "loss": 0.5})
    assert stream.getvalue() == "evaluating: micro-batch 9 of 40\n"


def test_forwards_alone_have_a_bar_in_a_terminal_with_a_total_once_it_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(stream, "isatty", lambda: True)
    view = make_forward_view()
    view.status({"state": "starting"})
    view.status(EVALUATING)
    view.close()
    assert "3/40" in stream.getvalue()


def test_elsewhere_there_are_lines_for_the_first_and_the_last_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    import sys

    view = LinesView(last_step=3, stream=sys.stderr)
    for step in (1, 2, 3):
        view.step({"step": step, "loss": 0.5})
    assert capsys.readouterr().err.splitlines() == [
        "step 1/3  loss 0.5000",
        "step 3/3  loss 0.5000",
    ]
    assert figures({"step": 1}) == ""
