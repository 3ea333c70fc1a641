"""Text from files: what is found, in which order, and what is said when nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepopt.datasets.text import read_files, read_standard_library
from deepopt.errors import InputError


def write(folder: Path, **contents: str) -> None:
    for name, content in contents.items():
        path = folder / (name.replace("__", "/") + ".txt")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


def test_files_are_read_once_in_the_order_of_their_paths(tmp_path: Path) -> None:
    write(tmp_path, b="2", a="1", sub__c="3")
    text = read_files([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt"])
    assert text.parts == (b"1", b"2", b"3")
    assert text.names == tuple(f"{tmp_path}/{n}.txt" for n in ("a", "b", "sub/c"))
    assert text.size_bytes == 3
    assert "3 file(s)" in text.description
    assert "3 bytes" in text.description


def test_relative_and_home_paths_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="1", b="2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = read_files(["a.txt", "~/b.txt"])
    assert text.parts == (b"1", b"2")
    assert all(Path(name).is_absolute() for name in text.names)


def test_a_name_with_brackets_is_a_file_and_not_only_a_glob(tmp_path: Path) -> None:
    (tmp_path / "log[1].txt").write_text("x")
    assert read_files([f"{tmp_path}/log[1].txt"]).parts == (b"x",)


def test_the_fingerprint_is_of_the_content_and_not_of_the_place(tmp_path: Path) -> None:
    write(tmp_path, one__a="text", two__b="text", three__a="te", three__b="xt")
    one, two, three = (read_files([f"{tmp_path}/{n}/*"]) for n in ("one", "two", "three"))
    assert one.fingerprint() == two.fingerprint() != three.fingerprint()


@pytest.mark.parametrize(
    ("pattern", "word"),
    [
        ("{tmp}/nothing*.txt", "matches no file"),
        ("{tmp}/sub", "only the folder"),
        ("{tmp}/empty.txt", "empty"),
    ],
)
def test_a_pattern_without_text_is_named(tmp_path: Path, pattern: str, word: str) -> None:
    write(tmp_path, empty="", sub__a="x")
    pattern = pattern.format(tmp=tmp_path)
    with pytest.raises(InputError, match=word) as caught:
        read_files([f"{tmp_path}/empty.txt", pattern])
    assert pattern in caught.value.message
    assert caught.value.remedy


def test_an_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a="x")

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"a\.txt: Permission denied"):
        read_files([f"{tmp_path}/a.txt"])


def make_library(root: Path) -> None:
    for name in ("b.py", "a.py", "a/x.py", "test/t.py", "a/tests/t.py", "site-packages/p.py"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"# {name}\n")
    (root / "c.txt").write_text("no source")


def test_the_standard_library_comes_without_tests_and_packages(tmp_path: Path) -> None:
    make_library(tmp_path)
    text = read_standard_library(root=tmp_path)
    assert [str(Path(n).relative_to(tmp_path)) for n in text.names] == [
        "a/x.py",
        "a.py",
        "b.py",
    ]
    assert "3 files" in text.description
    assert "first" not in text.description


def test_a_library_beyond_the_limit_is_cut_between_files_and_says_so(tmp_path: Path) -> None:
    make_library(tmp_path)
    text = read_standard_library(root=tmp_path, limit_bytes=16)
    assert text.parts == (b"# a/x.py\n", b"# a.py\n")
    assert "the first 16 bytes" in text.description


def test_a_python_without_sources_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no Python sources") as caught:
        read_standard_library(root=tmp_path)
    assert "data.files" in caught.value.remedy


def test_this_python_has_a_library_to_learn_from() -> None:
    text = read_standard_library()
    assert text.size_bytes > 2_000_000
    assert all(
        n.endswith(".py") and "/test/" not in n and "/site-packages/" not in n
        for n in text.names
    )
