"""Expert loads on their way from a worker to pictures, and the forecast."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deepopt.head.expert_report import expert_report
from deepopt.head.load_forecast import LoadForecast, forecast_error
from deepopt.telemetry.load_map import draw_load_map, windows_by_layer
from deepopt.worker.load_window import LoadWindow
from deepopt_cli.app import app
from deepopt_cli.words import report_lines


def test_early_steps_are_windows_of_their_own_and_later_ones_add_up() -> None:
    window = LoadWindow(3)
    found = [window.add(step, (("a", (1, step)),)) for step in range(1, 10)]
    spans = [(w.first_step, w.step, w.loads[0][1]) for w in found if w is not None]
    assert spans == [
        (1, 1, (1, 1)),
        (2, 2, (1, 2)),
        (3, 3, (1, 3)),
        (4, 6, (3, 15)),
        (7, 9, (3, 24)),
    ]
    assert window.add(10, ()) is None


def test_a_steady_load_is_forecast_exactly_and_errors_come_when_horizons_pass() -> None:
    forecast = LoadForecast()
    for step in range(1, 111):
        forecast.add("a", [30, 10], first_step=step, step=step)
    assert forecast.shares("a") == pytest.approx((0.75, 0.25))
    assert set(forecast.errors()) == {10, 100}
    assert max(forecast.errors().values()) < 1e-9


def test_a_load_that_changes_makes_an_error() -> None:
    forecast = LoadForecast()
    for step in range(1, 31):
        forecast.add("a", [30, 10] if step <= 10 else [10, 30], first_step=step, step=step)
    assert forecast.errors()[10] == pytest.approx((0 + 1.0 + 0.4) / 3, abs=0.3)
    assert forecast_error((0.75, 0.25), (10, 30)) == pytest.approx(1.0)


def test_replayed_steps_and_steps_without_tokens_are_passed_over() -> None:
    forecast = LoadForecast()
    forecast.add("a", [1, 3], first_step=1, step=1)
    forecast.add("a", [9, 0], first_step=1, step=1)
    forecast.add("a", [0, 0], first_step=2, step=2)
    assert forecast.shares("a") == (0.25, 0.75)
    assert forecast.shares("b") == ()


def test_the_map_tells_even_from_uneven_without_colour() -> None:
    rows = draw_load_map([[4, 4, 4, 4], [8, 8, 0, 0], [4, 4, 4, 4]])
    assert [row.split("|")[1] for row in rows] == ["=@=", "=@=", "= =", "= ="]
    many = draw_load_map([[1] * 100] * 500)
    assert len(many) == 16
    assert max(map(len, many)) <= 72
    assert draw_load_map([]) == []


def test_a_replayed_window_counts_once() -> None:
    records = [{"step": 1, "loads": {"a": [1]}}, {"step": 1, "loads": {"a": [2]}}]
    assert windows_by_layer(records) == {"a": [(1, [2])]}


def run_directory(root: Path, *, with_experts: bool = True) -> Path:
    root.mkdir()
    (root / "job.yaml").write_text("{}\n")
    with (root / "metrics.jsonl").open("w") as file:
        for step in range(1, 13):
            line = {"step": step, "loss": 1.0}
            if with_experts:
                line |= {"max_vio": 1 / step, "max_vio_unbiased": 2.0, "straggler_factor": 1.0}
                line |= {"gate_mass_lost": 0.01, "dead_experts": 0.0, "shrunk_experts": 0.0}
            file.write(json.dumps(line) + "\n")
    if with_experts:
        with (root / "expert_loads.jsonl").open("w") as file:
            for step in range(1, 13):
                loads = {"blocks.1": [10, 10 - step // 4], "blocks.<2>": [3, 3]}
                file.write(
                    json.dumps({"first_step": step, "step": step, "loads": loads}) + "\n"
                )
    return root


def test_a_page_with_pictures_needs_nothing_else(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    done = CliRunner().invoke(
        app, ["moe", "report", str(run), "-o", str(tmp_path / "page.html")]
    )
    assert done.exit_code == 0, done.output
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 4  # two curves, two layers
    assert "blocks.&lt;2&gt;" in page
    assert "10 steps" in page
    for outside in ("http", "src=", "<script", "@import"):
        assert outside not in page.replace("http://www.w3.org", "")


def test_figures_are_to_be_had_as_json(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    done = CliRunner().invoke(app, ["moe", "report", str(run), "--json"])
    found = json.loads(done.stdout)
    assert found["first"]["max_vio"] == 1.0
    assert found["last"]["max_vio"] < 0.25
    assert found["num_routers"] == 2


def test_a_run_without_experts_is_one_error(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run", with_experts=False)
    done = CliRunner().invoke(app, ["moe", "report", str(run)])
    assert done.exit_code == 1
    assert "no expert loads" in done.output
    assert expert_report([], [], forecast={}, errors={}) is None


def test_the_closing_report_shows_the_map_and_the_fall(tmp_path: Path) -> None:
    run = run_directory(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    loads = [json.loads(line) for line in (run / "expert_loads.jsonl").read_text().splitlines()]
    experts = expert_report(lines, loads, forecast={}, errors={10: 0.013})
    text = "\n".join(report_lines({"experts": experts}))
    assert (
        "MaxVio 1.00 in step 1, at most 1.00 (step 1), 0.16 at the end, mean of 2 layers (about 2.00 without"
        in text
    )
    assert "load forecast off by 1.3 % over 10 steps" in text
    assert "  0 |=======" in text
