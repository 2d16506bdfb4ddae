"""Files that measurements need, named before they are downloaded, and what a model is made of, as one digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from platformdirs import user_cache_path

from nasa_video.errors import InputError, OutputError, format_bytes
from nasa_video.files.atomic import file_sha256, write_text
from nasa_video.models.download import missing
from nasa_video.models.presets import VideoPreset
from nasa_video.models.stored import MODELS_FOLDER
from nasa_video.text.embedding_cache import FOLDER_VARIABLE

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One file of the hub.

    Attributes:
        what: for people.
        gigabytes: size of the download; None where its source does not state it.
        dataset: whether the repository is one of data.
    """

    what: str
    repo: str
    file: str
    gigabytes: float | None
    licence: str
    dataset: bool = False

    @property
    def description(self) -> str:
        """What, where from, how large, under which licence."""
        size = "size unknown" if self.gigabytes is None else format_bytes(1e9 * self.gigabytes)
        kind = "dataset " if self.dataset else ""
        return f"{self.what}: {self.file} of the hub's {kind}{self.repo} ({size}; licence: {self.licence})"

    def find(self) -> Path | None:
        """Where it is on this machine, without asking the network."""
        root = os.environ.get(MODELS_FOLDER)
        local = Path(root, self.repo, self.file) if root else None
        if local is not None and local.is_file():
            return local
        kind = "dataset" if self.dataset else "model"
        found = try_to_load_from_cache(self.repo, self.file, repo_type=kind)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, option: str) -> Path:
        """Its path, downloaded when it is not here.

        Args:
            option: with which a person names a file of their own.

        Raises:
            InputError: it is not here and cannot be had.
        """
        path = self.find()
        if path is not None:
            return path
        self.tell()
        try:
            return Path(hf_hub_download(self.repo, self.file, repo_type="dataset" if self.dataset else "model"))
        except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
            raise self.missing(option, error) from error

    def tell(self) -> None:
        """Say that it is about to be downloaded."""
        _log.warning("about to download, where the network allows it: %s", self.description)

    def missing(self, option: str, error: Exception) -> InputError:
        """The error for a file that cannot be had."""
        return InputError(
            f"{self.description} is not on this machine and could not be downloaded ({type(error).__name__}). Bring "
            f"it here and give it with {option}, or put it into the hub's cache (HF_HOME) or under "
            f"{MODELS_FOLDER}=FOLDER as {self.repo}/{self.file}"
        )


def checkpoint_hash(preset: VideoPreset) -> str:
    """SHA-256 over every file of a preset's components (names and contents), 64 hex digits.

    Files are brought when they are not here, and named before that with size and licence. Digests of files are kept in
    the cache by path, size and time of change: 28 GB are read once.

    Raises:
        InputError: a component is missing and cannot be had.
    """
    for source in missing(preset.components.sources):
        if source.repo is not None:
            tell_download(f"{source.description} for {preset.name}", preset.licence)
    return digest_of(tuple(source.fetch() for source in preset.components.sources))


def tell_download(what: str, licence: str) -> None:
    """Say what is about to be downloaded: to standard error, where nothing else was asked of logging."""
    _log.warning("about to download, where the network allows it: %s; licence: %s", what, licence)


@cache
def digest_of(places: tuple[Path, ...]) -> str:
    """SHA-256 over files and folders, in their order; where they lie does not matter, their names inside do."""
    total = hashlib.sha256()
    for place in places:
        files = [place] if place.is_file() else sorted(path for path in place.rglob("*") if path.is_file())
        for path in files:
            name = path.name if path == place else path.relative_to(place).as_posix()
            total.update(f"{name}\0{cached_sha256(path)}\n".encode())
    return total.hexdigest()


def cached_sha256(path: Path) -> str:
    """SHA-256 of a file's content, read again only after its size or time of change is another."""
    real = path.resolve()
    status = real.stat()
    state = [str(real), status.st_size, status.st_mtime_ns]
    key = hashlib.sha256(json.dumps(state).encode()).hexdigest()
    folder = Path(os.environ.get(FOLDER_VARIABLE) or user_cache_path("nasa-video")) / "digests"
    kept = folder / key
    try:
        text = kept.read_text(encoding="ascii")
        if len(text) == 64:
            return text
    except (OSError, UnicodeDecodeError):
        pass
    digest = file_sha256(real)
    with contextlib.suppress(OutputError):  # a cache that cannot be written only costs time
        write_text(kept, digest)
    return digest


def read_json(path: Path) -> Any:
    """A JSON file; InputError where it cannot be read as one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
