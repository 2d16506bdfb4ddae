"""Rollouts by overlap, decoding beside the model, and compiled chunks, through the pipeline and the command line."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from causvid_adapter import ShapeError, StreamingDecoder, denormalize, normalize
from causvid_adapter.rollouts import Rollout, overlap_latents, overlap_pictures, rollouts
from nasa_video import Nasa, VideoPipeline
from nasa_video.errors import InputError
from nasa_video.files.source import read_frames
from nasa_video.models.loading import FullDecoder
from nasa_video.video.engine import InitialLatents

Run = Callable[..., Any]
STAR = "a red star"


def again(pipeline: VideoPipeline, **changes: Any) -> VideoPipeline:
    """The same model in another pipeline."""
    sampler = changes.pop("sampler", {})
    preset = pipeline.preset.model_copy(update={"sampler": pipeline.preset.sampler.model_copy(update=sampler)})
    return VideoPipeline(pipeline.model, pipeline.vae, pipeline.text_encoder, preset, **changes)


def frames_of(pipeline: VideoPipeline, **settings: Any) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in pipeline.stream(STAR, **settings)])


def test_rollouts_cover_a_video_once_and_share_their_overlap() -> None:
    parts = list(rollouts(48, 21, 3))
    assert parts == [Rollout(0, 21, 0), Rollout(21, 39, 18), Rollout(39, 48, 36)]
    assert list(rollouts(21, 21, 3)) == [Rollout(0, 21, 0)]
    assert list(rollouts(None, None, 3)) == [Rollout(0, None, 0)]
    assert [r.first for r in itertools.islice(rollouts(None, 9, 3), 4)] == [0, 9, 15, 21]
    for wrong in (3, 10):
        with pytest.raises(ShapeError, match=r"use [69]"):
            list(rollouts(30, wrong, 3))


def test_the_overlap_begins_with_the_picture_encoded_anew(pipeline: VideoPipeline) -> None:
    latents = torch.randn(1, 6, 8, 2, 4, generator=torch.Generator().manual_seed(0))
    pictures = StreamingDecoder(pipeline.vae).decode(denormalize(pipeline.vae, latents))
    assert overlap_pictures(3, 4) == 9
    made = overlap_latents(pipeline.vae, latents[:, 3:], pictures[:, -9])
    assert torch.equal(made[:, 1:], latents[:, 4:])
    with torch.no_grad():
        whole = pipeline.vae.encode(pictures[:, -9].unsqueeze(2)).latent_dist.mode()
    torch.testing.assert_close(made[:, 0], normalize(pipeline.vae, whole.transpose(1, 2))[:, 0])


def test_a_long_video_by_overlap_is_its_rollouts(pipeline: VideoPipeline) -> None:
    plain = again(pipeline, sampler={"window_frames": None, "sink_frames": 0, "rope": "absolute"})
    long = list(plain.stream(STAR, frames=69, rollout=33, seed=5))
    first = list(plain.stream(STAR, frames=33, seed=5))
    assert [chunk.index for chunk in long] == list(range(6))
    assert [len(chunk.frames) for chunk in long] == [9, 12, 12, 12, 12, 12]
    for a, b in zip(long, first, strict=False):
        assert np.array_equal(a.frames, b.frames)
    # The second rollout, made by hand: start latents, a history of its own, positions from zero, the video's noise.
    tail = StreamingDecoder(plain.vae).decode(denormalize(plain.vae, torch.cat([c.latents for c in first], dim=1)))
    lead = overlap_latents(plain.vae, first[-1].latents, tail[:, -9])
    caches = []
    new_cache = plain.model.new_cache
    plain.model.new_cache = lambda *s: caches.append(new_cache(*s)) or caches[-1]  # type: ignore[method-assign, func-returns-value]
    try:
        once_more = list(plain.stream(STAR, frames=69, rollout=33, seed=5))
    finally:
        del plain.model.new_cache
    assert len(caches) == 3
    assert max(cache.num_bytes for cache in caches) == caches[0].num_bytes, "no history is longer than a rollout"
    assert [cache.next_frame for cache in caches] == [6, 6, 3], "positions start again"
    assert torch.equal(once_more[-1].latents, long[-1].latents)
    decoder = StreamingDecoder(plain.vae)
    decoder.decode(denormalize(plain.vae, lead))
    shown = decoder.decode(denormalize(plain.vae, long[3].latents))
    expected = shown[0].add(1).mul(127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(long[3].frames, expected)
    assert not np.array_equal(long[3].frames, list(plain.stream(STAR, frames=69, rollout=0, seed=5))[3].frames)


def test_a_cue_holds_across_the_border_of_a_rollout(pipeline: VideoPipeline) -> None:
    from nasa_video.video.request import PromptState

    cues = [PromptState.of(STAR)] * 4 + [PromptState.of("a blue heart", "red", Nasa(0.5))] * 2
    asked: list[int] = []

    def cue_of(index: int) -> PromptState:
        asked.append(index)
        return cues[index]

    chunks = list(pipeline.stream(STAR, states=cue_of, frames=69, rollout=33))
    assert [chunk.state for chunk in chunks] == cues
    assert chunks[3].effect is None
    assert chunks[4].effect is not None
    assert max(asked) == 5


@pytest.mark.parametrize("known", [1, 3, 4])
def test_a_long_video_resumes_to_the_same_frames(pipeline: VideoPipeline, known: int) -> None:
    whole = list(pipeline.stream(STAR, frames=69, rollout=33, negative="red", guidance=Nasa(0.5)))
    prefix = torch.cat([chunk.latents for chunk in whole[:known]], dim=1)
    resumed = list(
        pipeline.stream(
            STAR,
            frames=69,
            rollout=33,
            negative="red",
            guidance=Nasa(0.5),
            start=InitialLatents(prefix, shown_context=3 * known),
        )
    )
    assert np.array_equal(
        np.concatenate([chunk.frames for chunk in resumed]), np.concatenate([chunk.frames for chunk in whole])
    )


def test_a_rollout_that_the_model_does_not_allow_is_refused(pipeline: VideoPipeline) -> None:
    with pytest.raises(InputError, match="use 21 or 33"):
        pipeline.stream(STAR, rollout=22)
    with pytest.raises(InputError, match="more than one chunk, got 9 frames; use 21"):
        pipeline.stream(STAR, rollout=9)


def test_from_makes_a_long_video_again(nasa_video: Run) -> None:
    made = nasa_video("generate", STAR, "--model", "{model}", "--frames", "45", "--rollout", "21", "-o", "a.mp4")
    assert made.status == 0, made.stderr
    assert nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4").status == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    nasa_video("generate", STAR, "--model", "{model}", "--frames", "45", "--rollout", "0", "-o", "c.mp4")
    videos = [read_frames(name) for name in ("a.mp4", "c.mp4")]
    assert len(videos[0]) == len(videos[1]) == 45
    assert not np.array_equal(*videos)


@pytest.mark.parametrize("ahead", [1, 2])
@pytest.mark.parametrize("rollout", [0, 21])
def test_decoding_beside_the_model_makes_the_same_frames(pipeline: VideoPipeline, ahead: int, rollout: int) -> None:
    beside = again(pipeline, decode_ahead=ahead)
    settings = {"frames": 57, "negative": "red", "guidance": Nasa(0.5), "rollout": rollout}
    plain, other = (list(p.stream(STAR, **settings)) for p in (pipeline, beside))
    assert [chunk.index for chunk in other] == [chunk.index for chunk in plain]
    for a, b in zip(plain, other, strict=True):
        assert np.array_equal(a.frames, b.frames)
        assert (a.effect, a.own_effect, a.out_of_range) == (b.effect, b.own_effect, b.out_of_range)


class Slow(FullDecoder):
    """A decoder that takes its time, and notes when it is at work and where."""

    at_work: list[str]
    threads: set[str]

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        self.at_work.append("decoding")
        self.threads.add(threading.current_thread().name)
        time.sleep(0.05)
        frames = super().decode(latents, clamp)
        self.at_work.append("decoded")
        return frames


def test_a_chunk_is_decoded_while_the_next_is_made_and_no_more_than_asked_wait(
    pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    Slow.at_work, Slow.threads = [], set()
    beside = again(pipeline, decode_ahead=1, new_decoder=Slow)
    forward = pipeline.model.forward

    def noted(*given: Any, **named: Any) -> Tensor:
        Slow.at_work.append("model")
        return forward(*given, **named)

    monkeypatch.setattr(pipeline.model, "forward", noted)
    chunks = beside.stream(STAR, frames=57)
    next(chunks)
    assert Slow.threads == {"nasa-video-decode_0"}
    start, end = Slow.at_work.index("decoding"), Slow.at_work.index("decoded")
    assert "model" in Slow.at_work[start:end], "the model went on meanwhile"
    assert Slow.at_work.count("decoding") <= 2
    assert len(list(chunks)) == 4


@pytest.mark.parametrize("ahead", [0, 1])
def test_what_decoding_raises_comes_out_and_the_thread_ends(pipeline: VideoPipeline, ahead: int) -> None:
    class Broken(FullDecoder):
        def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
            raise MemoryError("decoder")

    chunks = again(pipeline, decode_ahead=ahead, new_decoder=Broken).stream(STAR, frames=57)
    with pytest.raises(MemoryError, match="decoder"):
        list(chunks)
    assert not [t for t in threading.enumerate() if t.name.startswith("nasa-video-decode")]


def test_an_interrupt_passes_through_and_a_dropped_stream_leaves_no_thread(
    pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()
    forward = pipeline.model.forward

    def interrupted(*given: Any, **named: Any) -> Tensor:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return forward(*given, **named)

    before = [block.attn2.processor for block in pipeline.model.transformer.blocks]
    beside = again(pipeline, decode_ahead=1)
    monkeypatch.setattr(pipeline.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(beside.stream(STAR, frames=57))
    monkeypatch.undo()
    dropped = beside.stream(STAR, frames=57)
    next(dropped)
    del dropped
    assert not [t for t in threading.enumerate() if t.name.startswith("nasa-video-decode")]
    assert [block.attn2.processor for block in pipeline.model.transformer.blocks] == before


def test_the_command_line_decodes_beside_and_plans(nasa_video: Run) -> None:
    for name, options in (("a", []), ("b", ["--decode-ahead", "1", "--memory", "auto"])):
        done = nasa_video("generate", STAR, "--neg", "red", "--model", "{model}", *options, "-o", f"{name}.mp4")
        assert done.status == 0, done.stderr
    assert "memory on cpu:" in done.stderr
    assert np.array_equal(read_frames("a.mp4"), read_frames("b.mp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--memory", "lots"], "--memory must be full, auto, or the gigabytes"),
        (["--weights", "int4"], "weights must be plain, int8 or fp8"),
        (["--compile", "fast"], "--compile must be off, on or graphs"),
        (["--compile", "graphs"], "CUDA graphs need CUDA"),
    ],
)
def test_options_that_cannot_be_had_are_refused(nasa_video: Run, options: list[str], message: str) -> None:
    done = nasa_video("generate", STAR, "--model", "{model}", "--device", "cpu", *options, "-o", "a.mp4")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not Path("a.mp4").exists()


def test_a_run_that_does_not_fit_is_refused_before_the_first_download(
    nasa_video: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*given: object, **named: object) -> None:
        pytest.fail("something was to be downloaded")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    monkeypatch.setattr("huggingface_hub.snapshot_download", no_network)
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: 20_000_000_000)
    done = nasa_video("generate", "a fox", "--model", "causvid", "--device", "cpu")
    text = " ".join(done.stderr.split())
    assert done.status == 1
    assert "not enough memory on cpu: 832 x 480 needs 27.2 GB" in text
    assert "what fits: --width" in text


@pytest.mark.parametrize("weights", ["int8", "fp8"])
def test_weights_in_8_bits_come_back_with_from(nasa_video: Run, weights: str) -> None:
    pytest.importorskip("torchao")
    for stored in ("plain", weights):
        done = nasa_video("generate", STAR, "--model", "{model}", "--weights", stored, "-o", f"{stored}.mp4")
        assert done.status == 0, done.stderr
    assert nasa_video("generate", "--from", f"{weights}.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path(f"{weights}.mp4").read_bytes()
    assert not np.array_equal(read_frames(f"{weights}.mp4"), read_frames("plain.mp4"))
