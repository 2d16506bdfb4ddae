"""Reading videos: exactly the frames asked for, or an error that names the file."""

from pathlib import Path

import numpy as np
import pytest
from test_video_frames import assert_same_frames, make_clip

from nasa_video.errors import InputError
from nasa_video.files import ffmpeg
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.source import VideoInfo, VideoSource, probe, read_frames


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with FfmpegSink(path, 24000 / 1001) as sink:
        sink.write(make_clip(29, 48, 80))
    return path


def test_probe(video: Path) -> None:
    info = probe(video)
    assert (info.frames, info.width, info.height) == (29, 80, 48)
    assert info.fps == pytest.approx(23.976, abs=0.001)
    assert info == VideoInfo(29, info.fps, 80, 48)


def test_all_frames_and_a_part(video: Path) -> None:
    clip = make_clip(29, 48, 80)
    frames = read_frames(video)
    assert frames.dtype == np.uint8
    assert_same_frames(frames, clip)
    assert np.array_equal(read_frames(video, 11, 7), frames[11:18])
    assert np.array_equal(read_frames(video, start=28), frames[28:])
    source = VideoSource(video)
    assert np.array_equal(source.read(5, 1), frames[5:6])
    assert np.array_equal(source.read(2, 1), frames[2:3]), "a source can be read twice, also backwards"


@pytest.mark.parametrize(("start", "number"), [(0, 30), (29, None), (-1, 3), (5, 0), (28, 2)])
def test_more_than_there_is(video: Path, start: int, number: int | None) -> None:
    with pytest.raises(InputError, match="has 29 frames"):
        read_frames(video, start, number)


@pytest.mark.parametrize("size", [(48, 80), (24, 24), (96, 100), (31, 77), (64, 32)])
def test_size_covers_and_cuts_the_centre(video: Path, size: tuple[int, int]) -> None:
    frames = read_frames(video, 0, 2, size)
    assert frames.shape == (2, *size, 3)
    # Red grows from left to right and green downwards; the centre stays in the centre, whatever is cut.
    middle = frames[0, size[0] // 2, size[1] // 2].astype(int)
    assert abs(middle - make_clip(1, 48, 80)[0, 24, 40]).max() < 5
    # One side is seen whole: its colours reach both ends.
    red, green = frames[0, :, :, 0].astype(int), frames[0, :, :, 1].astype(int)
    assert max(red[:, -1].mean() - red[:, 0].mean(), green[-1].mean() - green[0].mean()) > 48


def test_impossible_size(video: Path) -> None:
    with pytest.raises(InputError, match="size must be at least"):
        read_frames(video, size=(0, 4))


def test_files_that_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(50_000))
    for name, message in [
        ("missing.mp4", "does not exist"),
        ("empty.mp4", r"empty \(0 bytes\)"),
        ("text.mp4", "no readable video"),
        ("noise.mp4", "no readable video"),
        ("", "is a folder"),
    ]:
        with pytest.raises(InputError, match=message):
            read_frames(tmp_path / name)


def test_sound_without_pictures(tmp_path: Path) -> None:
    ffmpeg.run(["-f", "lavfi", "-i", "sine", "-t", "0.5", str(tmp_path / "sound.m4a")])
    with pytest.raises(InputError, match="no readable video"):
        probe(tmp_path / "sound.m4a")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.9, 0.99])
def test_cut_files(video: Path, tmp_path: Path, share: float) -> None:
    content = video.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"cut, damaged|is damaged"):
        read_frames(cut)


def test_nothing_is_said_beside_the_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.mp4").write_text("no video\n" * 100)
    with pytest.raises(InputError):
        probe(tmp_path / "text.mp4")
    assert capfd.readouterr() == ("", "")
