"""What the documentation names exists: files, scripts, commands and their options, Python names."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main

from nasa_video.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
PATH = re.compile(r"\b((?:docs|research|scripts|tests|configs|nasa_video|causvid_adapter|examples)/[\w./-]*\w)")
COMMAND = re.compile(r"(?:nasa-video|-m nasa_video)((?: .*)?)$")
SCRIPT = re.compile(r"((?:research|scripts)/\w+\.py)(.*)$")
ROOM = re.compile(r"^::: ([\w.]+)$", re.M)


def commands_of(page: Path) -> Iterator[str]:
    """What a page tells people to type: indented or fenced lines, with continuations joined, and inline code."""
    text = page.read_text(encoding="utf-8")
    joined = re.sub(r"\\\n\s+", " ", text)
    yield from (line.strip() for line in joined.splitlines() if line.startswith("    "))
    for code in re.findall(r"```\w*\n(.*?)```", joined, re.S):
        yield from code.splitlines()
    yield from (re.sub(r"\s+", " ", code) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", joined))


def options_of(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--[a-z]", word)]


def words_of(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:  # a sentence with an apostrophe
        return []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    named = set(PATH.findall(page.read_text(encoding="utf-8")))
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_that_a_page_names_has_its_options(page: Path) -> None:
    wrong = []
    for line in commands_of(page):
        found = COMMAND.search(line.split(" #")[0].strip())
        if found is None:
            continue
        command: Any = typer.main.get_command(app)
        words = words_of(found[1])
        while words and hasattr(command, "commands"):
            if words[0] not in command.commands:
                break
            command = command.commands[words.pop(0)]
        known = {option for part in command.params for option in (*part.opts, *part.secondary_opts)} | {"--help"}
        if hasattr(command, "commands"):  # options of a group's default command, such as `train CONFIG`
            parts = [part for sub in command.commands.values() for part in sub.params]
            known |= {option for part in parts for option in (*part.opts, *part.secondary_opts)}
            if words and re.fullmatch(r"[a-z]{3,}", words[0]) and command.name not in ("train", "models"):
                wrong.append(f"{line}: no command {words[0]}")
        wrong += [f"{line}: no option {option}" for option in options_of(words) if option not in known]
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_script_that_a_page_names_has_its_options(page: Path) -> None:
    wrong = []
    for line in commands_of(page):
        if found := SCRIPT.search(line):
            source = (ROOT / found[1]).read_text(encoding="utf-8")
            for option in options_of(words_of(found[2])):
                if option not in source and f"    {option[2:].replace('-', '_')}: " not in source:
                    wrong.append(f"{line}: no option {option}")
    assert wrong == []


def test_every_page_of_the_reference_has_its_objects() -> None:
    names = [name for page in (ROOT / "docs" / "reference").glob("*.md") for name in ROOM.findall(page.read_text())]
    assert names
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            module, _, last = name.rpartition(".")
            assert hasattr(importlib.import_module(module), last), name
