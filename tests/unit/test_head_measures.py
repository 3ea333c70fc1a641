import math

import pytest

from deepopt.head import measures
from deepopt.head.measures import Pace, figures_of, metrics_line
from deepopt.worker.messages import Sender, StepReport, WorkerTimes


def report(*compute_s: float, step_time_s: float = 2.0, **scalars: float) -> StepReport:
    times = {"step_s": step_time_s, "wait_s": 0.0, "send_s": 0.0, "reduce_s": 0.0}
    return StepReport(
        sender=Sender(job_id="j", generation=3, plan_id=1, rank=0, incarnation="a"),
        step=5,
        loss=math.pi,
        grad_norm=1.5,
        learning_rate=1e-3,
        tokens=4000,
        step_time_s=step_time_s,
        workers=tuple(
            WorkerTimes(rank=rank, compute_s=seconds, update_s=0.1, **times)
            for rank, seconds in enumerate(compute_s)
        ),
        scalars=scalars,
    )


def test_figures_of_a_step() -> None:
    figures = figures_of(
        report(2.0, 1.0), forward_flops_per_token=10.0, peak_flops={0: 1e5, 1: 5e4}
    )
    assert figures.tokens_per_s == 2000.0
    assert figures.tokens_per_s_per_worker == 1000.0
    assert figures.mfu == pytest.approx(3 * 10 * 2000 / 1.5e5)
    assert figures.bubble == 0.25
    assert figures.stage_busy == (1.0, 0.5)


@pytest.mark.parametrize(
    ("flops", "peaks"), [(0.0, {0: 1e5, 1: 1e5}), (10.0, {0: 1e5}), (10.0, {0: 1e5, 1: 0.0})]
)
def test_without_a_known_peak_there_is_no_mfu(flops: float, peaks: dict[int, float]) -> None:
    figures = figures_of(report(1.0, 1.0), forward_flops_per_token=flops, peak_flops=peaks)
    assert figures.mfu is None


def test_a_line_of_metrics_keeps_the_loss_in_full_and_adds_scalars() -> None:
    step = report(1.0, 1.5, imbalance=1.25, loss_of_router=0.5)
    figures = figures_of(step, forward_flops_per_token=0.0, peak_flops={})
    line = metrics_line(step, figures, time="now")
    assert line["loss"] == math.pi
    assert (line["generation"], line["compute_s"]) == (3, [1.0, 1.5])
    assert (line["imbalance"], line["loss_of_router"]) == (1.25, 0.5)


def test_the_time_left_follows_the_last_steps() -> None:
    pace = Pace()
    assert pace.time_left_s(10) is None
    for seconds in [9.0] * 20 + [2.0] * 20:
        step = report(1.0, step_time_s=seconds)
        pace.add(step, figures_of(step, forward_flops_per_token=0.0, peak_flops={}))
    assert pace.time_left_s(10) == 20.0
    assert pace.time_left_s(-1) == 0.0


def test_of_a_long_launch_the_last_steps_are_kept_and_all_are_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measures, "STEPS_KEPT", 3)
    pace = Pace()
    for seconds, share in [(9.0, 1.0), (8.0, 0.5), (7.0, 0.0), (6.0, 0.0), (5.0, 0.0)]:
        step = report(1.0, step_time_s=seconds, warm_up_share=share)
        pace.add(step, figures_of(step, forward_flops_per_token=0.0, peak_flops={}))
    assert pace.step_s == [7.0, 6.0, 5.0]
    kept = (pace.warm_up, pace.figures, pace.update_s, pace.reduce_s)
    assert [len(values) for values in kept] == [3, 3, 3, 3]
    assert (pace.num_steps, pace.num_warm_up_steps) == (5, 2)
