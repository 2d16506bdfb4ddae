"""What made a video, kept inside the file: one JSON object under the `comment` tag.

MP4 and WebM take it through ffmpeg's metadata format (escaped `=`, `;`, `#`, `\\` and line ends), GIF as a comment
extension, a folder of frames as `metadata.json`. The JSON is plain ASCII: a prompt may hold anything, also halves of
surrogate pairs, and every container carries it unchanged.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from nasa_video.errors import InputError
from nasa_video.files import ffmpeg

METADATA_FILE = "metadata.json"
_FFMETADATA_HEADER = b";FFMETADATA1"
_GIF_COMMENT = b"\x21\xfe"


def to_json(metadata: Mapping[str, Any]) -> str:
    """One line of ASCII; ValueError or TypeError for what JSON cannot hold."""
    return json.dumps(dict(metadata))


def to_ffmetadata(comment: str) -> bytes:
    """A metadata file for ffmpeg with `comment` as its only tag."""
    escaped = re.sub(r"([=;#\\\n])", r"\\\1", comment)
    return _FFMETADATA_HEADER + b"\ncomment=" + escaped.encode() + b"\n"


def from_ffmetadata(dump: bytes) -> str | None:
    """The comment in ffmpeg's metadata dump (Matroska spells the tag in capitals); None without one."""
    # A tag ends at the first line end that no backslash escapes.
    found = re.search(rb"^comment=((?:\\.|[^\\\n])*)", dump, re.IGNORECASE | re.MULTILINE | re.DOTALL)
    return re.sub(r"\\(.)", r"\1", found[1].decode(errors="replace"), flags=re.DOTALL) if found else None


def copy_gif_with_comment(source: IO[bytes], target: IO[bytes], comment: str) -> None:
    """Copy a GIF and put `comment` (ASCII) behind its global colour table, since ffmpeg writes no GIF comments.

    Source: GIF89a specification, sections 18 (logical screen descriptor) and 24 (comment extension).
    """
    start = source.read(13)
    flags = start[10]
    if flags & 0x80:
        start += source.read(3 << ((flags & 7) + 1))
    text = comment.encode("ascii")
    blocks = (text[i : i + 255] for i in range(0, len(text), 255))
    target.write(start + _GIF_COMMENT + b"".join(bytes([len(block)]) + block for block in blocks) + b"\0")
    shutil.copyfileobj(source, target)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Read back what a sink stored in `path`, a video file or a folder of frames.

    Returns {} for a video without our JSON object (made by another program). InputError where there is no such file, or
    it is no video.
    """
    path = Path(path)
    if path.is_dir():
        return dict(_parse(_read_folder(path)).get("metadata", {}))
    if not path.is_file():
        raise InputError(f"{path} does not exist, so there are no settings to read from it")
    comment = _read_gif(path) if path.suffix.lower() == ".gif" else _read_container(path)
    return _parse(comment)


def _parse(text: str | None) -> dict[str, Any]:
    try:
        parsed = json.loads(text or "{}")
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _read_folder(folder: Path) -> str:
    try:
        return (folder / METADATA_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder} has no readable {METADATA_FILE}: the frames are not ours or incomplete") from error


def _read_gif(path: Path) -> str | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            comment = image.info.get("comment")
    except (OSError, UnidentifiedImageError) as error:
        raise InputError(f"{path} is not a GIF that can be read: {error}") from error
    return comment.decode("latin-1") if isinstance(comment, bytes) else None


def _read_container(path: Path) -> str | None:
    try:
        dump = ffmpeg.run(["-i", ffmpeg.url(path), "-f", "ffmetadata", "pipe:1"])
    except ffmpeg.FfmpegError as error:
        raise InputError(f"{path} is not a video that can be read: {error}") from error
    return from_ffmetadata(dump)
