"""What README and docs tell readers to type and to open is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from deepopt_cli.app import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    ROOT / "benchmarks" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BLOCK_LINE = re.compile(r"^ {4}(deepopt [^#\n]+)", re.MULTILINE)
INLINE = re.compile(r"`(deepopt [^`,|{]+)`")  # `deepopt plan show, diff` is a list of commands
LINK = re.compile(r"\]\(([^)\s]+)\)")


def unknown_words(command: str) -> list[str]:
    """Commands and options in a command line that deepopt does not have."""
    words = shlex.split(command.partition(" > ")[0].partition(" && ")[0])[1:]
    if "--" in words:  # what follows is for a script
        words = words[: words.index("--")]
    found: Any = get_command(app)
    while words and (commands := getattr(found, "commands", None)):
        if words[0].startswith("-"):
            break
        name = words.pop(0)
        if name not in commands:
            return [name]
        found = commands[name]
    known = {o for p in found.params for o in (*p.opts, *p.secondary_opts)}
    known |= {"-h", "--help"}
    return [w for w in words if w.startswith("-") and w.partition("=")[0] not in known]


def anchors(document: Path) -> set[str]:
    """Names of a document's headings in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.strip().lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_documents_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    commands = [*BLOCK_LINE.findall(text), *INLINE.findall(text)]
    wrong = {command: unknown for command in commands if (unknown := unknown_words(command))}
    assert wrong == {}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_in_documents_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(document.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("command", ["deepopt lunch", "deepopt launch --worker 2"])
def test_a_command_that_is_not_there_is_found(command: str) -> None:
    assert unknown_words(command) == [command.split()[1 if "lunch" in command else 2]]
