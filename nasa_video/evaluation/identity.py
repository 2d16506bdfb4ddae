"""What a model is made of, as one digest: which weights a score belongs to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path

from nasa_video.errors import OutputError
from nasa_video.files.atomic import file_sha256, write_text
from nasa_video.models.download import missing
from nasa_video.models.presets import VideoPreset
from nasa_video.text.embedding_cache import FOLDER_VARIABLE

_log = logging.getLogger(__name__)


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
