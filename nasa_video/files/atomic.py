"""Files that are there whole or not at all, whatever ends the process that writes them.

with atomic_write(path) as part:
    save_file(tensors, part)
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nasa_video.errors import OutputError

# Containers may share a host's name and not see each other's processes; what is younger may be theirs.
_ORPHAN_SECONDS = 3600.0


@contextmanager
def atomic_write(path: Path, *, parents: bool = False, sweep: bool = False) -> Iterator[Path]:
    """Give a scratch path beside the file; after the block it is flushed to the disk and takes the file's name.

    The scratch name has the file's suffix, since libraries choose a format by it. A link is written through. A device
    or a FIFO is written to, never replaced. If the block fails, the file is as it was and no scratch is left.

    Args:
        parents: make its folder where that is missing.
        sweep: also remove scratch of this file that killed processes of this machine left.

    Raises:
        OutputError: it cannot be written.
    """
    with explained(path):
        path = path.resolve() if path.is_symlink() else path
        if path.exists() and not path.is_file():
            with _written_through(path) as part:
                yield part
            return
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        name = os.fsencode(path.name)[:80].decode(errors="ignore")  # a name of 255 bytes leaves no room for ours
        if sweep:
            remove_orphans(path.parent, f".{glob.escape(name)}.*.part*")
        part = path.with_name(f".{name}.{process_name()}.part{path.suffix[:20]}")
        try:
            yield part
            commit(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def _written_through(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="nasa-video-") as folder:
        part = Path(folder, f"part{path.suffix}")
        yield part
        with part.open("rb") as content, path.open("wb", buffering=0) as target:
            shutil.copyfileobj(content, target)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was; OutputError where it cannot be written."""
    with atomic_write(path, parents=True, sweep=True) as part:
        part.write_text(text, encoding="utf-8")


def commit(part: Path, path: Path) -> None:
    """Flush to the disk, then give the final name: after a power cut no name stands for half a file."""
    with explained(path):
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a failed write which file it was."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def is_whole(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is what was written."""
    try:
        return path.stat().st_size == size and file_sha256(path) == sha256
    except OSError:
        return False


def slug(text: str, words: int = 8, otherwise: str = "video") -> str:
    """The first words of a text as part of a file's name: lower-case letters and digits with hyphens between."""
    return "-".join(re.findall(r"[a-z0-9]+", text.lower())[:words])[:60].strip("-") or otherwise


def process_name() -> str:
    """``host-process-random``, for scratch that can be told from that of live processes."""
    return f"{_host()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def remove_orphans(root: Path, pattern: str = "*") -> None:
    """Remove scratch of processes of this machine that are no more; names end in :func:`process_name`."""
    for leftover in root.glob(pattern):
        found = re.search(rf"{_host()}-(\d+)-\w+(\.part[\w.]*)?$", leftover.name)
        if found is None or _runs(int(found[1])) or _age(leftover) < _ORPHAN_SECONDS:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname())[:64] or "host"


def _age(path: Path) -> float:
    """Seconds since a file or folder changed; 0 where it has just gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return 0.0


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
