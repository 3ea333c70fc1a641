"""Import paths: the object, or an error that says which part failed and where."""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepopt.errors import InputError
from deepopt.import_path import (
    describe_raise,
    import_object,
    is_import_path,
    without_collections,
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `some_user` on the path."""
    folder = tmp_path / "some_user"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "model.py").write_text(
        "class Net:\n    @staticmethod\n    def make(): return 'made'\n\ndef build(): return 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "some_user"]:
        del sys.modules[name]


def failure(path: str) -> InputError:
    with pytest.raises(InputError) as caught:
        import_object(path, field="model.factory")
    assert caught.value.message.startswith("model.factory: ")
    return caught.value


def test_a_function_is_imported(package: Path) -> None:
    assert import_object("some_user.model:build", field="model.factory")() == 3


def test_an_attribute_of_a_class_is_imported(package: Path) -> None:
    assert import_object("some_user.model:Net.make", field="model.factory")() == "made"


@pytest.mark.parametrize(
    "path", ["", "a", "a:", ":b", "a.:b", ".a:b", "a:b.", "a/b.py:c", "a:b:c", "a :b", "1a:b"]
)
def test_what_is_no_import_path_is_refused_before_any_import(path: str) -> None:
    assert not is_import_path(path)
    assert "is not an import path" in failure(path).message


def test_a_misspelt_attribute_is_suggested(package: Path) -> None:
    error = failure("some_user.model:biuld")
    assert "some_user.model has no 'biuld'" in error.message
    assert error.remedy == "did you mean 'build'?"


def test_a_misspelt_attribute_of_a_class_names_the_class(package: Path) -> None:
    error = failure("some_user.model:Net.mak")
    assert "some_user.model.Net has no 'mak'" in error.message
    assert error.remedy == "did you mean 'make'?"


def test_an_attribute_like_no_other_lists_what_there_is(package: Path) -> None:
    assert failure("some_user.model:zzz").remedy == "it has Net, build"


def test_what_a_package_offers_from_its_modules_is_listed(package: Path) -> None:
    (package / "__init__.py").write_text(
        "from some_user.model import Net, build\n__all__ = ['Net', 'build']\n"
    )
    assert failure("some_user:zzzz").remedy == "it has Net, build"


def test_a_misspelt_module_is_suggested(package: Path) -> None:
    error = failure("some_user.modle:build")
    assert "there is no module 'some_user.modle'" in error.message
    assert error.remedy == "did you mean some_user.model?"


def test_an_unknown_package_says_where_was_looked() -> None:
    error = failure("no_such_package_of_ours.model:build")
    assert "there is no module 'no_such_package_of_ours'" in error.message
    assert str(Path.cwd()) in error.remedy


def test_a_module_without_its_dependency_is_not_called_missing(package: Path) -> None:
    (package / "broken.py").write_text("import math\nimport no_such_dependency_of_ours\n")
    error = failure("some_user.broken:build")
    assert "No module named 'no_such_dependency_of_ours'" in error.message
    assert f"{package / 'broken.py'}:2: import no_such_dependency_of_ours" in error.message
    assert 'python -c "import some_user.broken"' in error.remedy


def test_a_module_that_raises_is_named_with_its_line(package: Path) -> None:
    (package / "broken.py").write_text("import json\nsettings = json.loads('{')\n")
    error = failure("some_user.broken:build")
    assert "raised json.decoder.JSONDecodeError: Expecting" in error.message
    assert f"{package / 'broken.py'}:2: settings = json.loads('{{')" in error.message


def test_a_neighbour_that_raises_is_named_instead_of_the_importer(package: Path) -> None:
    (package / "broken.py").write_text("1 / 0\n")
    (package / "outer.py").write_text("import some_user.broken\n")
    error = failure("some_user.outer:build")
    assert "importing some_user.outer (from some_user.outer:build)" in error.message
    assert f"ZeroDivisionError: division by zero, {package / 'broken.py'}:1" in error.message


def test_a_syntax_error_is_named_with_its_line(package: Path) -> None:
    (package / "broken.py").write_text("x = 1\ndef f(:\n")
    error = failure("some_user.broken:build")
    assert f"SyntaxError: invalid syntax, {package / 'broken.py'}:2: def f(:" in error.message


def test_a_script_that_exits_on_import_does_not_end_the_program(package: Path) -> None:
    (package / "script.py").write_text("import sys\nsys.exit(0)\n")
    assert "raised SystemExit: 0" in failure("some_user.script:build").message


def test_what_a_call_raised_is_named_with_its_line() -> None:
    def factory() -> int:
        return int("many")

    with pytest.raises(ValueError, match="many") as caught:
        factory()
    words = describe_raise(caught.value)
    assert words.startswith("ValueError: invalid literal")
    assert re.search(r"\(.*test_import_path\.py:\d+\)$", words)


def test_a_call_that_does_not_fit_names_no_line_of_the_caller() -> None:
    def factory(depth: int) -> int:
        return depth

    call: Any = factory
    with pytest.raises(TypeError) as caught:
        call(dept=3)
    words = describe_raise(caught.value)
    assert "unexpected keyword argument 'dept'" in words
    assert ".py:" not in words


def test_collections_go_on_after_an_import_that_fails_and_stay_off_where_they_were() -> None:
    def fail() -> None:
        with without_collections():
            assert not gc.isenabled()
            raise ImportError

    was_on = gc.isenabled()
    try:
        gc.enable()
        with pytest.raises(ImportError):
            fail()
        assert gc.isenabled()
        gc.disable()
        with without_collections():
            pass
        assert not gc.isenabled()
    finally:
        (gc.enable if was_on else gc.disable)()
