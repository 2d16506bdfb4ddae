"""Files that ffmpeg writes: what is in them, and what never is."""

import os
import threading
from pathlib import Path

import decord
import numpy as np
import psutil
import pytest
from PIL import Image
from test_video_frames import assert_same_frames, make_clip

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.ffmpeg_sink import FfmpegSink
from nasa_video.files.metadata import read_metadata
from nasa_video.files.sinks import FramesSink, open_sink


def decode(path: Path) -> np.ndarray:
    reader = decord.VideoReader(str(path), num_threads=1)
    return reader.get_batch(range(len(reader))).asnumpy()


def gif_frames(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        frames = []
        for index in range(image.n_frames):
            image.seek(index)
            frames.append(np.asarray(image.convert("RGB")))
    return np.stack(frames)


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("num_frames", "chunk"), [(1, 1), (2, 1), (33, 12), (81, 81)])
def test_every_frame_arrives_in_order(tmp_path: Path, suffix: str, num_frames: int, chunk: int) -> None:
    clip = make_clip(num_frames)
    path = tmp_path / f"clip{suffix}"
    with FfmpegSink(path, 16) as sink:
        for start in range(0, num_frames, chunk):
            sink.write(clip[start : start + chunk])
            assert not path.exists()
    assert_same_frames(decode(path), clip)
    assert decord.VideoReader(str(path), num_threads=1).get_avg_fps() == pytest.approx(16, abs=0.01)
    assert os.listdir(tmp_path) == [path.name]


def test_still_pictures_are_not_dropped(tmp_path: Path) -> None:
    still = np.repeat(make_clip(1), 20, axis=0)
    for suffix in (".mp4", ".webm", ".gif"):
        with FfmpegSink(tmp_path / f"still{suffix}", 16) as sink:
            sink.write(still)
        assert ffmpeg.count_frames(tmp_path / f"still{suffix}") == 20


def test_gif_has_every_frame_and_its_odd_size(tmp_path: Path) -> None:
    clip = make_clip(10, 33, 47)
    with FfmpegSink(tmp_path / "clip.gif", 10) as sink:
        sink.write(clip)
    assert_same_frames(gif_frames(tmp_path / "clip.gif"), clip, tolerance=6)
    with Image.open(tmp_path / "clip.gif") as image:
        assert image.info["duration"] == 100
        assert image.info["loop"] == 0


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize(("height", "width"), [(63, 64), (64, 65), (31, 33), (15, 17)])
def test_odd_sizes_repeat_the_edge(tmp_path: Path, suffix: str, height: int, width: int) -> None:
    clip = make_clip(5, height, width)
    with FfmpegSink(tmp_path / f"odd{suffix}", 16) as sink:
        sink.write(clip)
    expected = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    assert_same_frames(decode(tmp_path / f"odd{suffix}"), expected)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_one_pixel(tmp_path: Path, suffix: str) -> None:
    with FfmpegSink(tmp_path / f"one{suffix}", 16) as sink:
        sink.write(make_clip(3, 1, 1))
    assert ffmpeg.count_frames(tmp_path / f"one{suffix}") == 3


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_brightness_does_not_drift(tmp_path: Path, suffix: str) -> None:
    """Decoded with rounding, unlike decord, so that what the encoding itself does is seen."""
    clip = make_clip(30)
    with FfmpegSink(tmp_path / f"a{suffix}", 16) as sink:
        sink.write(clip)
    exactly = ["-vf", "scale=flags=accurate_rnd+full_chroma_int,format=rgb24", "-f", "rawvideo", "pipe:1"]
    raw = ffmpeg.run(["-i", str(tmp_path / f"a{suffix}"), *exactly])
    differences = np.frombuffer(raw, np.uint8).reshape(clip.shape).astype(int) - clip
    assert np.abs(differences.mean(axis=(0, 1, 2))).max() < 1
    assert np.abs(differences).mean() < 1.5


def test_primary_colours_survive(tmp_path: Path) -> None:
    """A wrong colour matrix turns green by some 20 levels; it shows only in saturated colours."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)], np.uint8)
    flat = np.broadcast_to(colours[:, None, None], (5, 64, 64, 3))
    for suffix in (".mp4", ".webm"):
        with FfmpegSink(tmp_path / f"flat{suffix}", 5) as sink:
            sink.write(flat)
        assert np.abs(decode(tmp_path / f"flat{suffix}").astype(int) - flat).max() <= 4


def test_mp4_plays_everywhere_and_from_the_start(tmp_path: Path) -> None:
    with FfmpegSink(tmp_path / "a.mp4", 16) as sink:
        sink.write(make_clip(5))
    content = (tmp_path / "a.mp4").read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    assert b"moof" not in content
    # avcC: version 1, then the profile: High (4:2:0, 8 bits).
    assert content[content.index(b"avcC") + 5] == 100


@pytest.mark.parametrize("upscale", ["lanczos", "nearest"])
def test_scale(tmp_path: Path, upscale: str) -> None:
    clip = make_clip(3, 33, 31)
    with FfmpegSink(tmp_path / "big.mp4", 16, scale=4, upscale=upscale) as sink:
        sink.write(clip)
    big = decode(tmp_path / "big.mp4")
    assert big.shape == (3, 132, 124, 3)
    assert_same_frames(big[:, 2::4, 2::4], clip)


def test_nearest_keeps_hard_pixels(tmp_path: Path) -> None:
    checks = np.zeros((2, 8, 8, 3), np.uint8)
    checks[:, ::2, ::2] = checks[:, 1::2, 1::2] = 255
    values = {}
    for upscale in ("lanczos", "nearest"):
        with FfmpegSink(tmp_path / f"{upscale}.mp4", 16, scale=16, upscale=upscale, crf=4) as sink:
            sink.write(checks)
        values[upscale] = decode(tmp_path / f"{upscale}.mp4")
    grey = {upscale: ((video > 40) & (video < 215)).mean() for upscale, video in values.items()}
    assert grey["nearest"] < 0.02
    assert grey["lanczos"] > 0.2


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    sink = FfmpegSink(path, 16)
    sink.write(make_clip(4))
    assert path.read_bytes() == b"old"
    sink.finish()
    assert len(decode(path)) == 4
    assert sink.finish() == path == sink.abort()


def test_two_runs_to_one_name_do_not_mix(tmp_path: Path) -> None:
    first, second = FfmpegSink(tmp_path / "a.mp4", 16), FfmpegSink(tmp_path / "a.mp4", 16)
    first.write(make_clip(4))
    second.write(make_clip(7))
    first.finish()
    assert len(decode(tmp_path / "a.mp4")) == 4
    second.finish()
    assert len(decode(tmp_path / "a.mp4")) == 7
    assert os.listdir(tmp_path) == ["a.mp4"]


@pytest.mark.parametrize("name", ["-n.mp4", "a:b.mp4", "it's 100% [x] é.mp4", "a\\b.mp4", "A.MP4"])
def test_strange_names(tmp_path: Path, name: str) -> None:
    with FfmpegSink(tmp_path / name, 16, {"name": name}) as sink:
        sink.write(make_clip(3))
    assert os.listdir(tmp_path) == [name]
    assert read_metadata(tmp_path / name) == {"name": name}


def test_frames_sink(tmp_path: Path) -> None:
    clip = make_clip(11, 9, 7)
    with open_sink(f"{tmp_path}/new/", 16, {"fps": "mine", "prompt": "é\n"}) as sink:
        sink.write(clip[:5])
        assert not (tmp_path / "new" / "metadata.json").exists()
        sink.write(clip[5:])
    files = sorted(os.listdir(tmp_path / "new"))
    assert files == [*(f"{index:06d}.png" for index in range(11)), "metadata.json"]
    assert np.array_equal(np.stack([np.asarray(Image.open(tmp_path / "new" / name)) for name in files[:-1]]), clip)
    assert read_metadata(tmp_path / "new") == {"fps": "mine", "prompt": "é\n"}
    with pytest.raises(OutputError, match="already holds frames"):
        FramesSink(tmp_path / "new", 16)


def test_aborted_frames_stay_without_metadata(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, open_sink(f"{tmp_path}/new/", 16) as sink:  # noqa: PT012
        sink.write(make_clip(3))
        raise KeyboardInterrupt
    assert sorted(os.listdir(tmp_path / "new")) == ["000000.png", "000001.png", "000002.png"]
    assert "3 frames made so far are kept in" in caught.value.__notes__[0]
    with pytest.raises(OutputError, match="no frames"), open_sink(f"{tmp_path}/none/", 16):
        pass
    assert not (tmp_path / "none").exists()


def test_frames_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one size"), FfmpegSink(tmp_path / "a.mp4", 16) as sink:  # noqa: PT012
        sink.write(make_clip(3))
        sink.write(make_clip(3, 32, 64))
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    with pytest.raises(OutputError, match="has ended"):
        sink.write(make_clip(3))


def test_nothing_leaks(tmp_path: Path) -> None:
    def census() -> tuple[int, int, int]:
        process = psutil.Process()
        return process.num_fds(), threading.active_count(), len(process.children(recursive=True))

    def use(number: int) -> None:
        sink = open_sink(tmp_path / f"{number}.mp4", 16, {"n": number})
        sink.write(make_clip(3))
        sink.finish() if number % 2 else sink.abort()

    use(0)
    before = census()
    temporary = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("nasa-video-*"))
    for number in range(1, 20):
        use(number)
    assert census() == before
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("nasa-video-*")) <= temporary
    assert len(os.listdir(tmp_path)) == 20


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_the_same_frames_and_metadata_are_the_same_file(tmp_path: Path, suffix: str) -> None:
    for name in "ab":
        with FfmpegSink(tmp_path / f"{name}{suffix}", 12, {"prompt": "a ball"}) as sink:
            sink.write(make_clip(20))
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
