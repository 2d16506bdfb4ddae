"""What goes wrong while a video is made: the frames made are kept, playable, and never under the final name."""

import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from test_video_files import decode
from test_video_frames import assert_same_frames, make_clip

from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.ffmpeg_sink import FfmpegSink, FragmentIndex
from nasa_video.files.metadata import read_metadata
from nasa_video.files.sinks import open_sink


def kill_encoder(sink: FfmpegSink) -> None:
    assert sink._capture is not None
    os.kill(sink._capture.process.pid, signal.SIGKILL)
    sink._capture.process._process.wait()


@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_exception_keeps_every_frame(tmp_path: Path, suffix: str, error: type[BaseException]) -> None:
    clip = make_clip(37)
    sink = FfmpegSink(tmp_path / f"a{suffix}", 16, {"seed": 7})
    with pytest.raises(error) as caught, sink:  # noqa: PT012
        sink.write(clip[:20])
        sink.write(clip[20:])
        raise error
    partial = tmp_path / f"a.partial{suffix}"
    assert os.listdir(tmp_path) == [partial.name]
    assert_same_frames(decode(partial), clip)
    assert sink.abort() == partial
    assert read_metadata(partial) == {"seed": 7}
    assert caught.value.__notes__ == [f"37 frames made so far are kept in {partial}"]


def test_gif_is_kept_as_gif(tmp_path: Path) -> None:
    sink = FfmpegSink(tmp_path / "a.gif", 16)
    sink.write(make_clip(5))
    assert sink.abort() == tmp_path / "a.partial.gif"
    assert ffmpeg.count_frames(tmp_path / "a.partial.gif") == 5


def test_what_an_earlier_run_left_is_not_replaced(tmp_path: Path) -> None:
    for length in (5, 3):
        sink = FfmpegSink(tmp_path / "a.webm", 16)
        sink.write(make_clip(length))
        sink.abort()
    assert sorted(os.listdir(tmp_path)) == ["a.partial.webm", "a.partial2.webm"]
    assert [ffmpeg.count_frames(tmp_path / f"a.partial{number}.webm") for number in ("", "2")] == [5, 3]


def test_nothing_made_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), FfmpegSink(tmp_path / "a.mp4", 16):
        raise KeyboardInterrupt
    with pytest.raises(OutputError, match="no frames were made"), FfmpegSink(tmp_path / "a.mp4", 16):
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("suffix", [".mp4", ".webm"])
def test_ffmpeg_killed_midway(tmp_path: Path, suffix: str, size: int) -> None:
    """Small frames wait in the pipe and in ffmpeg's queues when it dies: they are encoded again from memory."""
    clip = make_clip(60, size, size)
    sink = FfmpegSink(tmp_path / f"a{suffix}", 16, {"seed": 7})
    with pytest.raises(OutputError, match=r"ffmpeg was killed by SIGKILL; 60 frames are kept in .*partial"), sink:  # noqa: PT012
        sink.write(clip[:40])
        kill_encoder(sink)
        sink.write(clip[40:])
        sink.finish()
    partial = tmp_path / f"a.partial{suffix}"
    assert os.listdir(tmp_path) == [partial.name]
    assert_same_frames(decode(partial), clip)
    assert read_metadata(partial) == {"seed": 7}


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_ffmpeg_killed_after_the_last_frame(tmp_path: Path, suffix: str) -> None:
    sink = FfmpegSink(tmp_path / f"a{suffix}", 16)
    sink.write(make_clip(30))
    time.sleep(0.2)
    kill_encoder(sink)
    with pytest.raises(OutputError, match="SIGKILL; 30 frames are kept"):
        sink.finish()
    assert os.listdir(tmp_path) == [f"a.partial{suffix}"]
    assert ffmpeg.count_frames(tmp_path / f"a.partial{suffix}") == 30
    assert sink.finish() == tmp_path / f"a.partial{suffix}", "finish after a failure must not hide what was kept"


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_full_disk_midway(small_disk: Path, suffix: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)
    sink = FfmpegSink(small_disk / f"a{suffix}", 16)
    with pytest.raises(OutputError, match=r"disk is full .* frames are kept in") as caught, sink:  # noqa: PT012
        for _ in range(40):
            sink.write(noise)
    kept = [small_disk / name for name in os.listdir(small_disk)]
    assert len(kept) == 1
    assert kept[0].stem == "a.partial"
    assert str(kept[0]) in str(caught.value)
    playable = len(decode(kept[0]))
    assert 2 < playable < 480
    assert f"{playable} frames are kept" in str(caught.value)


def test_disk_too_full_for_the_last_step(small_disk: Path) -> None:
    """The capture fits, its copy into the final file does not."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 128, 128, 3), dtype=np.uint8)
    with FfmpegSink(small_disk / "size.mp4", 16) as trial:
        trial.write(noise)
    used = (small_disk / "size.mp4").stat().st_size
    (small_disk / "size.mp4").unlink()
    room = 512 * 1024 - used * 3 // 2
    assert room > 0, "the clip is too large for this test"
    (small_disk / "ballast").write_bytes(bytes(room))
    with pytest.raises(OutputError, match="12 frames are kept"), FfmpegSink(small_disk / "a.mp4", 16) as sink:
        sink.write(noise)
    assert sorted(os.listdir(small_disk)) == ["a.partial.mp4", "ballast"]
    assert len(decode(small_disk / "a.partial.mp4")) == 12


def test_full_disk_is_found_before_the_work(small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(512 * 1024))
    with pytest.raises(OutputError, match=r"cannot write in .*No space left"):
        open_sink(small_disk / "a.mp4", 16)
    with pytest.raises(OutputError, match="No space left"):
        open_sink(f"{small_disk}/", 16)


def test_full_disk_in_a_folder_of_frames(small_disk: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)
    with pytest.raises(OutputError, match=r"No space left.* frames are kept"), open_sink(f"{small_disk}/", 16) as sink:
        sink.write(noise)
    assert sorted(os.listdir(small_disk)) == [f"{index:06d}.png" for index in range(sink.num_frames)]
    assert 0 < sink.num_frames < 20


# The helper's source rather than its module: importing torch would take most of the time.
HELPER = "import numpy as np\n" + inspect.getsource(make_clip)
CHILD = """
import sys, time
{helper}
from nasa_video.files.sinks import open_sink
with open_sink({path!r}, 16) as sink:
    sink.write(make_clip(25))
    print("ready", flush=True)
    for index in range(10**6):
        sink.write(make_clip(1, first=25 + index))
        time.sleep(0.005)
"""


def start_child(path: Path) -> subprocess.Popen[bytes]:
    script = CHILD.format(helper=HELPER, path=str(path))
    temporary = path.parent.with_name(
        path.parent.name + "-temporary"
    )  # A killed Python leaves its temporary files behind.
    temporary.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(temporary)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


@pytest.mark.parametrize("delay", [0.0, 0.031, 0.1])
def test_ctrl_c_in_a_terminal(tmp_path: Path, delay: float) -> None:
    """The terminal sends SIGINT to the whole process group; ffmpeg must not die of it."""
    child = start_child(tmp_path / "a.mp4")
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGINT)
    _, errors = child.communicate(timeout=20)
    assert child.returncode != 0
    assert b"KeyboardInterrupt" in errors
    assert b"frames made so far are kept in" in errors
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    frames = decode(tmp_path / "a.partial.mp4")
    assert len(frames) >= 25
    assert_same_frames(frames, make_clip(len(frames)))


def test_python_itself_killed(tmp_path: Path) -> None:
    """No one is left to tidy up, but the frames play."""
    child = start_child(tmp_path / "a.mp4")
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate(timeout=20)
    time.sleep(0.5)
    assert os.listdir(tmp_path) == ["a.part.mp4"]
    assert len(decode(tmp_path / "a.part.mp4")) >= 24


def test_second_ctrl_c_while_the_first_is_handled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    sink = FfmpegSink(tmp_path / "a.webm", 16)
    sink.write(make_clip(20))
    monkeypatch.setattr(sink, "_keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sink.abort()
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    assert len(decode(tmp_path / "a.partial.mp4")) == 20


def test_a_converter_that_loses_frames_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = FfmpegSink(tmp_path / "a.mp4", 16)
    sink.write(make_clip(20))
    monkeypatch.setattr(ffmpeg, "count_frames", lambda path: 19)
    with pytest.raises(OutputError, match="has 19 frames instead of 20; 20 frames are kept"):
        sink.finish()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a.partial.mp4"]
    assert ffmpeg.count_frames(tmp_path / "a.partial.mp4") == 20


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("none/a.mp4", "folder .*none does not exist; create it or choose another -o"),
        ("none/deep/", "folder .*none does not exist"),
        ("a.avi", r"must end in \.mp4, \.webm, \.gif, or in / for a folder"),
        ("a", r"must end in \.mp4"),
        ("folder.mp4/x.mp4/a.mp4", "does not exist"),
        ("file/a.mp4", "is not a folder"),
        ("x" * 300 + ".mp4", "File name too long"),
        ("file/", "is not a folder"),
    ],
)
def test_errors_before_anything_is_generated(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=message):
        open_sink(f"{tmp_path}/{target}", 16)
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("stem", ["x" * 251, "漢" * 83, "é" * 125])
def test_a_name_that_is_just_short_enough(tmp_path: Path, stem: str) -> None:
    """What lies beside the video while it is made has a longer ending than its own."""
    for end in ("finish", "abort"):
        sink = FfmpegSink(tmp_path / f"{stem}.mp4", 16)
        sink.write(make_clip(3))
        kept = getattr(sink, end)()
        assert kept is not None
        assert len(decode(kept)) == 3
    assert len(os.listdir(tmp_path)) == 2


def test_two_runs_with_one_stem_keep_their_frames(tmp_path: Path) -> None:
    sinks = [FfmpegSink(tmp_path / f"a{suffix}", 16) for suffix in (".mp4", ".webm")]
    sinks[1].write(make_clip(3))
    sinks[0].write(make_clip(5))
    assert [len(decode(sink.finish() or tmp_path)) for sink in sinks] == [5, 3]
    late = FfmpegSink(tmp_path / "b.mp4", 16)
    first = FfmpegSink(tmp_path / "b.webm", 16)
    first.write(make_clip(3))
    late.abort()  # made nothing, and takes nothing of the other's away
    assert len(decode(first.finish() or tmp_path)) == 3


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(OutputError, match="a device or a pipe"):
        FfmpegSink(tmp_path / "a.mp4", 16)
    (tmp_path / "real.mp4").touch()
    (tmp_path / "link.mp4").symlink_to("real.mp4")
    with FfmpegSink(tmp_path / "link.mp4", 16) as sink:
        sink.write(make_clip(3))
    assert (tmp_path / "link.mp4").is_symlink()
    assert len(decode(tmp_path / "real.mp4")) == 3


def test_a_folder_with_a_videos_name(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OutputError, match="is a folder; end -o in /"):
        FfmpegSink(tmp_path / "a.mp4", 16)
    assert open_sink(tmp_path / "a.mp4", 16).finish is not None


def test_read_only_folder(tmp_path: Path) -> None:
    """A read-only mount, since permission bits do not stop root."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount")
    try:
        for target in (f"{disk}/a.mp4", f"{disk}/", f"{disk}/new/"):
            with pytest.raises(OutputError, match=r"cannot write in .*Read-only file system; choose another -o"):
                open_sink(target, 16)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize(("fps", "suffix"), [(0, ".mp4"), (-1, ".mp4"), (float("nan"), ".mp4"), (60, ".gif")])
def test_impossible_rates(tmp_path: Path, fps: float, suffix: str) -> None:
    with pytest.raises(OutputError, match=r"frames a second|fps must be"):
        FfmpegSink(tmp_path / f"a{suffix}", fps)


def test_impossible_scale(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="scale must be a whole number from 1 to 16, got 0"):
        FfmpegSink(tmp_path / "a.mp4", 16, scale=0)


def test_no_ffmpeg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffmpeg, "executable", lambda: str(tmp_path / "no-ffmpeg"))
    with pytest.raises(OutputError, match="ffmpeg could not start"), FfmpegSink(tmp_path / "a.mp4", 16) as sink:
        sink.write(make_clip(2))
    assert os.listdir(tmp_path) == []


def test_fragments_of_a_file_cut_anywhere(tmp_path: Path) -> None:
    sink = FfmpegSink(tmp_path / "a.mp4", 16)
    sink.write(make_clip(12))
    assert sink._capture is not None
    sink._capture.process.finish()
    whole = sink._capture.path.read_bytes()
    cut = tmp_path / "cut.mp4"
    counts = []
    for length in range(0, len(whole), 997):
        cut.write_bytes(whole[:length])
        index = FragmentIndex(cut)
        counts.append(index.truncate())
        index.close()
        assert cut.stat().st_size <= length
        if counts[-1]:
            assert ffmpeg.count_frames(cut) == counts[-1]
    assert counts == sorted(counts)
    assert counts[-1] >= 11
    sink.finish()
