"""Files that are there whole or not at all, whatever ends the process that writes them."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from nasa_video.errors import OutputError

# Containers may share a host's name and not see each other's processes; what is younger may be theirs.
_ORPHAN_SECONDS = 3600.0


def write_atomically(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or as it was.

    Raises:
        OutputError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.{host_name()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_orphans(path.parent, f".{glob.escape(path.name)}.*.part")
        try:
            part.write_text(text, encoding="utf-8")
            settle(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Say of a failed write which file it was."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}") from error


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, 64 hex digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def settle(part: Path, path: Path) -> None:
    """Flush to the disk, then give the final name: after a power cut no name stands for half a file."""
    with explained(path):
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)


def is_whole(path: Path, size: int, sha256: str | None) -> bool:
    """Whether a file is what was written."""
    try:
        return path.stat().st_size == size and file_sha256(path) == sha256
    except OSError:
        return False


def host_name() -> str:
    """This machine's name, as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname()) or "host"


def remove_orphans(root: Path, pattern: str = "*") -> None:
    """Remove scratch of processes of this machine that are no more; names end in ``host-process-…``."""
    for leftover in root.glob(pattern):
        found = re.search(rf"{host_name()}-(\d+)-\w+(\.part)?$", leftover.name)
        if found is None or _runs(int(found[1])) or _age(leftover) < _ORPHAN_SECONDS:
            continue
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


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
