"""How far a fragmented MP4 is complete on disk, read from its top-level boxes while ffmpeg still writes it.

ffmpeg writes one fragment (a `moof` box and its `mdat`) a frame, so complete fragments are frames that are safe: what
comes after the last of them is lost when ffmpeg dies, and has to be cut off before the file plays cleanly.
Source: ISO/IEC 14496-12, 4.2 (box header) and 8.8 (movie fragments).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path

_HEADER = struct.Struct(">I4s")
_LARGE_SIZE = struct.Struct(">Q")


class FragmentIndex:
    """Counts the complete fragments of a growing file; `update` reads only what is new.

    `frames`: complete fragments so far. `end`: the byte after the last of them (or after the `moov` box before them).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.frames = 0
        self.end = 0
        self._position = 0
        self._file = path.open("rb", buffering=0)

    def update(self) -> int:
        """Walk the boxes written since the last call and return the number of complete frames."""
        written = os.fstat(self._file.fileno()).st_size
        while (box := self._box_at(self._position, written)) is not None:
            kind, size = box
            self._position += size
            self.frames += kind == b"mdat"
            if kind in (b"moov", b"mdat"):
                self.end = self._position
        return self.frames

    def truncate(self) -> int:
        """Cut the file after its last complete frame and return the number of frames that it holds then."""
        self.update()
        os.truncate(self.path, self.end)
        return self.frames

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._file.close()

    def _box_at(self, position: int, written: int) -> tuple[bytes, int] | None:
        """Type and size in bytes of the box at `position`; None while it is not complete on disk."""
        if position + _HEADER.size > written:
            return None
        self._file.seek(position)
        header = self._file.read(_HEADER.size + _LARGE_SIZE.size)
        size, kind = _HEADER.unpack_from(header)
        if size == 1:
            if len(header) < _HEADER.size + _LARGE_SIZE.size:
                return None
            (size,) = _LARGE_SIZE.unpack_from(header, _HEADER.size)
        # Smaller than its own header: not a box (the zeros of a hole in the file). Nothing after it counts.
        if size < _HEADER.size or position + size > written:
            return None
        return kind, size
