"""Fragmented MP4 to a stream: at once, whole, and never stuck."""

import inspect
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_video_files import decode
from test_video_frames import assert_same_frames, make_clip

from nasa_video.errors import OutputError
from nasa_video.files.live_sinks import StreamSink
from nasa_video.files.metadata import read_metadata
from nasa_video.files.sinks import open_sink


class Recorder(io.BytesIO):
    """Remembers when the bytes came."""

    def __init__(self) -> None:
        super().__init__()
        self.media = threading.Event()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if b"moof" in bytes(data):
            self.media.set()
        return super().write(data)


def test_the_stream_is_the_video(tmp_path: Path) -> None:
    clip = make_clip(30)
    target = io.BytesIO()
    with StreamSink(target, 16, {"prompt": "=;é\n"}) as sink:
        for start in range(0, 30, 7):
            sink.write(clip[start : start + 7])
    path = tmp_path / "stream.mp4"
    path.write_bytes(target.getvalue())
    assert_same_frames(decode(path), clip)
    assert read_metadata(path) == {"prompt": "=;é\n"}
    content = target.getvalue()
    assert content.index(b"moov") < content.index(b"moof")
    assert content[content.index(b"avcC") + 5] == 66, "the baseline profile, for MediaSource"


def test_media_comes_while_frames_are_made() -> None:
    target = Recorder()
    sink = StreamSink(target, 16)
    started = time.monotonic()
    sink.write(make_clip(3))
    assert target.media.wait(5), "nothing came before the end of the video"
    assert time.monotonic() - started < 3
    sink.finish()


def test_thousands_of_frames_do_not_stick(tmp_path: Path) -> None:
    target = io.BytesIO()
    clip = make_clip(30, 32, 32)
    with StreamSink(target, 30) as sink:
        for _ in range(100):
            sink.write(clip)
    (tmp_path / "long.mp4").write_bytes(target.getvalue())
    assert sink.num_frames == 3000
    assert len(decode(tmp_path / "long.mp4")) == 3000


def test_a_slow_reader_slows_the_writer() -> None:
    class Slow(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            time.sleep(0.01)
            return super().write(data)

    with StreamSink(Slow(), 16) as sink:
        sink.write(make_clip(40))
    assert sink.num_frames == 40


def test_a_reader_that_goes_away() -> None:
    reading, writing = os.pipe()
    sink = StreamSink(os.fdopen(writing, "wb"), 16)
    sink.write(make_clip(3))
    os.close(reading)
    with pytest.raises(OutputError, match=r"reader of the video stream went away after \d+ frames .*Broken pipe"):  # noqa: PT012
        for _ in range(200):
            sink.write(make_clip(10))
    assert sink.abort() is None


def test_a_reader_that_goes_away_at_the_end() -> None:
    class Gone(io.BytesIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            raise ConnectionResetError("the client closed the page")

    sink = StreamSink(Gone(), 16)
    with pytest.raises(OutputError, match=r"went away after .*the client closed the page"):  # noqa: PT012
        sink.write(make_clip(1))
        sink.finish()


def test_abort_ends_the_stream_playably(tmp_path: Path) -> None:
    target = io.BytesIO()
    with pytest.raises(KeyboardInterrupt), StreamSink(target, 16) as sink:  # noqa: PT012
        sink.write(make_clip(9))
        raise KeyboardInterrupt
    (tmp_path / "a.mp4").write_bytes(target.getvalue())
    assert len(decode(tmp_path / "a.mp4")) == 9


def test_a_terminal_is_refused() -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    with pytest.raises(OutputError, match="does not go to a terminal"):
        StreamSink(Terminal(), 16)


SCRIPT = """
import numpy as np
{helper}
from nasa_video.files.sinks import open_sink
with open_sink("-", 16) as sink:
    for _ in range({chunks}):
        sink.write(make_clip(10))
"""


def run_to_stdout(chunks: int, stdout: int) -> subprocess.Popen[bytes]:
    script = SCRIPT.format(helper=inspect.getsource(make_clip), chunks=chunks)
    return subprocess.Popen([sys.executable, "-c", script], stdout=stdout, stderr=subprocess.PIPE)


def test_standard_output(tmp_path: Path) -> None:
    process = run_to_stdout(5, subprocess.PIPE)
    content, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, b"")
    (tmp_path / "a.mp4").write_bytes(content)
    assert len(decode(tmp_path / "a.mp4")) == 50


def test_standard_output_closed_early() -> None:
    """As in `nasa-video generate … -o - | head`: one error, and none more when the interpreter ends."""
    process = run_to_stdout(2000, subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(100)
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 1
    assert b"OutputError: the reader of the video stream went away" in errors
    assert b"Exception ignored" not in errors


def test_open_sink_streams(capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    with open_sink("-", 16) as sink:
        assert isinstance(sink, StreamSink)
        sink.write(make_clip(4))
    assert capsysbinary.readouterr().out[4:8] == b"ftyp"
