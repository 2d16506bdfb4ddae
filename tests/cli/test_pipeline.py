"""The Python API: what must hold of a stream of chunks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from causvid_adapter import denormalize
from nasa_video import CentredNasa, ClassifierFree, Nag, Nasa, Negative, VideoPipeline, Vsf
from nasa_video.errors import InputError
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.video.engine import InitialLatents
from nasa_video.video.request import PromptState

STAR = "a red star"


def video(pipeline: VideoPipeline, prompt: str = STAR, **settings: object) -> np.ndarray:
    return np.concatenate([chunk.frames for chunk in pipeline.stream(prompt, **settings)])  # type: ignore[arg-type]


def test_chunks_come_one_by_one_with_the_frames_they_promise(pipeline: VideoPipeline) -> None:
    chunks = pipeline.stream(STAR, frames=33)
    first = next(chunks)
    assert (first.index, first.frames.shape, first.frames.dtype) == (0, (9, 16, 32, 3), np.uint8)
    assert [chunk.frames.shape[0] for chunk in chunks] == [12, 12]
    assert [pipeline.frames_until(i) for i in range(3)] == [0, 9, 21]


def test_errors_come_before_the_first_chunk_is_asked_for(pipeline: VideoPipeline) -> None:
    with pytest.raises(InputError, match="use 9 or 21"):
        pipeline.stream(STAR, frames=10)
    with pytest.raises(InputError, match="is the prompt itself"):
        pipeline.stream(STAR, negative="A red  star")


def test_streamed_frames_are_the_whole_decode(pipeline: VideoPipeline) -> None:
    chunks = list(pipeline.stream(STAR, frames=33, negative="blurry"))
    latents = denormalize(pipeline.vae, torch.cat([chunk.latents for chunk in chunks], dim=1))
    with torch.no_grad():
        whole = pipeline.vae.decode(latents.transpose(1, 2)).sample[0]
    expected = whole.add(1).mul(127.5).round().byte().permute(1, 2, 3, 0).numpy()
    assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), expected)


def test_a_longer_video_begins_with_the_shorter_one(pipeline: VideoPipeline) -> None:
    short, long = video(pipeline, frames=21, seed=3), video(pipeline, frames=69, seed=3)
    assert np.array_equal(short, long[:21])
    endless = list(itertools.islice(pipeline.stream(STAR, endless=True, seed=3), 2))
    assert np.array_equal(short, np.concatenate([chunk.frames for chunk in endless]))


def test_a_batch_is_its_samples(pipeline: VideoPipeline) -> None:
    prompts, seeds, negatives = ["a red star", "two big circles in the snow"], [4, 9], ["red", "snow and rain"]
    guidance = Nasa(0.7)
    chunks = pipeline.stream_batch(prompts, seeds=seeds, negatives=negatives, guidance=guidance, frames=21)
    both = np.concatenate([chunk.frames for chunk in chunks], axis=1)
    for sample, prompt, seed, negative in zip(both, prompts, seeds, negatives, strict=True):
        alone = video(pipeline, prompt, seed=seed, negative=negative, guidance=guidance, frames=21)
        assert np.abs(sample.astype(int) - alone).max() <= 1  # float sums over another batch size round differently


@pytest.mark.parametrize(
    "guidance",
    [Nasa(0.0), Nag(1.0), Vsf(0.0), ClassifierFree(1.0), Nasa(0.8, negative_padding=False)],
    ids=lambda g: f"{g.name}-{g.scale}",
)
def test_settings_that_mean_off_are_the_unguided_video(pipeline: VideoPipeline, guidance: object) -> None:
    plain = video(pipeline, seed=1)
    assert np.array_equal(plain, video(pipeline, seed=1, negative="blue", guidance=guidance)) is (
        guidance.scale in (0.0, 1.0)  # type: ignore[attr-defined]
    )


def test_an_empty_negative_is_no_negative(pipeline: VideoPipeline) -> None:
    assert np.array_equal(video(pipeline), video(pipeline, negative="", guidance=Nasa(1.0)))


def test_folding_changes_nothing_that_can_be_seen(pipeline: VideoPipeline) -> None:
    padded = VideoPipeline(pipeline.model, pipeline.vae, pipeline.text_encoder, pipeline.preset, fold_padding=False)
    for guidance in (Nasa(0.8), CentredNasa(0.8), Nasa(0.3, negative_padding=False), Nag(3.0), Vsf(1.0)):
        folded = video(pipeline, negative="blurry", guidance=guidance)
        assert np.abs(folded.astype(int) - video(padded, negative="blurry", guidance=guidance)).max() <= 1


def test_the_model_is_as_it_was_between_chunks_and_after_a_dropped_stream(pipeline: VideoPipeline) -> None:
    before = [block.attn2.processor for block in pipeline.model.transformer.blocks]
    stream = pipeline.stream(STAR, negative="red", frames=33)
    next(stream)
    assert [block.attn2.processor for block in pipeline.model.transformer.blocks] == before
    del stream
    assert [block.attn2.processor for block in pipeline.model.transformer.blocks] == before


def test_two_streams_do_not_disturb_each_other(pipeline: VideoPipeline) -> None:
    alone = video(pipeline, frames=33, negative="red"), video(pipeline, frames=33)
    pairs = zip(pipeline.stream(STAR, frames=33, negative="red"), pipeline.stream(STAR, frames=33), strict=True)
    guided, plain = zip(*((a.frames, b.frames) for a, b in pairs), strict=True)
    assert np.array_equal(np.concatenate(guided), alone[0])
    assert np.array_equal(np.concatenate(plain), alone[1])


def test_cues_change_prompt_negatives_and_scale_from_their_chunk_on(pipeline: VideoPipeline) -> None:
    cues = [
        PromptState.of(STAR),
        PromptState.of(STAR, "red", Nasa(0.5)),
        PromptState.of("a blue heart", ["red", Negative("blurry", 0.3)], Nasa(1)),
    ]
    chunks = list(pipeline.stream(STAR, states=lambda i: cues[i], frames=33))
    plain = list(pipeline.stream(STAR, frames=33))
    same = [np.array_equal(a.frames, b.frames) for a, b in zip(chunks, plain, strict=True)]
    assert same == [True, False, False]
    assert chunks[0].effect is None
    assert chunks[1].effect is not None
    assert [chunk.state for chunk in chunks] == cues


def test_the_clean_pass_can_be_left_unguided(pipeline: VideoPipeline) -> None:
    everywhere = list(pipeline.stream(STAR, negative="red", guidance=Nasa(0.8)))
    schedule = ScaleSchedule(clean_pass=False)
    without = list(pipeline.stream(STAR, negative="red", guidance=Nasa(0.8, schedule=schedule)))
    assert np.array_equal(everywhere[0].frames, without[0].frames), "the clean pass comes after the first chunk"
    assert not np.array_equal(everywhere[1].frames, without[1].frames)


@pytest.mark.parametrize("window", [None, 0], ids=["the model's", "none"])
def test_a_window_bounds_the_cache(
    pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    """Also where the model remembers everything: without end, it gets a window."""
    pipeline = pipeline.with_sampler(pipeline.preset.sampler.with_window(window, window, None))
    made = []
    new_cache = pipeline.model.new_cache
    monkeypatch.setattr(pipeline.model, "new_cache", lambda *a, **k: made.append(new_cache(*a, **k)) or made[-1])
    sizes = []
    for _ in itertools.islice(pipeline.stream(STAR, endless=True), 8):
        sizes.append(made[0].num_bytes)
    assert len(made) == 1
    assert sizes[0] == sizes[-1] > 0


def test_batches_must_fit_together(pipeline: VideoPipeline) -> None:
    with pytest.raises(InputError, match="as many seeds"):
        pipeline.stream_batch(["a", "b"], seeds=[1])
    with pytest.raises(InputError, match="same number of negatives"):
        pipeline.stream_batch(["a", "b"], seeds=[1, 2], negatives=["x", None])


def test_guidance_in_output_and_in_attention_do_not_mix_in_one_video(pipeline: VideoPipeline) -> None:
    cues = [PromptState.of(STAR, "red", Nasa(0.5)), PromptState.of(STAR, "red", ClassifierFree(2.0))]
    stream = pipeline.stream(STAR, states=lambda i: cues[i], frames=21)
    next(stream)
    with pytest.raises(InputError, match="cannot change between"):
        next(stream)


def test_a_continued_video_is_the_uninterrupted_one(pipeline: VideoPipeline) -> None:
    whole = list(pipeline.stream(STAR, negative="red", frames=57, seed=2))
    prefix = torch.cat([chunk.latents for chunk in whole[:2]], dim=1)
    rest = list(pipeline.stream(STAR, negative="red", frames=57, seed=2, start=InitialLatents(prefix)))
    assert [chunk.index for chunk in rest] == [2, 3, 4]
    for a, b in zip(whole[2:], rest, strict=True):
        assert np.array_equal(a.frames, b.frames)


def test_encoded_frames_are_the_vaes_own_latents_in_the_models_scale(pipeline: VideoPipeline) -> None:
    frames = video(pipeline, frames=33)
    latents = pipeline.encode_frames(frames)
    pictures = torch.from_numpy(frames).permute(3, 0, 1, 2).unsqueeze(0).float() / 127.5 - 1
    with torch.no_grad():
        expected = pipeline.vae.encode(pictures).latent_dist.mode().transpose(1, 2)
    assert latents.shape == (1, 9, 8, 2, 4)
    assert torch.allclose(denormalize(pipeline.vae, latents), expected, atol=1e-5)


def test_strength_says_how_much_of_a_video_is_redrawn(pipeline: VideoPipeline) -> None:
    given = pipeline.encode_frames(video(pipeline, frames=21, seed=8))
    made = {
        strength: torch.cat(
            [c.latents for c in pipeline.stream(STAR, start=InitialLatents(source=given, strength=strength))], dim=1
        )
        for strength in (0.5, 1.0)
    }
    distance = {strength: (latents - given).norm() for strength, latents in made.items()}
    assert distance[0.5] < distance[1.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strength": 0.0}, "strength must be above 0"),
        ({"strength": 0.5}, "for a source that is redrawn, and there is none"),
        ({"context": torch.zeros(1, 2, 8, 2, 4)}, "whole chunks of 3"),
        ({"context": torch.zeros(1, 3, 8, 9, 9)}, "must have latents of"),
        ({"context": torch.zeros(1, 6, 8, 2, 4)}, "leave nothing to make"),
        ({"source": torch.zeros(1, 3, 8, 2, 4)}, "latents for every frame"),
    ],
)
def test_a_start_that_does_not_fit_is_refused(pipeline: VideoPipeline, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.stream(STAR, frames=21, start=InitialLatents(**settings))
