"""Settings that a file carries: they come back, whatever is in them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_video_frames import make_clip

from nasa_video.errors import InputError
from nasa_video.files import ffmpeg
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.metadata import from_ffmetadata, read_metadata, to_ffmetadata, to_json

NASTY = {
    "prompt": 'a=b; # \\ "quoted" \r\n[STREAM]\n;FFMETADATA1\ncomment=no\\',
    "unicode": "赤いボール 🎈 é \u202e \x00 \x7f \ud800",
    "number": 0.1,
    "list": [1, None, True, {"deep": "ü"}],
}


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_ffmetadata_is_undone(text: str) -> None:
    comment = to_json({"text": text})
    assert from_ffmetadata(to_ffmetadata(comment)) == comment


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("metadata", [NASTY, {"long": "=;#\\\n é" * 14_000}, {}], ids=["nasty", "long", "empty"])
def test_round_trip(tmp_path: Path, suffix: str, metadata: dict[str, object]) -> None:
    path = tmp_path / f"a{suffix}"
    with FfmpegSink(path, 16, metadata) as sink:
        sink.write(make_clip(2))
    assert read_metadata(path) == metadata
    assert ffmpeg.count_frames(path) == 2


def test_other_programs_find_the_json(tmp_path: Path) -> None:
    with FfmpegSink(tmp_path / "a.mp4", 16, {"prompt": "a red ball"}) as sink:
        sink.write(make_clip(2))
    assert json.dumps({"prompt": "a red ball"}).encode() in (tmp_path / "a.mp4").read_bytes()


def test_what_is_known_only_at_the_end(tmp_path: Path) -> None:
    for suffix in (".mp4", ".webm", ".gif"):
        with FfmpegSink(tmp_path / f"a{suffix}", 16, {"seed": 1}) as sink:
            sink.write(make_clip(2))
            sink.metadata["effect"] = 0.5
        assert read_metadata(tmp_path / f"a{suffix}") == {"seed": 1, "effect": 0.5}


def test_the_partial_file_has_it_too(tmp_path: Path) -> None:
    sink = FfmpegSink(tmp_path / "a.mp4", 16, NASTY)
    sink.write(make_clip(2))
    assert read_metadata(sink.abort()) == NASTY


def test_files_of_others(tmp_path: Path) -> None:
    ffmpeg.run(["-f", "lavfi", "-i", "color", "-t", "0.2", "-metadata", "comment=hello", str(tmp_path / "other.mp4")])
    assert read_metadata(tmp_path / "other.mp4") == {}
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "text.gif").write_text("no video")
    for name in ("text.mp4", "text.gif", "missing.mp4", ""):
        with pytest.raises(InputError, match=r"not a video|not a GIF|does not exist|no readable"):
            read_metadata(tmp_path / name)


def test_values_that_json_cannot_hold_fail_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        FfmpegSink(tmp_path / "a.mp4", 16, {"path": tmp_path})
