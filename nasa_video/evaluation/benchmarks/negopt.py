"""CLIP+ and CLIP- of NegOpt's prompt pairs (arXiv 2403.07605)."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import Asset, read_json
from nasa_video.evaluation.benchmarks.base import Benchmark, CosineScorer
from nasa_video.evaluation.clip import INSTALL, Backbone
from nasa_video.evaluation.results import Metric
from nasa_video.evaluation.samples import Sample
from nasa_video.files.atomic import file_sha256

PAIRS = 30_000
_DATASET = "mikeogezi/negopt_full"
_READABLE = (".parquet", ".csv", ".jsonl", ".json")


@dataclass(frozen=True)
class Pair:
    """A prompt and what its still must not show."""

    prompt: str
    negative: str


def negopt(pairs: Sequence[Pair], source: Path, n: int, seed: int, backbone: Backbone, device: str | None) -> Benchmark:
    """Cosines of a still with its prompt and with its negative.

    Args:
        n: how many pairs are drawn, with ``seed``; the i-th drawn has the seed ``seed + i`` for its still.

    Raises:
        InputError: there are fewer pairs, or the CLIP model cannot be had.
    """
    new_scorer = partial(CosineScorer, backbone, device)
    scorer = new_scorer()
    samples = [
        Sample(f"{row}/{seed + index}", pair.prompt, pair.negative, seed + index)
        for index, (row, pair) in enumerate(sample_pairs(pairs, n, seed))
    ]
    limited = (f"This run is over {n} only; the paper draws {PAIRS:,} pairs.",) if n < PAIRS else ()
    return Benchmark(
        "negopt",
        "NegOpt",
        samples,
        lambda sample: {"texts": [sample.prompt, sample.negative]},
        scorer,
        new_scorer,
        (
            Metric(name="clip_plus", title="CLIP+", digits=3),
            Metric(name="clip_minus", title="CLIP−", better="lower", digits=3),
        ),
        lambda measured: dict(zip(("clip_plus", "clip_minus"), measured["cosines"], strict=True)),
        {
            "scorer": scorer.identity,
            "scale": "cosine",
            "pairs": n,
            "pairs_to_draw_from": len(pairs),
            "seed": seed,
            "prompts": f"{source.name}, SHA-256 {file_sha256(source)}" if source.is_file() else source.name,
        },
        (
            "CLIP+ is the cosine of still and prompt, CLIP− that of still and negative prompt; both depend on the CLIP "
            "model, and the paper names none.",
            *limited,
        ),
    )


def negopt_pairs(path: Path | None) -> tuple[list[Pair], Path]:
    """All pairs of NegOpt's dataset, and the file (or folder) that they were read from.

    Rows without a prompt or without a negative prompt are left out.

    Raises:
        InputError: it is missing, or holds no such rows.
    """
    place = path or _cached_dataset(_DATASET)
    if place is None:
        asset = Asset("NegOpt's prompt pairs", _DATASET, "its data files", None, "see its page", dataset=True)
        raise asset.missing("--prompts FILE", FileNotFoundError())
    if not place.exists():
        raise InputError(f"{place} does not exist; --prompts takes {', '.join(_READABLE)} or a folder of them")
    files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.suffix in _READABLE)
    pairs = [
        Pair(str(row["prompt"]), str(row["negative_prompt"]))
        for file in files
        for row in _rows(file)
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


def _cached_dataset(repo: str) -> Path | None:
    """The newest snapshot of a dataset in the hub's cache."""
    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{repo.replace('/', '--')}" / "snapshots"
    found = sorted(folder.glob("*"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
    return found[-1] if found else None


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    if path.suffix not in _READABLE:
        raise InputError(f"{path} must end in {', '.join(_READABLE)}")
    rows: Any
    try:
        if path.suffix == ".parquet":
            return _parquet(path)
        if path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                rows = list(csv.DictReader(file))
        elif path.suffix == ".jsonl":
            with path.open(encoding="utf-8") as file:
                rows = [json.loads(line) for line in file if line.strip()]
        else:
            rows = read_json(path)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
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
