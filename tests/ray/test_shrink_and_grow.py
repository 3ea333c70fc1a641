"""A host is lost and comes back: three workers, two, three again, and no loss changes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from deepopt.job_file import load_job
from support import launcher
from support.ray_jobs import FurtherHost, foreign_ray
from support.worker_processes import losses_of, make_plan

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Mapping[str, str]]:
    with foreign_ray(slots=2) as environment:
        yield environment


def test_a_job_shrinks_without_a_host_and_grows_when_it_comes_back(
    cluster: Mapping[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)
    host = FurtherHost(cluster, slots=1)
    path = launcher.write_job(
        tmp_path,
        training={"steps": 10_000},
        checkpoint={"every": 0},
        cluster={"address": cluster["ADDRESS"]},
        worker={"device": "cpu"},
        pipeline={"placement": "line", "schedule": "1f1b"},
        faults={"place_timeout_s": 3.0, "grow_after_s": 1.0, "replica_share": 1.0},
    )
    run_dir = tmp_path / "run"
    launched = launcher.run("launch", path, "--workers", 3, "--run-dir", run_dir, "--detach")
    assert launched.returncode == 0, launched.stdout + launched.stderr
    try:
        full = launcher.wait_for_file(
            run_dir, lambda s: s["state"] == "failed" or s["step"] >= 5
        )
        assert full["state"] == "running", full["error"]
        assert (len(full["workers"]), full["workers_wanted"]) == (3, 3)
        (lost,) = [w for w in full["workers"] if host.has(w["pid"])]
        host.cut_power()
        fewer = launcher.wait_for_file(
            run_dir,
            lambda s: (
                s["state"] == "failed"
                or (len(s["workers"]) == 2 and s["step"] >= full["step"] + 10)
            ),
        )
        assert fewer["state"] == "running", fewer["error"]
        assert fewer["workers_wanted"] == 3
        (fault,) = fewer["faults"]
        assert fault["next"].endswith(
            f"shrank to 2 worker(s): no device for rank {lost['rank']}"
        )
        assert (fault["outcome"], fault["lost_steps"]) == ("recovered", 0)
        kept = {w["pid"] for w in full["workers"]} - {lost["pid"]}
        assert {w["pid"] for w in fewer["workers"]} == kept
        assert json.loads((run_dir / "plan.json").read_text())["pipeline_size"] == 2

        host = FurtherHost(cluster, slots=1)
        grown = launcher.wait_for_file(
            run_dir,
            lambda s: s["state"] in ("failed", "running") and len(s["workers"]) != 2,
        )
        assert grown["state"] == "running", grown["error"]
        again = launcher.wait_for_file(
            run_dir, lambda s: s["state"] == "failed" or s["step"] >= grown["step"] + 10
        )
        assert again["state"] == "running", again["error"]
        assert kept < {w["pid"] for w in again["workers"]}
        assert len(again["faults"]) == 1
    finally:
        launcher.run("stop", run_dir, "--kill")
        host.cut_power()
    told = launcher.losses(run_dir)
    job = load_job(run_dir / "job.yaml")
    alone = losses_of(job, make_plan(job), run_dir=tmp_path / "alone", last_step=max(told))
    assert [told[step] for step in sorted(told)] == alone
