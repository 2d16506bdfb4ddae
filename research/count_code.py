"""Counts the code: python research/count_code.py [FOLDER ...]; by default packages, research and scripts.

A row a folder: files, lines, the median and the longest file; of functions, without their docstrings, the median and
the 90th percentile of lines, how many have more than 50 and more than 60, and how many more than 8 parameters.
"""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "files", "lines", "median file", "longest", "median fn", "p90 fn", "fns > 50", "fns > 60", "fns > 8 params",
    "most params",
)  # fmt: skip


def functions_in(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """Lines without the docstring, and parameters without self and cls, of every function of a module."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if ast.get_docstring(node, clean=False) is not None:
            docstring = node.body[0]
            lines -= (docstring.end_lineno or docstring.lineno) - docstring.lineno + 1
        given = node.args
        named = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs) if a.arg not in ("self", "cls")]
        yield lines, len(named) + (given.vararg is not None) + (given.kwarg is not None)


def count(folder: Path) -> dict[str, float]:
    """The row of a folder's Python files.

    Raises:
        ValueError: it has none.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*.py"))]
    if not texts:
        raise ValueError(f"{folder} has no Python file")
    lengths = [len(text.splitlines()) for text in texts]
    functions = [one for text in texts for one in functions_in(ast.parse(text))] or [(0, 0)]
    lines, parameters = sorted(n for n, _ in functions), [p for _, p in functions]
    row = (
        len(texts), sum(lengths), statistics.median(lengths), max(lengths), statistics.median(lines),
        lines[int(0.9 * (len(lines) - 1))], sum(n > 50 for n in lines), sum(n > 60 for n in lines),
        sum(p > 8 for p in parameters), max(parameters),
    )  # fmt: skip
    return dict(zip(COLUMNS, row, strict=True))


def main(folders: Annotated[list[Path] | None, typer.Argument(help="Folders of Python files.")] = None) -> None:
    """Print the table."""
    chosen = folders or [ROOT / name for name in ("causvid_adapter", "nasa_video", "research", "scripts")]
    table = Table("", *COLUMNS)
    for folder in chosen:
        table.add_row(folder.name, *(f"{value:,.0f}" for value in count(folder).values()))
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
