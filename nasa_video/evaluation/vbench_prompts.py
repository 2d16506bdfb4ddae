"""Which of VBench's prompts are used, and what the model is given for them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nasa_video.errors import InputError
from nasa_video.evaluation.video_jobs import Prompt


def select_prompts(
    entries: Iterable[Mapping[str, Any]],
    dimensions: Sequence[str],
    limit: int | None = None,
    extended: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """The prompts that belong to the dimensions, each once, in the list's order.

    VBench lists a few prompts twice, for different dimensions: they become one with both. Tags of a prompt are
    ``dimensions``, all of its own (VBench-Long's clips depend on them), and ``auxiliary``, what its judges are told.

    Args:
        limit: at most so many prompts of a dimension, spread evenly over its list.
        extended: what the model is given instead, by prompt; every selected prompt must be there.

    Raises:
        InputError: nothing is left, or a prompt has no extended one.
    """
    prompts = _merged(entries)
    chosen: set[str] = set()
    for dimension in dimensions:
        own = [text for text, tags in prompts.items() if dimension in tags["dimensions"]]
        chosen.update(own if limit is None else _spread(own, limit))
    if not chosen:
        raise InputError(f"the list has no prompt for {', '.join(dimensions)}; see dimension in its entries")
    if extended is not None:
        lacking = sorted(text for text in chosen if text not in extended)
        if lacking:
            raise InputError(f"{len(lacking)} prompts have no extended one, such as {lacking[0]!r}")
    return [
        Prompt(text, extended[text] if extended is not None else None, tags)
        for text, tags in prompts.items()
        if text in chosen
    ]


def _merged(entries: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    prompts: dict[str, dict[str, Any]] = {}
    for entry in entries:
        tags = prompts.setdefault(entry["prompt_en"], {"dimensions": [], "auxiliary": {}})
        tags["dimensions"] = sorted({*tags["dimensions"], *entry["dimension"]})
        tags["auxiliary"] |= entry.get("auxiliary_info") or {}
    return prompts


def _spread(texts: Sequence[str], limit: int) -> list[str]:
    count = min(limit, len(texts))
    return [texts[index * len(texts) // count] for index in range(count)]


def read_extended(path: Path, base: Path | None) -> dict[str, str]:
    """Extended prompts by prompt, from a JSON object, or from a text file beside one with the same lines unextended.

    Raises:
        InputError: they cannot be read, a text file comes without its base, or the two do not match line by line.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            found = json.loads(text)
            if isinstance(found, dict) and all(isinstance(value, str) and value.strip() for value in found.values()):
                return found
            raise InputError(f"{path} must be one JSON object, prompt to extended prompt")
        if base is None:
            raise InputError(
                f"{path} alone does not say which prompt a line extends; give the file with the same lines unextended "
                "as --extended-base (VBench publishes both), or a JSON object"
            )
        before, after = _lines(base.read_text(encoding="utf-8")), _lines(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"the extended prompts cannot be read: {error}") from error
    if len(before) != len(after):
        raise InputError(f"{base} has {len(before)} prompts and {path} {len(after)}: they do not belong together")
    return dict(zip(before, after, strict=True))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
