"""More steps where a scene opens, fewer for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from causvid_adapter import CausalWan
from nasa_video import VideoPipeline
from nasa_video.errors import InputError
from nasa_video.files.source import read_frames
from nasa_video.guidance.methods import Nasa
from nasa_video.models.presets import SamplerSettings, find_preset
from nasa_video.video.engine import InitialLatents
from nasa_video.video.request import PromptState

Run = Callable[..., Any]
STAR = ("generate", "a red star", "--frames", "33", "--model", "{model}")


def latents(pipeline: VideoPipeline, **options: Any) -> list[torch.Tensor]:
    return [chunk.latents for chunk in pipeline.stream("a red star", **{"frames": 33, **options})]


@pytest.fixture
def calls(pipeline: VideoPipeline, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The timesteps of all calls of the model."""
    made: list[float] = []
    forward = CausalWan.forward

    def noted(self: CausalWan, latents: Any, timestep: float, *given: Any, **options: Any) -> Any:
        made.append(timestep)
        return forward(self, latents, timestep, *given, **options)

    monkeypatch.setattr(CausalWan, "forward", noted)
    return made


def noisy_calls(calls: list[float]) -> list[int]:
    """How many steps each chunk had; a clean pass ends one."""
    counts, steps = [], 0
    for t in calls:
        steps += t > 0
        if t == 0:
            counts.append(steps)
            steps = 0
    return [*counts, steps]


def test_the_first_chunk_is_the_one_of_as_many_steps_and_the_others_follow_it(pipeline: VideoPipeline) -> None:
    kinds = ((1, None), (2, None), (1, 2))
    one, two, opened = (latents(pipeline, steps=steps, first_chunk_steps=first) for steps, first in kinds)
    assert torch.equal(opened[0], two[0])
    for chunk in (1, 2):
        assert not torch.equal(opened[chunk], one[chunk]), "it follows another chunk"
        assert not torch.equal(opened[chunk], two[chunk]), "and has one step"
    same = latents(pipeline, first_chunk_steps=2, steps=2)
    assert all(torch.equal(a, b) for a, b in zip(same, two, strict=True))


def test_only_what_opens_a_scene_has_more_steps(pipeline: VideoPipeline, calls: list[float]) -> None:
    old, new = PromptState.of("a red star"), PromptState.of("a blue ball", "red", Nasa(0.5))

    def cues(chunk: int) -> PromptState:
        return new if chunk >= 3 else old

    latents(pipeline, first_chunk_steps=2, states=cues, steps=1, frames=69, on_change="keep")
    assert noisy_calls(calls) == [2, 1, 1, 2, 1, 1]
    calls.clear()
    latents(pipeline, first_chunk_steps=2, steps=1, frames=57, rollout=33)
    assert noisy_calls(calls) == [2, 1, 1, 1, 1], "a rollout goes on where the one before ended"


def test_what_goes_on_from_a_clip_opens_and_what_is_resumed_does_not(
    pipeline: VideoPipeline, calls: list[float]
) -> None:
    whole = latents(pipeline, first_chunk_steps=2, steps=1, frames=45)
    made = torch.cat(whole[:2], dim=1)
    resumed = latents(pipeline, first_chunk_steps=2, steps=1, frames=45, start=InitialLatents(made, shown_context=6))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))
    calls.clear()
    latents(pipeline, first_chunk_steps=2, steps=1, frames=45, start=InitialLatents(made))
    assert noisy_calls(calls) == [0, 0, 2, 1]


def test_a_number_of_steps_that_the_model_has_not_is_refused(pipeline: VideoPipeline) -> None:
    sampler = find_preset("sprites").sampler
    with pytest.raises(InputError, match="runs in 1, 2, 4 steps, got 3"):
        sampler.with_first_chunk_steps(3)
    assert sampler.with_first_chunk_steps(None) == sampler
    with pytest.raises(ValueError, match="first_chunk_steps 3 is not among steps"):
        SamplerSettings.model_validate(sampler.model_dump() | {"first_chunk_steps": 3})
    source = torch.cat(latents(pipeline), dim=1)
    with pytest.raises(InputError, match="give --first-chunk-steps 1"):
        latents(pipeline, first_chunk_steps=2, steps=1, start=InitialLatents(source=source))
    assert len(latents(pipeline, first_chunk_steps=2, steps=2, start=InitialLatents(source=source))) == 3


@pytest.mark.parametrize(
    ("alone", "says"),
    [
        ({3: {"timesteps": [990, 800, 500]}}, "without_history: 3 is not among steps"),
        ({4: {"timesteps": [990, 500]}}, "without_history: 4 lists 2 timesteps"),
        ({2: {"timesteps": [990, 500], "euler_steps": 2}}, "cannot have 2 Euler steps, give fewer"),
        ({2: {"timesteps": [990, 500], "heun_steps": 1}}, "heun_steps"),
    ],
)
def test_steps_of_a_chunk_with_nothing_before_it_must_fit(alone: dict[int, object], says: str) -> None:
    settings = find_preset("sprites").sampler.model_dump()
    with pytest.raises(ValueError, match=says):
        SamplerSettings.model_validate(settings | {"without_history": alone})


def test_presets_of_the_version_before_are_read() -> None:
    shipped = find_preset("causal-forcing-1step").sampler
    now = shipped.model_dump() | {"on_change": "regenerate", "without_history": {1: {"timesteps": [990]}}}
    names = {"first_chunk_steps": "first_steps", "without_history": "alone"}
    older = {names.get(name, name): value for name, value in now.items()} | {"on_change": "remake"}
    assert SamplerSettings.model_validate(older) == SamplerSettings.model_validate(now) != shipped
    with pytest.raises(ValueError, match="keep, recache, regenerate, got 'redo'"):
        SamplerSettings.model_validate(now | {"on_change": "redo"})


def test_a_chunk_with_nothing_before_it_may_have_steps_of_its_own(pipeline: VideoPipeline, calls: list[float]) -> None:
    settings = find_preset("sprites").sampler.model_dump()
    alone = {4: {"timesteps": [990, 800, 500, 250], "euler_steps": 2}}
    opened = pipeline.with_sampler(SamplerSettings.model_validate(settings | {"without_history": alone}))
    for steps, first in ((4, [990.0, 800.0, 500.0, 250.0]), (2, [1000.0, 750.0])):
        calls.clear()
        latents(opened, steps=steps, frames=21)
        assert [t for t in calls if t][: len(first)] == first
        assert [t for t in calls if t][len(first)] == 1000.0


def test_a_model_may_bring_it(pipeline: VideoPipeline, calls: list[float]) -> None:
    """As Causal Forcing++ does: a frame a chunk, in one or two steps, the first in four."""
    for count in (1, 2):
        sampler = find_preset(f"causal-forcing-{count}step").sampler
        assert (sampler.default_steps, sampler.first_chunk_steps, sampler.frames_per_chunk) == (count, 4, 1)
        assert sampler.timesteps(4) == find_preset("self-forcing").sampler.timesteps(4)
    own = pipeline.preset.sampler
    update = {
        "default_steps": 1,
        "first_chunk_steps": 2,
        "frames_per_chunk": 1,
        "window_frames": None,
        "sink_frames": 0,
    }
    chunks = latents(pipeline.with_sampler(own.model_copy(update=update)), frames=17)
    assert [chunk.shape[1] for chunk in chunks] == 5 * [1]
    assert noisy_calls(calls) == [2, 1, 1, 1, 1]


def test_it_is_an_option_that_is_stored_and_comes_back(nasa_video: Run) -> None:
    for name, options in {
        "one": ("--steps", "1"),
        "opened": ("--steps", "1", "--first-steps", "2"),
        "two": ("--steps", "2"),
    }.items():
        done = nasa_video(*STAR, *options, "-o", f"{name}/")
        assert done.status == 0, done.stderr
    one, opened, two = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(Path(name).glob("*.png"))])
        for name in ("one", "opened", "two")
    )
    assert np.array_equal(opened[:9], two[:9])
    assert all((a != b).any() for a, b in zip(opened[9:], one[9:], strict=True))
    nasa_video(*STAR, "--steps", "1", "--first-steps", "2", "-o", "a.mp4")
    assert nasa_video("generate", "--from", "a.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path("a.mp4").read_bytes()


def test_a_timeline_and_a_stream_take_it(nasa_video: Run) -> None:
    Path("t.yaml").write_text("steps: 1\nfirst_steps: 2\ntimeline: [{at: 0, prompt: a red star}]\n")
    done = nasa_video("generate", "--timeline", "t.yaml", "--frames", "33", "--model", "{model}", "-o", "a.mp4")
    assert done.status == 0, done.stderr
    nasa_video(*STAR, "--steps", "1", "--first-steps", "2", "-o", "b.mp4")
    assert np.array_equal(read_frames("a.mp4"), read_frames("b.mp4"))
    for options in (("--timeline", "t.yaml"), ("a red star", "--steps", "1", "--first-steps", "2")):
        done = nasa_video("stream", *options, "--seconds", "1", "--model", "{model}", "--to", "c.mp4")
        assert done.status == 0, done.stderr
        assert np.array_equal(read_frames("c.mp4")[:9], read_frames("b.mp4")[:9])
