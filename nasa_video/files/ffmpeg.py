"""Running ffmpeg: a short job to its end, or a long one that is fed frame by frame.

Every ffmpeg runs in a session of its own, so that Ctrl-C in a terminal reaches us alone and we can still let ffmpeg
finish the file; its diagnostics are always read (a full pipe would stop it) and its exit status is always looked at.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from nasa_video.errors import OutputError

_COMMON = ("-hide_banner", "-nostats", "-loglevel", "error")


class FfmpegError(OutputError):
    """ffmpeg is missing, could not start, failed, or was killed; the message has its last lines."""


def url(path: Path) -> str:
    """A file name as ffmpeg takes it: absolute and with its protocol, so that `-x.mp4` and `a:b.mp4` are files."""
    return f"file:{path.absolute()}"


def executable() -> str:
    """The ffmpeg binary that imageio-ffmpeg brings, or the one its IMAGEIO_FFMPEG_EXE names."""
    import imageio_ffmpeg

    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise FfmpegError(f"no ffmpeg binary: {error}") from error


def run(arguments: Iterable[str], stdin: bytes = b"") -> bytes:
    """Run ffmpeg to its end and return its standard output; FfmpegError if it fails."""
    command = [executable(), *_COMMON, *arguments]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, start_new_session=True, check=False)
    except OSError as error:
        raise FfmpegError(f"ffmpeg could not start: {error}") from error
    if done.returncode:
        raise FfmpegError(_describe(done.returncode, done.stderr.decode(errors="replace").splitlines()))
    return done.stdout


def count_frames(path: Path) -> int:
    """Number of video packets that `path` really holds; FfmpegError where a packet is cut or the file is none."""
    listing = run(["-xerror", "-i", url(path), "-map", "0:v:0", "-c", "copy", "-f", "framecrc", "pipe:1"])
    return sum(not line.startswith(b"#") for line in listing.splitlines())


class FfmpegProcess:
    """One running ffmpeg that takes raw frames on its standard input and encodes them.

    `source`, `target`: the options of its input and of its output. `ffmetadata`: tags of the output (as a file, because
    a command line cannot hold 128 kB). `pipe_stdout`: give its standard output as `stdout`.
    """

    def __init__(
        self, source: Sequence[str], target: Sequence[str], ffmetadata: bytes, *, pipe_stdout: bool = False
    ) -> None:
        self._lines: deque[str] = deque(maxlen=20)
        program = executable()
        self._tags = _temporary_file(ffmetadata)
        tags = ["-f", "ffmetadata", "-i", url(self._tags), "-map", "0:v:0", "-map_metadata", "1"]
        try:
            self._process = subprocess.Popen(
                [program, *_COMMON, *source, *tags, *target],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if pipe_stdout else subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        except OSError as error:
            self._tags.unlink()
            raise FfmpegError(f"ffmpeg could not start: {error}") from error
        self._stderr_reader = threading.Thread(target=self._read_stderr, name="ffmpeg stderr", daemon=True)
        self._stderr_reader.start()

    @property
    def stdout(self) -> IO[bytes]:
        """ffmpeg's standard output; only with `pipe_stdout`."""
        assert self._process.stdout is not None
        return self._process.stdout

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def feed(self, data: bytes) -> None:
        """Write all of `data`, waiting while ffmpeg is busy; FfmpegError if it has ended."""
        assert self._process.stdin is not None
        view = memoryview(data)
        try:
            while view:
                view = view[self._process.stdin.write(view) :]
        except BrokenPipeError as error:
            raise FfmpegError(self.ended()) from error

    def ended(self, timeout: float = 10) -> str:
        """Say why a process that closed its input early is gone (it is waited for, then killed)."""
        status = self.close(timeout)
        return _describe(status, self._lines)

    def finish(self) -> None:
        """End the input and wait until ffmpeg has written everything; FfmpegError if its exit status is not 0."""
        status = self.close(timeout=None)
        if status:
            raise FfmpegError(_describe(status, self._lines))

    def kill(self) -> None:
        """End ffmpeg at once; `close` is still to be called."""
        self._process.kill()

    def close(self, timeout: float | None) -> int:
        """End the input, wait up to `timeout` seconds, then kill; return the exit status. May be called twice."""
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
        except BaseException:  # A second Ctrl-C: leave at once, but leave no process behind.
            self._process.kill()
            self._process.wait()
            raise
        status = self._process.wait()
        self._stderr_reader.join()
        self._process.stderr.close()
        self._tags.unlink(missing_ok=True)
        return status

    def _read_stderr(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.append(line.decode(errors="replace").rstrip())


def _temporary_file(content: bytes) -> Path:
    """A file in the system's temporary folder; the caller removes it."""
    try:
        with tempfile.NamedTemporaryFile(prefix="nasa-video-", delete=False) as file:
            file.write(content)
    except OSError as error:
        raise FfmpegError(f"cannot write a temporary file: {error}") from error
    return Path(file.name)


def _describe(status: int, lines: Iterable[str]) -> str:
    """One sentence for an exit status (negative: the signal, as subprocess has it) and the end of the diagnostics."""
    said = [line for line in lines if line.strip()]
    if any("No space left on device" in line for line in said):
        return "the disk is full (ffmpeg: No space left on device)"
    if any("File too large" in line for line in said):
        return "the file may not grow further (ffmpeg: File too large)"
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"ffmpeg was killed by {signal.Signals(-status).name}"
    reason = f"ffmpeg stopped with status {status}"
    return f"{reason}: {' | '.join(said[-3:])}" if said else reason
