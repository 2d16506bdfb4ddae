"""Window, sink and positions by choice; hours of video in the same memory."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nasa_video import Nasa, VideoPipeline
from nasa_video.errors import InputError
from nasa_video.files.sinks import open_sink
from nasa_video.files.source import read_frames
from nasa_video.video.engine import InitialLatents

Run = Callable[..., Any]
MODEL = ("--model", "{model}")
STAR = ("generate", "a red star", "--frames", "45", *MODEL)


def test_a_window_by_choice_acts_when_it_is_reached_and_comes_back_with_from(nasa_video: Run) -> None:
    choices = {
        "never-reached": ("--window", "15", "--sink", "0", "--rope", "absolute"),
        "none": ("--window", "0", "--rope", "absolute"),
        "six": ("--window", "6", "--sink", "0", "--rope", "absolute"),
        "six-inside": ("--window", "6", "--sink", "0", "--rope", "window"),
        "sink": ("--window", "6", "--sink", "3", "--rope", "absolute"),
        "sink-inside": ("--window", "6", "--sink", "3", "--rope", "window"),
    }
    videos = {}
    for name, options in choices.items():
        done = nasa_video(*STAR, *options, "-o", f"{name}.mp4")
        assert done.status == 0, done.stderr
        videos[name] = read_frames(f"{name}.mp4")
    assert np.array_equal(videos["none"], videos["never-reached"]), "full attention"
    reached = 21  # two chunks fit into six latent frames
    for name in ("six", "six-inside", "sink", "sink-inside"):
        # The pictures are compressed together, so that those before a change may differ a little.
        before = np.abs(videos[name][:reached].astype(int) - videos["none"][:reached]).mean()
        assert before < 1
        assert not np.array_equal(videos[name][reached:], videos["none"][reached:])
    # Attention sees differences of positions: without a sink both ways of counting are one, with a sink they are not.
    assert np.abs(videos["six"].astype(int) - videos["six-inside"]).mean() < 0.5
    assert not np.array_equal(videos["sink"], videos["sink-inside"])
    assert not np.array_equal(videos["six"], videos["sink"])
    assert nasa_video("generate", "--from", "sink-inside.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path("sink-inside.mp4").read_bytes()
    assert nasa_video("generate", "--from", "sink-inside.mp4", "--rope", "absolute", "-o", "other.mp4").status == 0
    assert np.array_equal(read_frames("other.mp4"), videos["sink"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window", "2"], "has no room for a chunk of 3"),
        (["--window", "5", "--sink", "3"], "a window of at least 6"),
        (["--window", "0", "--sink", "3"], "needs a window"),
        (["--rope", "round"], "--rope must be absolute or window"),
    ],
)
def test_a_window_that_cannot_be_is_refused(nasa_video: Run, options: list[str], message: str) -> None:
    done = nasa_video(*STAR, "--sink", "0", *options, "-o", "a.mp4")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not Path("a.mp4").exists()


def test_the_plan_knows_the_window_and_the_given_frames(nasa_video: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from nasa_video.video import loading

    planned = []
    make_plan = loading.make_plan
    monkeypatch.setattr(loading, "make_plan", lambda *given: planned.append(make_plan(*given)) or planned[-1])
    nasa_video(*STAR, "-o", "a.mp4")
    nasa_video(*STAR, "--window", "0", "-o", "b.mp4")
    nasa_video("extend", "a.mp4", "a red star", "--frames", "240", "--window", "0", *MODEL, "-o", "c.mp4")
    held = [plan.run.latent_frames if plan.run.sampler.window_frames is None else 9 for plan in planned]
    assert held == [9, 12, 81], "a window of 9; 45 frames; 81 given and 240 new ones"


def _resident() -> int:
    gc.collect()
    row = next(row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS"))
    return int(row.split()[1]) * 1024


@pytest.mark.slow
def test_a_long_video_is_written_as_it_goes_and_takes_no_more_memory(pipeline: VideoPipeline, tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("resident memory is read from /proc")
    settings = pipeline.preset.sampler.with_window(0, 0, "absolute")
    chunks = pipeline.with_sampler(settings).stream(
        "a red star", negative="red", guidance=Nasa(0.5), endless=True, steps=1, rollout=33, width=64, height=48
    )
    taken, written = {}, {}
    with open_sink(str(tmp_path / "long.mp4"), 12, {}) as sink:
        for index, chunk in enumerate(itertools.islice(chunks, 240)):
            sink.write(chunk.frames)
            if index in (80, 239):
                taken[index] = _resident()
                written[index] = sum(path.stat().st_size for path in tmp_path.iterdir())
    # 159 chunks are 1,908 frames: kept as pictures they would be 18 MB, and 70 MB as the decoder makes them.
    assert taken[239] - taken[80] < 6_000_000
    assert written[239] > 2 * written[80] > 0
    assert len(read_frames(tmp_path / "long.mp4", 2870, 7)) == 7


def test_a_source_and_a_prefix_may_wait_on_the_host(pipeline: VideoPipeline) -> None:
    # On a GPU the latents of a resumed video come from disk: each chunk has to be brought to the model and the decoder.
    whole = list(pipeline.stream("a red star", frames=33))
    prefix = torch.cat([chunk.latents for chunk in whole[:2]], dim=1)
    seen: list[torch.device] = []
    to = torch.Tensor.to

    def noted(tensor: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        if tensor.data_ptr() in range(prefix.data_ptr(), prefix.data_ptr() + prefix.numel() * 4):
            seen.extend(place for place in given if isinstance(place, torch.device))
        return to(tensor, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", noted)
        rest = list(pipeline.stream("a red star", frames=33, start=InitialLatents(prefix, shown_context=6)))
    assert seen.count(pipeline.model.device) >= 4, "once for the model and once for the decoder, a chunk"
    assert all(np.array_equal(a.frames, b.frames) for a, b in zip(whole, rest, strict=True))


def test_window_errors_are_the_users(pipeline: VideoPipeline) -> None:
    with pytest.raises(InputError, match="no room"):
        pipeline.preset.sampler.with_window(4, 3, None)
