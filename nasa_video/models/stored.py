"""Where a hub repository's files lie on this machine, and whether they are all there; the network is never asked."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

MODELS_FOLDER = "NASA_VIDEO_MODELS"
"""Environment variable: a folder of repositories, as ``owner/name`` or ``name``, looked at before the hub's cache."""

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# How a file of weights in several parts is named.
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")


def find_file(repo: str, name: str) -> Path | None:
    """A file of a repository, or None."""
    for folder in _folders(repo):
        if (folder / name).is_file():
            return folder / name
    return _cached(repo, name)


def find_folder(repo: str, name: str) -> Path | None:
    """A folder of a repository with all that it needs, or None; what a broken download left does not count."""
    places = [folder / name for folder in _folders(repo)]
    for probe in ("config.json", "tokenizer_config.json"):
        cached = _cached(repo, f"{name}/{probe}")
        places += [] if cached is None else [cached.parent]
    return next((place for place in places if is_whole(place)), None)


def _cached(repo: str, name: str) -> Path | None:
    """A file in the hub's own cache, or None."""
    from huggingface_hub import try_to_load_from_cache  # late: its import takes longer than a first line may

    cached = try_to_load_from_cache(repo, name)
    return Path(cached) if isinstance(cached, str) else None


def find_repository(repo: str) -> Path | None:
    """The folder that stands for a repository under NASA_VIDEO_MODELS, or None."""
    return next((folder for folder in _folders(repo) if folder.is_dir()), None)


def is_whole(folder: Path) -> bool:
    """Whether a folder holds a tokenizer, or a config and every file of its weights."""
    if (folder / "tokenizer_config.json").is_file():
        return (folder / "tokenizer.json").is_file() or any(folder.glob("*.model"))
    if not (folder / "config.json").is_file():
        return False
    names = {path.name for path in folder.iterdir() if path.is_file()}
    indices = [name for name in names if name.endswith(".index.json")]
    if indices or any(_SHARD.search(name) for name in names):
        return any(_parts_of(folder / index) <= names for index in indices)
    return any(name.endswith(WEIGHT_SUFFIXES) for name in names)


def _parts_of(index: Path) -> set[str]:
    """Names of the files that an index lists; one that no folder has where the index is damaged."""
    try:
        return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {""}


def _folders(repo: str) -> list[Path]:
    root = os.environ.get(MODELS_FOLDER)
    return [Path(root, repo), Path(root, repo.split("/")[-1])] if root else []
