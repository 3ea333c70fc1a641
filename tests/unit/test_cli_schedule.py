"""`deepopt schedule`: what it shows, compares and refuses, and how it says so."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from typer.testing import CliRunner

from deepopt.job_file import load_job
from deepopt.launch.preparation import prepare
from deepopt.launch.run_files import write_plan
from deepopt.run_directory import RunDirectory
from deepopt.schedule.builders import BUILDERS
from deepopt_cli.app import app

ONE_F_ONE_B = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory of its own, and a terminal of 80 columns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    (tmp_path / "order.csv").write_text(ONE_F_ONE_B)
    (tmp_path / "empty").mkdir()
    (tmp_path / "job.yaml").write_text(
        "worker: {count: 2}\ntraining: {microbatches: 4}\npipeline: {calibrate: false}\n"
    )
    return tmp_path


def deepopt(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["schedule", *map(str, arguments)])


def shown(*arguments: object) -> dict[str, Any]:
    result = deepopt("show", *arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_a_grid_with_its_figures_is_shown() -> None:
    result = deepopt("show", "--schedule", "1f1b", "--ranks", 2, "--microbatches", 3)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "F forward, B backward (I and W)"
    assert "rank 1     F0|B0" in result.stdout
    assert "step        232.0 ms, bubble 25.0 %" in result.stdout
    assert "memory      activations of at most 2 micro-batches on a rank (2 1)" in result.stdout
    assert "transfers   6 tensors between ranks" in result.stdout
    assert all(len(line) <= 80 for line in result.stdout.splitlines()[:6])
    assert "\x1b" not in result.stdout


def test_colours_are_written_when_asked() -> None:
    asked = deepopt("show", "--schedule", "1f1b", "--color").stdout
    assert "\x1b[" in asked
    assert "\x1b" not in deepopt("show", "--schedule", "1f1b", "--no-color").stdout


@pytest.mark.parametrize("name", sorted(BUILDERS))
@pytest.mark.parametrize(("ranks", "microbatches"), [(1, 1), (3, 2), (4, 5)])
def test_every_builder_is_shown_exported_and_read_back(
    name: str, ranks: int, microbatches: int
) -> None:
    made = shown(
        "--schedule", name, "--ranks", ranks, "--microbatches", microbatches, "--csv", "o.csv"
    )
    assert deepopt("verify", "o.csv").exit_code == 0
    again = shown("o.csv")
    assert again["actions"] == made["actions"]
    assert again["makespan_s"] == pytest.approx(made["makespan_s"])


def test_auto_takes_the_fastest_placement_and_says_what_it_beats() -> None:
    auto = shown("--effort", 20_000, "--ranks", 3, "--microbatches", 4)
    for placement in ("line", "v", "mirror"):
        one = shown(
            "--effort", 20_000, "--ranks", 3, "--microbatches", 4, "--placement", placement
        )
        assert auto["makespan_s"] <= one["makespan_s"] + 1e-9


def test_options_change_the_costs() -> None:
    base = ("--schedule", "1f1b", "--ranks", 4, "--microbatches", 8, "--costs", "20/20/20")
    assert shown(*base)["makespan_s"] == pytest.approx(0.660)
    assert shown(*base, "--latency-ms", 10)["makespan_s"] > 0.660
    # Layers are cut for the speeds of the ranks: 4 shares on 1 + 1 + 1/2 + 1 ranks.
    slow = shown(*base, "--rank-factor", "1,1,2,1")
    assert 0.660 < slow["makespan_s"] < 0.660 * 4 / 3.5 * 1.1
    assert shown(*base, "--update-ms", 5)["makespan_s"] == pytest.approx(0.665)


def test_a_memory_cap_is_kept_or_refused() -> None:
    capped = shown("--placement", "line", "--memory-cap", 3, "--effort", 20_000)
    assert max(capped["peak_activations"]) <= 3
    refused = deepopt("show", "--schedule", "1f1b", "--memory-cap", 3)
    assert refused.exit_code == 1
    assert "holds activations of 4 micro-batches on a rank, the cap is 3" in refused.stderr


def test_files_are_written_for_other_programs() -> None:
    result = deepopt(
        *("show", "--schedule", "zb_v", "--svg", "a.svg", "--perfetto", "a.json"),
        *("--csv", "a.csv", "--transfers"),
    )
    assert result.exit_code == 0
    assert result.stderr.splitlines() == ["wrote a.svg", "wrote a.json", "wrote a.csv"]
    ElementTree.parse("a.svg")
    assert json.loads(Path("a.json").read_text())["traceEvents"]
    assert "0SEND_F0" in Path("a.csv").read_text()
    assert deepopt("verify", "a.csv").exit_code == 0


def test_a_file_that_cannot_be_written_is_named() -> None:
    result = deepopt("show", "--schedule", "1f1b", "--svg", "nowhere/a.svg")
    assert result.exit_code == 1
    assert "nowhere/a.svg: No such file or directory" in result.stderr


def test_a_csv_of_any_name_is_read() -> None:
    Path("order.txt").write_text(ONE_F_ONE_B)
    assert shown("--from-csv", "order.txt")["num_ranks"] == 2
    both = deepopt("show", "order.csv", "--from-csv", "order.txt")
    assert both.exit_code == 1
    assert "two sources" in both.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "--costs", "20/20"), "'20/20' is not F/I/W"),
        (("show", "--costs", "a/b/c"), "'a/b/c' is not F/I/W"),
        (("show", "--costs", "20/20/20,1/2"), "'1/2' is not F/I/W"),
        (("show", "--costs", "1/1/1,1/1/1"), "costs of 2 layers were given for 4 ranks"),
        (("show", "--rank-factor", "1,0"), "is not a list of positive numbers"),
        (("show", "--rank-factor", "1,2"), "2 rank factors were given for 4 ranks"),
        (("show", "--placement", "ring"), "--placement 'ring' is not one of auto, line"),
        (("show", "--schedule", "2f2b"), "--schedule '2f2b' is not a schedule"),
        (("show", "--schedule", "zb_v", "--placement", "line"), "does not fit placement line"),
        (("show", "--placement", "v", "--stages-per-rank", "2"), "is of placement line"),
        (("show", "order.csv", "--schedule", "1f1b"), "--schedule would choose another one"),
        (("show", "order.csv", "--memory-cap", "1"), "rank 0: 0F1 would hold activations of 2"),
        (("show", "job.yaml", "--latency-ms", "2"), "the costs of job.yaml are its own"),
        (("compare", "job.yaml", "--rank-factor", "1,2"), "the costs of job.yaml are its own"),
        (("show", "job.yaml", "--ranks", "4"), "--ranks 4 was given, job.yaml has 2"),
        (("show", "order.csv", "--ranks", "3"), "--ranks 3 was given, order.csv has 2"),
        (("show", "nothing.csv"), "cannot read nothing.csv: No such file"),
        (("show", "nothing.yaml"), "nothing.yaml"),
        (("show", "empty"), "empty is not a run directory"),
        (("compare", "empty"), "empty is not a run directory"),
    ],
)
def test_what_cannot_be_shown_is_one_error(arguments: tuple[str, ...], message: str) -> None:
    result = deepopt(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert "Traceback" not in result.stderr


def test_the_order_of_a_job_and_of_its_run_is_the_planned_one(here: Path) -> None:
    job = load_job(here / "job.yaml", ())
    prepared = prepare(job, plan_id=1)
    (here / "run").mkdir()
    write_plan(RunDirectory(here / "run"), prepared)
    planned = [[str(a) for a in row] for row in prepared.timeline.schedule.actions]
    for source in ("job.yaml", "run"):
        found = shown(source)
        assert found["actions"] == planned
        assert "makespan_s" not in found
        assert shown(source, "--costs", "1/1/1")["makespan_s"] > 0
        drawn = deepopt("show", source).stdout
        assert "estimated costs" in drawn
        assert " ms" not in drawn
    table = deepopt("compare", "run", "--no-search", "--json")
    assert {o["num_ranks"] for o in json.loads(table.stdout)["orders"]} == {2}


def test_a_comparison_is_sorted_and_measured_against_1f1b() -> None:
    result = deepopt("compare", "--effort", 5_000, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    times = [round(order["makespan_s"], 9) for order in found["orders"]]
    assert times == sorted(times)
    by_name = {
        (o["placement"], o["stages_per_rank"], o["schedule"]): o for o in found["orders"]
    }
    assert by_name["line", 1, "1f1b"]["speed_up_over_1f1b"] == 1
    assert {o["schedule"] for o in found["orders"]} == {*BUILDERS, "searched"}
    for order in found["orders"]:
        assert order["gap"] >= -1e-9
        assert order["speed_up_over_1f1b"] == pytest.approx(0.638 / order["makespan_s"])


def test_a_comparison_says_what_does_not_fit_and_why() -> None:
    result = deepopt("compare", "--no-search", "--memory-cap", 4, "--csv", "table.csv")
    assert result.exit_code == 0
    fits, _, rest = result.stdout.partition("does not fit:")
    assert "zb_v" in fits
    assert "gpipe" not in fits
    assert re.search(
        r"zb_h2 +holds activations of 7 micro-batches on a rank, the cap is 4", rest
    )
    rows = list(csv.reader(Path("table.csv").read_text().splitlines()))
    assert rows[0][:3] == ["placement", "schedule", "step ms"]
    assert [row[0] for row in rows[1:]] == [
        re.split(r"  +", line)[0] for line in fits.splitlines()[3:] if line
    ]


def test_a_right_order_is_exit_code_0() -> None:
    result = deepopt("verify", "order.csv")
    assert result.exit_code == 0
    assert result.stdout == (
        "order.csv: right: F B on 2 ranks, placement line, 2 stages, 2 micro-batches; at most 2 "
        "in flight on a rank, 4 transfers\n"
    )


@pytest.mark.parametrize(
    ("text", "options", "message", "drawing"),
    [
        (
            "0F0,0F1,0B0,0B1\n1F0,1B0,1B1\n",
            (),
            "rank 1: 1F1 is missing",
            "rank 1  1F0  !1F1 1B0  1B1",
        ),
        (
            "0F0,0F1,0B0,0B1\n1B0,1F0,1F1,1B1\n",
            (),
            "rank 1: 1B0 runs before 1F0, whose result it needs",
            "rank 1  !1B0 ~1F0 1F1  1B1",
        ),
        (
            "0F0,0F1,0B1,0B0\n1F0,1F1,1B1,1B0\n",
            (),
            "rank 0: 0B1 runs before 0B0, but the gradients of a stage are added in micro-batch",
            "rank 0  0F0  0F1  !0B1 ~0B0",
        ),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            (),
            "deadlock: 0B0 on rank 0 waits for 1B0 on rank 1, 1F1 on rank 1 waits for 0F1",
            "rank 0  0F0  !0B0 ~0F1 0B1",
        ),
        (
            "0F0,0F1,0F2,0F3,0B0,0B1,0B2,0B3,1F3\n1F0,1B0,1F1,1B1,1F2,1B2,1B3\n",
            (),
            "rank 0: 1F3 belongs to rank 1",
            "!1F3",
        ),
        (
            "0F0,0F1,0F2,0B0,0B1,0B2\n",
            ("--memory-cap", 2),
            "rank 0: 0F2 would hold activations of 3 stage micro-batches, the cap is 2",
            "rank 0  ~0F0 ~0F1 !0F2 0B0",
        ),
        (
            "0F0,0F0,0B0\n",
            (),
            "rank 0: 0F0 runs twice",
            "!0F0 !0F0 0B0",
        ),
        (
            "0F0,0SEND_F0,0F1,0SEND_F1,0RECV_B0,0B0,0RECV_B1,0B1\n"
            "1RECV_F1,1RECV_F0,1F0,1B0,1SEND_B0,1F1,1B1,1SEND_B1\n",
            (),
            "rank 1: 1RECV_F1 meets 0SEND_F0, the next tensor that rank 0 sends on this channel",
            "!1RECV_F1",
        ),
    ],
)
def test_a_wrong_order_is_refused_with_reason_and_drawing(
    text: str, options: tuple[object, ...], message: str, drawing: str
) -> None:
    Path("wrong.csv").write_text(text)
    result = deepopt("verify", "wrong.csv", *options)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: wrong.csv: {message}")
    assert drawing in result.stderr
    assert result.stdout == ""


def test_a_job_file_in_the_place_of_an_order_is_refused_with_the_way_to_one() -> None:
    Path("job.yaml").write_text("training: {steps: 3}\n")
    result = deepopt("verify", "job.yaml")
    assert result.exit_code == 1
    assert "job.yaml is a YAML file, not an order" in result.stderr
    assert "hint: deepopt schedule show job.yaml --csv order.csv" in result.stderr


def test_garbage_is_refused_with_file_and_line() -> None:
    Path("bytes.csv").write_bytes(b"\xff\xfe\x00garbage")
    Path("words.csv").write_text("0F0,0B0\nhello,world\n")
    result = deepopt("verify", "bytes.csv", "order.csv", "words.csv", "gone.csv")
    assert result.exit_code == 1
    assert "bytes.csv is not text" in result.stderr
    assert "words.csv:2: 'hello' is not an action" in result.stderr
    assert "cannot read gone.csv" in result.stderr
    assert result.stdout.startswith("order.csv: right")


def test_verdicts_are_json_for_machines() -> None:
    Path("wrong.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1B1\n")
    result = deepopt("verify", "order.csv", "wrong.csv", "--json")
    assert result.exit_code == 1
    right, wrong = json.loads(result.stdout)["orders"]
    assert (right["right"], wrong["right"]) == (True, False)
    assert (wrong["rank"], wrong["action"]) == (1, "1F1")


def test_a_wrong_order_is_not_shown_in_time() -> None:
    Path("wrong.csv").write_text("0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n")
    result = deepopt("show", "wrong.csv")
    assert result.exit_code == 1
    assert "wrong.csv: deadlock" in result.stderr
    assert "deepopt schedule verify wrong.csv draws the fault" in result.stderr


DOCS = Path(__file__).parents[2] / "docs"
PICTURES = re.findall(
    r"deepopt schedule (show .* --svg docs/images/(\S+))", (DOCS / "schedules.md").read_text()
)


@pytest.mark.parametrize(("command", "picture"), PICTURES)
def test_a_picture_of_the_documents_is_what_its_command_draws(
    command: str, picture: str, here: Path
) -> None:
    (here / "docs" / "images").mkdir(parents=True)
    assert deepopt(*command.split()).exit_code == 0
    made = (here / "docs" / "images" / picture).read_text()
    assert made == (DOCS / "images" / picture).read_text()


def test_the_fault_in_the_documents_is_drawn_as_it_says() -> None:
    Path("order.csv").write_text("0F0,0F1,0B0,0B1\n1F0,1B1,1F1,1B0\n")
    shown_there = (DOCS / "schedules.md").read_text().replace("\n    ", "\n")
    assert deepopt("verify", "order.csv").stderr.strip() in shown_there


def test_the_documents_name_every_builder() -> None:
    text = (DOCS / "schedules.md").read_text()
    assert [name for name in BUILDERS if f"| `{name}` |" not in text] == []


def test_a_known_model_on_a_cluster_has_costs_and_memory_of_its_own() -> None:
    cluster = ("--model", "gpt-14.6b", "--hardware", "8xA100", "--no-search")
    result = deepopt("compare", *cluster, "--microbatches", 24)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("analytic, A100 at 0.725 of its peak costs")
    assert re.search(r"gpipe +holds activations of 24 micro-batches", result.stdout)
    assert "which its memory does not" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt3-175b"), "--model was given without --hardware"),
        (("--hardware", "8xA100"), "--hardware was given without --model"),
        (("--tensor-parallel", 2), "describe a model on a cluster"),
        (("--model", "gpt-3", "--hardware", "8xA100"), "there is no model 'gpt-3'"),
        (("--model", "gpt3-175b", "--hardware", "8xA10"), "no table for accelerator 'A10'"),
        (
            ("--model", "gpt-1.5b", "--hardware", "8xA100", "--costs", "1/1/1"),
            "--costs was given with --model and --hardware",
        ),
        (("--model", "gpt-1.5b", "--hardware", "8xA100", "--ranks", 4), "has 8"),
    ],
)
def test_half_a_cluster_or_two_costs_are_refused(
    arguments: tuple[object, ...], message: str
) -> None:
    result = deepopt("compare", *arguments)
    assert result.exit_code == 1
    assert message in result.stderr
