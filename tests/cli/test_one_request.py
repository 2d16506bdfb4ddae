"""One request is one video, at whatever door it comes in; what it was called before is still understood."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nasa_video import Video, VideoPipeline
from nasa_video.errors import InputError
from nasa_video.files.metadata import read_metadata
from nasa_video.files.source import read_frames
from nasa_video.models.memory_plan import PlanRequest, _budget, make_plan
from nasa_video.models.presets import find_preset
from nasa_video.video.engine import InitialLatents
from nasa_video.video.request import PromptState, StartFile, WindowRequest

Run = Callable[..., Any]
FIELDS = {
    "prompt": "a red star", "negatives": "blurry, rain:0.4", "guidance": "nag:2,tau=3", "seed": 3, "frames": 33,
    "steps": 1, "first_chunk_steps": 2, "fps": 10, "on_change": "recache", "window": {"frames": 6, "sink": 3},
}  # fmt: skip
WORDS = [
    "a red star", "--neg", "blurry, rain:0.4", "--guidance", "nag:2,tau=3", "--seed", "3", "--frames", "33", "--steps",
    "1", "--first-chunk-steps", "2", "--fps", "10", "--on-change", "recache", "--window", "6", "--sink", "3",
]  # fmt: skip


def recipe_of(path: str) -> dict[str, Any]:
    return {k: v for k, v in read_metadata(path)["nasa_video"].items() if k not in ("timeline", "placement")}


def test_a_request_is_the_same_video_through_every_door(nasa_video: Run, pipeline: VideoPipeline) -> None:
    shown = {name: FIELDS[name] for name in ("prompt", "negatives", "guidance")}
    rest = {name: value for name, value in FIELDS.items() if name not in shown}
    Path("t.yaml").write_text(yaml.safe_dump({**rest, "timeline": [{"at": 0, **shown}]}))
    Path("jobs.yaml").write_text(yaml.safe_dump([{**FIELDS, "name": "batch"}]))
    pipeline(**{**FIELDS, "window": WindowRequest(frames=6, sink=3)}).save("python.mp4")
    for words in (
        ["generate", *WORDS, "--model", "{model}", "-o", "options.mp4"],
        ["generate", "--timeline", "t.yaml", "--model", "{model}", "-o", "timeline.mp4"],
        ["batch", "jobs.yaml", "--model", "{model}", "-o", "."],
        ["generate", "--from", "python.mp4", "-o", "recipe.mp4"],
    ):
        done = nasa_video(*words)
        assert done.status == 0, done.stderr
    for name in ("timeline", "batch", "recipe", "python"):
        assert np.array_equal(read_frames(Path(f"{name}.mp4")), read_frames(Path("options.mp4"))), name
        if name != "timeline":
            assert recipe_of(f"{name}.mp4") == recipe_of("options.mp4")


def test_the_call_is_the_whole_stream(pipeline: VideoPipeline) -> None:
    options = {"negative": "blurry", "seed": 3, "frames": 33}
    chunks = list(pipeline.stream("a star", **options))
    video = pipeline("a star", **options)
    assert np.array_equal(video.frames, np.concatenate([chunk.frames for chunk in chunks]))
    assert (len(video), video.fps, video.effect) == (33, 12, chunks[-1].effect)
    assert video.request is not None
    assert (video.request.seed, video.request.steps) == (3, 2), "what was not said is resolved"
    with pytest.raises(InputError, match=r"stream\("):
        pipeline("a star", endless=True)


def test_what_no_recipe_holds_gets_none(pipeline: VideoPipeline, tmp_path: Path) -> None:
    states = pipeline(states=lambda chunk: PromptState.of("a star"), seed=3)
    assert np.array_equal(states.frames, pipeline("a star", seed=3).frames)
    first = next(pipeline.stream("a star", seed=3))
    rest = pipeline("a star", seed=3, start=InitialLatents(first.latents))
    assert np.array_equal(rest.frames, states.frames[9:])
    assert states.request is rest.request is None
    rest.save(tmp_path / "rest.gif")
    assert "nasa_video" not in read_metadata(tmp_path / "rest.gif")


def test_a_video_from_a_still_is_saved_as_generate_writes_it(nasa_video: Run, pipeline: VideoPipeline) -> None:
    pipeline("a star").save("stills/")
    start = StartFile.of_file("image", "stills/000000.png")
    video = pipeline("a heart", start=start, frames=12)
    assert len(video) == 13, "the still, then what is made"
    assert video.save("python.mp4") == Path("python.mp4")
    assert nasa_video("generate", "--from", "python.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path("python.mp4").read_bytes()


def test_a_notebook_shows_it(pipeline: VideoPipeline, tmp_path: Path) -> None:
    video = pipeline("a star", negative="blurry")
    found = re.search(r'width="64" src="data:video/mp4;base64,([^"]+)"', video._repr_html_())
    assert found is not None
    (tmp_path / "shown.mp4").write_bytes(base64.b64decode(found[1]))
    assert read_frames(tmp_path / "shown.mp4").shape == (21, 32, 64, 3)
    assert re.fullmatch(r"Video\(fps=12.*", repr(video)), "without its numbers"
    assert "640" in Video(np.zeros((2, 16, 1000, 3), np.uint8), 12)._repr_html_()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"generator": None}, "write seed=7"),
        ({"guidance_scale": 3.0}, "write guidance='nasa-centred:0.5'"),
        ({"compare": True}, "write two calls"),
        ({"negativ": "x"}, "did you mean 'negative'"),
        ({"sead": 1}, "did you mean 'seed'"),
        ({"negative": "x", "negative_prompt": "y"}, "given twice"),
    ],
)
def test_keywords_that_there_are_not_say_what_to_write(
    pipeline: VideoPipeline, options: dict[str, Any], says: str
) -> None:
    for make in (pipeline, pipeline.stream):
        with pytest.raises(TypeError, match=says):
            make("a star", **options)


def test_names_of_diffusers_do_what_they_say(pipeline: VideoPipeline) -> None:
    theirs = pipeline("a star", negative_prompt="blurry", num_inference_steps=1, num_frames=9)
    assert np.array_equal(theirs.frames, pipeline("a star", negative="blurry", steps=1, frames=9).frames)


def test_a_batch_ignores_nothing(pipeline: VideoPipeline) -> None:
    with pytest.raises(TypeError, match="takes prompts, negatives and seeds"):
        pipeline.stream_batch(["a", "b"], seeds=[1, 2], negative_prompt="x")


def test_prompts_are_extended_in_python_too(pipeline: VideoPipeline) -> None:
    with pytest.raises(InputError, match="small vocabulary such as sprites, not tiny"):
        pipeline("a star", extend_prompt=True)
    knows = VideoPipeline(pipeline.model, pipeline.vae, pipeline.text_encoder, pipeline.preset)
    knows.preset = knows.preset.model_copy(update={"vocabulary": "sprites"})
    request = knows("a star", extend_prompt=True, seed=3, frames=9).request
    assert request is not None
    assert request.extend_prompt is None
    assert str(request.prompt).startswith("a star, ")


def test_older_names_of_options_are_still_understood(nasa_video: Run) -> None:
    older = [
        "--negative-prompt", "blurry", "--guidance", "nasa", "--scale", "0.7", "--guide-steps", "0:0.5",
        "--guide-layers", "0:0.5", "--scale-steps", "1,0.5", "--no-guide-clean", "--no-neg-padding",
        "--first-steps", "2", "--num-inference-steps", "1", "--num-frames", "21", "--on-change", "recompute",
    ]  # fmt: skip
    spelling = (
        "nasa:0.7,first_step=0,last_step=0.5,first_layer=0,last_layer=0.5,step_scales=1/0.5,clean_pass=no,padding=no"
    )
    today = [
        "--neg", "blurry", "--guidance", spelling, "--first-chunk-steps", "2", "--steps", "1", "--frames", "21",
        "--on-change", "recache",
    ]  # fmt: skip
    for name, words in (("older", older), ("today", today)):
        done = nasa_video("generate", "a star", *words, "--model", "{model}", "-o", f"{name}.mp4")
        assert done.status == 0, done.stderr
    assert recipe_of("older.mp4") == recipe_of("today.mp4")
    assert recipe_of("older.mp4")["on_change"] == "recache"


def test_frames_beside_a_timeline_are_what_is_planned_and_made(
    nasa_video: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[int | None] = []

    def plan(preset: Any, device: Any, dtype: Any, wanted: PlanRequest, *more: Any) -> Any:
        planned.append(wanted.frames)
        return make_plan(preset, device, dtype, wanted, *more)

    monkeypatch.setattr("nasa_video.video.loading.make_plan", plan)
    Path("t.yaml").write_text("frames: 81\ntimeline: [{at: 0, prompt: a star}]\n")
    words = ["generate", "--timeline", "t.yaml", "--frames", "33", "--model", "{model}", "-o", "a.mp4", "--json"]
    assert nasa_video(*words).json["frames"] == 33
    assert planned == [33]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Self-Forcing", "did you mean 'self-forcing'"),
        ("sprite", "did you mean 'sprites'"),
        ("./tiny", "no such file or folder"),
        ("tiny.safetensors", "no such file or folder"),
        ("my/models/tiny", "no such file or folder"),
    ],
)
def test_a_model_that_there_is_not_is_told_from_one_that_is_misspelt(name: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        find_preset(name)


@pytest.mark.parametrize("memory", ["24", "24GB", "24 gb", "24G"])
def test_gigabytes_may_be_written_with_their_unit(memory: str) -> None:
    assert _budget(memory, None) == _budget("24", None)
