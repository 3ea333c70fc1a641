"""`deepopt launch train.py`: the script's exit code, errors without a traceback, options for its trainers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deepopt.errors import InputError
from deepopt.launch import script
from deepopt_cli import launch_script as scripts
from deepopt_cli.launch_script import launch_script

SETTINGS = ["training.seed=3", "optimizer.betas=[0.8, 0.9]"]


def write(folder: Path, text: str) -> Path:
    path = folder / "train.py"
    path.write_text(text)
    return path


def run(path: Path, *arguments: str, **options: object) -> int:
    fields: dict[str, object] = {
        "workers": None,
        "hostfile": None,
        "address": None,
        "run_dir": None,
        "overrides": (),
        "dry_run": False,
    }
    return launch_script(path, arguments, **{**fields, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("import sys; sys.exit(7)", 7, ""),
        ("import sys; sys.exit('no data')", 1, "no data\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        (
            "from deepopt.errors import ClusterError\n\nraise ClusterError('no GPU', remedy='buy one')",
            3,
            "error: no GPU ({path}:3)\n\nhint: buy one\n",
        ),
    ],
)
def test_the_exit_code_is_the_scripts(
    text: str, code: int, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, text)
    assert run(path) == code
    assert capfd.readouterr().err == said.format(path=path)


def test_a_bug_in_the_script_shows_the_scripts_own_lines_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, "def f():\n    raise ValueError('mine')\n\nf()\n")
    assert run(path) == 1
    said = capfd.readouterr().err
    assert "ValueError: mine" in said
    assert f'File "{path}", line 4' in said
    assert "runpy" not in said


def test_the_script_gets_its_arguments_its_folder_and_the_launch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "beside.py").write_text("VALUE = 5")
    path = write(
        tmp_path,
        "import json, sys, beside\n"
        "from deepopt.launch.script import launched, next_run_dir, note_run\n"
        "launch = launched()\n"
        "assert __name__ == '__main__'\n"
        "first = next_run_dir(launch); note_run(first); second = next_run_dir(launch)\n"
        "print(json.dumps([sys.argv[1:], beside.VALUE, launch.workers, launch.settings,"
        " first.name, second.name]))\n",
    )
    code = run(
        path, "--lr", "3e-4", workers=2, overrides=SETTINGS, run_dir=tmp_path / "runs-here"
    )
    assert code == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out) == [
        ["--lr", "3e-4"],
        5,
        2,
        {"training": {"seed": 3}, "optimizer": {"betas": [0.8, 0.9]}},
        "runs-here",
        "runs-here-2",
    ]
    assert captured.err == ""


def test_a_script_that_trains_nothing_is_told_so(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(write(tmp_path, "print('hello')")) == 0
    captured = capfd.readouterr()
    assert captured.out == "hello\n"
    assert "without a DeepTrainer that trained: nothing ran on the cluster" in captured.err


def test_sigterm_goes_to_the_script_and_its_exit_code_comes_back(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "import signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\n"
        "print('ready', flush=True)\n"
        "signal.pause()\n",
    )
    command = [
        sys.executable,
        "-c",
        "from deepopt_cli.app import main; main()",
        "launch",
        str(path),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    ) as p:
        assert p.stdout is not None
        assert p.stdout.readline() == "ready\n"
        p.send_signal(signal.SIGTERM)
        assert p.wait(60) == 9


def test_what_cannot_be_launched_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no script"):
        run(tmp_path / "nope.py")
    path = write(tmp_path, "")
    with pytest.raises(InputError, match="--hostfile and --address are both given"):
        run(path, hostfile=tmp_path / "hosts", address="10.0.0.1:6379")
    with pytest.raises(InputError, match="unknown key"):
        run(path, overrides=["trainin.seed=1"])
    with pytest.raises(InputError, match="--detach is for job files"):
        scripts.refuse_flags(path, {"--json": False, "--detach": True})
    with pytest.raises(InputError, match="is a job file, and 'x' stands behind it"):
        scripts.refuse_arguments(Path("job.yaml"), ["x"])


def test_a_dry_run_starts_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "raise SystemExit(5)")
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=2\nb slots=3\n")
    assert run(path, "--lr", "1", hostfile=hosts, dry_run=True) == 0
    assert "2 hosts of" in (said := capsys.readouterr().out)
    assert "5 slots" in said


def test_keys_of_the_launch_win_over_those_of_the_trainer() -> None:
    merged = script.merged({"training": {"seed": 1, "steps": 2}}, {"training": {"seed": 3}})
    assert merged == {"training": {"seed": 3, "steps": 2}}
