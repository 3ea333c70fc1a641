"""Layers are tried on the device at hand; what cannot be tried is left to estimates."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from deepopt.config import JobConfig
from deepopt.convert import build_layers, describe
from deepopt.datasets.batch_source import build_batch_source
from deepopt.moe import in_step
from deepopt.pipeline.stage_experts import StageExperts, count_routers, layers_with_routers
from deepopt.planner.alpha_beta import AlphaBeta
from deepopt.planner.emulated_costs import emulated_costs
from deepopt.planner.layer_costs import LayerCosts
from deepopt.planner.skeleton import ModelSkeleton
from deepopt.worker import calibrate as calibration
from deepopt.worker.calibrate import calibrate, with_host_work, with_messages
from deepopt.worker.layer_trial import PausedClock, try_layer
from deepopt.worker.message_trial import MessageTrial
from support.worker_processes import TINY_MODEL, tiny_job

CPU = torch.device("cpu")


def tried(job: JobConfig, skeleton: ModelSkeleton | None = None) -> LayerCosts | None:
    batches = build_batch_source(job, run_dir=None)
    return calibrate(job, skeleton or describe(job), batches=batches, device=CPU)


def test_a_message_costs_its_thread_where_cores_are_not_shared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fits = [AlphaBeta(alpha_s=a, beta_s=1e-9, error=0.0) for a in (9e-5, 4e-5, 1e-5)]
    trial = MessageTrial(
        wall=fits[0], process=fits[1], thread=fits[2], woken_s=5e-4, woken_thread_s=3e-5
    )
    monkeypatch.setattr(calibration, "try_messages", lambda same_host: trial)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    costs = LayerCosts(forward_s=(1.0,), input_s=(1.0,), weight_s=(1.0,), source="measured")

    def found(device: str, cores: int | None) -> tuple[float, float | None, float]:
        job = tiny_job(worker={"device": device})
        priced = with_messages(costs, job=job, num_workers=2, cores=cores)
        return priced.message_s, priced.message_bytes_per_s, priced.latency_s

    assert found("cpu", 1) == pytest.approx((4e-5, 1e9, 1e-5))
    # Ends with cores of their own sleep until a message wakes them.
    assert found("cpu", None) == pytest.approx((3e-5, 1e9, 4.4e-4))
    # What an emulated layer hands on has a stated size, and passes through no CPU.
    assert found("emulated", None)[1] is None


def test_work_is_timed_after_a_pause_and_the_pause_is_no_part_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    monkeypatch.setattr(time, "sleep", lambda seconds: order.append("pause"))
    monkeypatch.setattr(time, "thread_time", lambda: float(len(order)))
    took, result = PausedClock().measure("F", lambda: order.append("work"))
    assert order == ["pause", "work"]
    assert (took, result) == (1.0, None)


def test_emulated_layers_keep_cores_busy_where_workers_share_them() -> None:
    job = tiny_job(worker={"device": "emulated"})
    skeleton, batches = describe(job), build_batch_source(job, run_dir=None)
    stated = emulated_costs(job, num_layers=len(skeleton.layers))

    def found(num_workers: int) -> LayerCosts:
        return with_host_work(
            stated,
            job=job,
            skeleton=skeleton,
            batches=batches,
            num_workers=num_workers,
            cores=2,
        )

    assert found(2) == stated
    shared = found(3)
    assert shared.host_cores == 2
    assert shared.forward_s == stated.forward_s
    assert all(s > 0 for s in (*shared.host_forward_s, *shared.host_input_s))


def test_the_update_of_a_layer_includes_that_of_its_routers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    balance, update_s = StageExperts.update, 0.05

    def slowly(experts: StageExperts) -> None:
        balance(experts)
        ends = time.thread_time() + update_s
        while time.thread_time() < ends:
            pass

    monkeypatch.setattr(StageExperts, "update", slowly)
    job = tiny_job(model={"kwargs": {**TINY_MODEL, "num_blocks": 2}})
    found = tried(job)
    assert found is not None
    routers = [count_routers(layer.buffers) for layer in describe(job).layers]
    assert sorted(routers) == [0, 0, 0, 1]
    assert layers_with_routers(describe(job)) == (routers.index(1),)
    assert [s >= update_s for s in found.update_s] == list(map(bool, routers))


@pytest.mark.parametrize("warmup", [True, False])
def test_what_routers_take_on_top_while_they_warm_up_is_tried_apart(
    warmup: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counting:
        """A clock that goes by the chunks of a choice: there are none once a bias fits."""

        def measure(self, what: str, work: Callable[[], Any]) -> tuple[float, Any]:
            before = len(chunks)
            result = work()
            return float(len(chunks) - before), result

    def counted(*args: Any, **kwargs: Any) -> Any:
        chunks.append(1)
        return select(*args, **kwargs)

    chunks: list[int] = []
    select = in_step.elb_select
    monkeypatch.setattr(in_step, "elb_select", counted)
    job = tiny_job(model={"kwargs": {**TINY_MODEL, "num_blocks": 2}}, elb={"warmup": warmup})
    batches = build_batch_source(job, run_dir=None)
    found = calibrate(job, describe(job), batches=batches, device=CPU, clock=Counting())
    assert found is not None
    assert not any(found.forward_s)
    routers = [count_routers(layer.buffers) for layer in describe(job).layers]
    assert found.warm_up_s == tuple(5.0 * number * warmup for number in routers)


def test_other_microbatches_pass_between_the_operations_of_one_as_in_a_pipeline() -> None:
    class Listening:
        def measure(self, what: str, work: Callable[[], Any]) -> tuple[float, Any]:
            order.append(what)
            return 0.0, work()

    order: list[str] = []
    job = tiny_job(elb={"warmup": False})
    layers, _ = build_layers(job, [0], device=CPU)
    inputs, _ = build_batch_source(job, run_dir=None).batch(1, 0)
    trial = try_layer(layers[0], (inputs,), job=job, device=CPU, clock=Listening(), repeats=1)
    rows = " ".join(order).split(" update")
    assert rows == ["F", " F I", " F I W", " I W W"]
    assert [len(times) for times in (trial.forward_s, trial.input_s, trial.weight_s)] == [
        1,
        1,
        1,
    ]


def test_every_layer_gets_times_and_sizes_and_threads_are_as_before() -> None:
    threads = torch.get_num_threads()
    job = tiny_job()
    found = tried(job)
    assert found is not None
    assert torch.get_num_threads() == threads
    assert found.source == "measured"
    assert found.num_layers == len(describe(job).layers)
    assert all(time > 0 for time in (*found.forward_s, *found.input_s, *found.update_s))
    batch, length = job.training.microbatch_size, job.data.sequence_length
    assert found.output_bytes == (4.0 * batch * length * 32,) * (found.num_layers - 1) + (0.0,)
    assert all(size > 0 for size in found.activation_bytes[1:])
    assert found.prepare_s == ()


@pytest.mark.parametrize(
    "section",
    [
        {"precision": {"dtype": "bfloat16"}},
        {"optimizer": {"factory": "torch.optim:SGD"}},
        {"optimizer": {"factory": "torch.optim:Adam", "kwargs": {"foreach": True}}},
    ],
    ids=["bfloat16", "sgd", "adam"],
)
def test_layers_are_tried_whatever_their_optimizer_writes_to(section: dict[str, Any]) -> None:
    found = tried(tiny_job(**section))
    assert found is not None
    assert all(time > 0 for time in (*found.forward_s, *found.input_s, *found.update_s))


def test_layers_of_one_kind_are_tried_once() -> None:
    found = tried(tiny_job())
    assert found is not None
    assert len(set(found.forward_s)) < found.num_layers
    assert found.forward_s[2:-1] == (found.forward_s[2],) * (found.num_layers - 3)


def test_recomputation_costs_a_forward() -> None:
    found = tried(tiny_job(pipeline={"recompute": "full"}))
    assert found is not None
    assert found.prepare_s == found.forward_s
    assert len(found.input_bytes) == found.num_layers


def test_a_model_too_large_to_try_is_left_to_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "MOST_PARAMETERS", 10)
    assert tried(tiny_job()) is None


def test_a_model_that_fails_is_left_to_the_worker_that_reports_it() -> None:
    job = tiny_job()

    class Broken:
        def batch(self, step: int, microbatch: int) -> Any:
            return torch.zeros(1, 2, 3), torch.zeros(1)

    broken: Any = Broken()
    assert calibrate(job, describe(job), batches=broken, device=CPU) is None
