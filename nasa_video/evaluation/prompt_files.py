"""Prompt files of the benchmarks: HPSv2's styles, NegOpt's pairs, NegGenBench's missing elements."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import Asset
from nasa_video.evaluation.clip import INSTALL

STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS_A_STYLE = 800
PAIRS = 30_000
_NEGOPT = "mikeogezi/negopt_full"
_READABLE = (".parquet", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Pair:
    """A prompt and what its picture must not show."""

    prompt: str
    negative: str


@dataclass(frozen=True)
class Removal:
    """A prompt, the feature that must be absent, and how to ask for it.

    Attributes:
        feature: what the negative prompt names and the judge looks for.
        present: a question that "yes" answers where the prompt is held; None where the file has none.
        absent: a question that "yes" answers where the feature is missing; None asks whether the feature is there.
        alternatives: what could be there instead, for judges that choose ("female" for "male").
    """

    prompt: str
    feature: str
    negative: str
    present: str | None = None
    absent: str | None = None
    alternatives: tuple[str, ...] = ()


def style_asset(style: str) -> Asset:
    """Where the prompts of one of HPSv2's styles come from."""
    return Asset(
        f"HPSv2's {style} prompts", "zhwang/HPDv2", f"benchmark/{style}.json", 0.0001, "Apache-2.0", dataset=True
    )


def style_prompts(style: str, folder: Path | None) -> tuple[list[str], Path]:
    """The prompts of a style, and the file that they were read from: ``STYLE.json`` in a folder, or the hub's cache.

    Raises:
        InputError: the file is missing, or is not a list of texts.
    """
    if style not in STYLES:
        raise InputError(f"styles must be among {', '.join(STYLES)}, got {style!r}")
    if folder is None:
        path = style_asset(style).fetch("--prompts FOLDER")
    else:
        path = folder / f"{style}.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist; --prompts takes a folder with {', '.join(STYLES)} as .json files")
    prompts = _json(path)
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f"{path} must hold a JSON list of prompts, as HPSv2's benchmark/{style}.json does")
    return prompts, path


def negopt_pairs(path: Path | None) -> tuple[list[Pair], Path]:
    """All pairs of NegOpt's dataset, and the file (or folder) that they were read from.

    Rows without a prompt or without a negative prompt are left out.

    Raises:
        InputError: it is missing, or holds no such rows.
    """
    place = path or _cached_dataset(_NEGOPT)
    if place is None:
        asset = Asset("NegOpt's prompt pairs", _NEGOPT, "its data files", None, "see its page", dataset=True)
        raise asset.missing("--prompts FILE", FileNotFoundError())
    if not place.exists():
        raise InputError(f"{place} does not exist; --prompts takes {', '.join(_READABLE)} or a folder of them")
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _READABLE)
    rows = [row for file in files for row in _rows(file)]
    pairs = [
        Pair(str(row["prompt"]), str(row["negative_prompt"]))
        for row in rows
        if str(row.get("prompt") or "").strip() and str(row.get("negative_prompt") or "").strip()
    ]
    if not pairs:
        raise InputError(f"{place} holds no rows with prompt and negative_prompt")
    return pairs, place


def sample_pairs(pairs: Sequence[Pair], n: int, seed: int) -> list[tuple[int, Pair]]:
    """n different pairs with their row numbers, in random order; a smaller n of one seed is the beginning of a larger.

    Raises:
        InputError: there are fewer.
    """
    if n > len(pairs):
        raise InputError(f"there are {len(pairs)} pairs, so {n} cannot be drawn; give --n {len(pairs)} or less")
    order = list(range(len(pairs)))
    random.Random(seed).shuffle(order)
    return [(index, pairs[index]) for index in order[:n]]


def removal_prompts(path: Path) -> list[Removal]:
    """NegGenBench's format, ``[{prompt, missing_element, question_1, question_2}, …]``.

    Also understood: ``feature`` for ``missing_element``, ``negative`` where the negative prompt says it otherwise,
    ``alternatives`` for what could be there instead; the questions may be left out.

    Raises:
        InputError: it cannot be read, or an entry lacks its prompt or feature.
    """
    entries = _json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} must hold a JSON list of entries with prompt and missing_element")
    return [_removal(path, number, entry) for number, entry in enumerate(entries, 1)]


def _removal(path: Path, number: int, entry: Any) -> Removal:
    if not isinstance(entry, dict):
        raise InputError(f"{path}, entry {number}, must be an object with prompt and missing_element")
    feature = entry.get("missing_element", entry.get("feature"))
    prompt, feature = (
        _text(path, number, name, value)
        for name, value in (("prompt", entry.get("prompt")), ("missing_element", feature))
    )
    others = entry.get("alternatives", [])
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise InputError(f"{path}, entry {number}: alternatives must be a list of texts")
    questions = entry.get("question_1"), entry.get("question_2")
    return Removal(prompt, feature, str(entry.get("negative") or feature), *questions, tuple(others))


def _text(path: Path, number: int, name: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{path}, entry {number}, has no {name}")
    return value


def _cached_dataset(repo: str) -> Path | None:
    """The newest snapshot of a dataset in the hub's cache."""
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    return found[-1] if found else None


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix == ".parquet":
        return _parquet(path)
    if path.suffix == ".json":
        rows = _json(path)
    elif path.suffix == ".jsonl":
        rows = _json_lines(path)
    elif path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    else:
        raise InputError(f"{path} must end in {', '.join(_READABLE)}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path} must hold rows with prompt and negative_prompt")
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise InputError(f"{path} needs pyarrow to be read: {INSTALL}; or give it as .csv or .jsonl") from error
    try:
        rows: list[dict[str, Any]] = parquet.read_table(path, columns=["prompt", "negative_prompt"]).to_pylist()
    except Exception as error:  # pyarrow has many error types for a broken or a different file
        raise InputError(f"{path} holds no columns prompt and negative_prompt: {error}") from error
    return rows


def _json_lines(path: Path) -> list[Any]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON lines: {error}") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
