"""`deepopt launch train.py -- ...`: checks the launch, starts the script, passes signals on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from deepopt_cli.output import say


def refuse_arguments(job_file: Path | None, arguments: Sequence[str]) -> None:
    """Refuse arguments behind a job file: only scripts take them.

    Raises:
        InputError: there are some.
    """
    from deepopt.errors import InputError

    if arguments:
        raise InputError(
            f"{job_file} is a job file, and {' '.join(arguments)!r} stands behind it",
            remedy="set keys with --set; arguments behind -- are for scripts: "
            "deepopt launch train.py -- --lr 3e-4",
        )


def refuse_flags(script: Path, flags: Mapping[str, bool]) -> None:
    """Refuse options that only a job file can have.

    Args:
        script: for the message.
        flags: option -> whether it was given.

    Raises:
        InputError: one was given.
    """
    from deepopt.errors import InputError

    remedies = {
        "--detach": "start it in the background: nohup deepopt launch ... &",
        "--json": "read metrics.jsonl and status.json in the run directory",
        "--plan": "give the trainer a device_map, or --set pipeline.boundaries=...",
    }
    for option, given in flags.items():
        if given:
            raise InputError(
                f"{script} is a script, and {option} is for job files",
                remedy=remedies.get(option, "leave it out"),
            )


def launch_script(
    script: Path,
    arguments: Sequence[str],
    *,
    workers: int | None,
    hostfile: Path | None,
    address: str | None,
    run_dir: Path | None,
    overrides: Sequence[str],
    dry_run: bool,
) -> int:
    """Run a script; its trainers get the options.

    Args:
        script: a Python file.
        arguments: for the script.
        workers: number of workers.
        hostfile: hosts.
        address: of a Ray cluster.
        run_dir: of the script's first fit.
        overrides: `KEY=VALUE`, keys of the job.
        dry_run: say what would be done.

    Returns:
        The exit code of the script.

    Raises:
        DeepoptError: the script or the cluster cannot be found, or a key is wrong.
    """
    from deepopt.errors import InputError
    from deepopt.launch.run_files import refuse_used
    from deepopt.launch.script import VARIABLE, ScriptLaunch

    if not script.is_file():
        raise InputError(f"there is no script {script}", remedy="check the path")
    if run_dir is not None:
        refuse_used(run_dir)
    cluster = _cluster(hostfile, address)
    launch = ScriptLaunch(
        workers=workers,
        hostfile=None if hostfile is None else str(hostfile.absolute()),
        address=address,
        run_dir=None if run_dir is None else str(run_dir.absolute()),
        settings=_settings(overrides),
    )
    if dry_run:
        words = " ".join([str(script), *arguments])
        count = "as the script says" if workers is None else str(workers)
        say(f"script      {words}\ncluster     {cluster}\nworkers     {count}")
        say("dry run: nothing was started")
        return 0
    command = [sys.executable, "-m", "deepopt.launch.script", str(script), *arguments]
    return _run(command, env={**os.environ, VARIABLE: launch.to_env()})


def _run(command: Sequence[str], *, env: Mapping[str, str]) -> int:
    """Wait for a command; Ctrl-C is the command's own to handle, it gets it from the terminal."""
    before = {}
    process: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, _: FrameType | None) -> None:
        if process is not None and number != signal.SIGINT:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        before[number] = signal.signal(number, pass_on)
    try:
        process = subprocess.Popen(command, env=dict(env))
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - code if code < 0 else code


def _cluster(hostfile: Path | None, address: str | None) -> str:
    from deepopt.errors import InputError

    if hostfile is not None and address is not None:
        raise InputError(
            "--hostfile and --address are both given", remedy="give the one where it shall run"
        )
    if address is not None:
        return f"Ray at {address}"
    if hostfile is None:
        return "a private Ray on this machine"
    from deepopt.cluster.hostfile import read_hostfile

    hosts = read_hostfile(hostfile)
    slots = sum(host.slots for host in hosts)
    return f"{len(hosts)} hosts of {hostfile}, {slots} slots"


def _settings(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`SECTION.KEY=VALUE` as nested keys; each must be one of a job."""
    from deepopt.job_file import load_job

    job = load_job(None, overrides)  # says what is wrong with a key or value
    nested: dict[str, dict[str, Any]] = {}
    for override in overrides:
        section, _, key = override.partition("=")[0].strip().partition(".")
        if not key:
            continue
        values = getattr(job, section).model_dump(mode="json", by_alias=True)
        name = key.partition(".")[0]
        nested.setdefault(section, {})[name] = values[name]
    return nested
