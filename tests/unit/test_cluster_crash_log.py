from pathlib import Path

from deepopt.cluster.crash_log import TAIL_BYTES, read_crash

SEGFAULT = "Fatal Python error: Segmentation fault\n\nThread 0x1:\n  File 'a.py', line 3 in f\n"


def test_a_crash_is_found_with_its_stack(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text(f"step 1\nstep 2\n{SEGFAULT}")
    crash = read_crash(log, start=0)
    assert crash.headline == "Segmentation fault"
    assert crash.text == SEGFAULT


def test_the_crash_of_an_earlier_process_is_not_this_one_s(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text(SEGFAULT)
    start = log.stat().st_size
    assert read_crash(log, start=start).headline == ""
    with log.open("a") as file:
        file.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
    assert read_crash(log, start=start).headline.startswith("terminate called")


def test_only_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    log.write_text("x" * 3 * TAIL_BYTES + "\n" + SEGFAULT)
    assert read_crash(log, start=0).headline == "Segmentation fault"
    log.write_text(SEGFAULT + "x" * 3 * TAIL_BYTES)
    assert read_crash(log, start=0).headline == ""


def test_no_log_is_no_crash(tmp_path: Path) -> None:
    assert read_crash(tmp_path / "none", start=0).text == ""
