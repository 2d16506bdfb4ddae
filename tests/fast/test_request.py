"""One record of a video: what it reads, how two are merged, what fills it, what it was called before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nasa_video.errors import InputError
from nasa_video.guidance.methods import Nag, Nasa
from nasa_video.guidance.schedule import ScaleSchedule
from nasa_video.guidance.terms import Negative
from nasa_video.models.presets import find_preset
from nasa_video.video.request import PromptWarning, VideoRequest, WindowRequest, change_guidance

SPRITES = find_preset("sprites")


def test_it_is_read_without_torch() -> None:
    code = "import sys, nasa_video.video.request; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("written", ["blurry, rain:0.4", ["blurry", "rain:0.4"], [Negative("blurry"), "rain:0.4"],
                                     [{"text": "blurry"}, {"text": "rain", "weight": 0.4}]])  # fmt: skip
def test_negatives_have_one_grammar_however_they_are_written(written: Any) -> None:
    assert VideoRequest.read({"negatives": written}).negatives == (Negative("blurry"), Negative("rain", 0.4))


def test_negatives_in_the_prompt_are_taken_out_of_it() -> None:
    request = VideoRequest.read({"prompt": "a man (glasses:-0.5) sits", "negatives": "rain"})
    assert request.prompt == "a man sits"
    assert request.negatives == (Negative("rain"), Negative("glasses", 0.5))


def test_what_the_second_request_states_wins() -> None:
    file = VideoRequest.read({"prompt": "a", "seed": 3, "frames": 9, "negatives": "red", "guidance": "nag:2,tau=3"})
    file = file.model_copy(update={"window": WindowRequest(frames=6, sink=3)})
    options = VideoRequest.read({"frames": 33, "guidance": ":4", "window": {"sink": 0}, "negatives": []})
    merged = file.merged(options)
    assert (merged.prompt, merged.seed, merged.frames, merged.negatives) == ("a", 3, 33, ())
    assert merged.guidance == "nag:4,tau=3"
    assert merged.window == WindowRequest(frames=6, sink=0)


@pytest.mark.parametrize(
    ("current", "over", "then"),
    [
        ("nag:2,tau=3", "nasa", "nasa"),
        ("nag:2,tau=3", ":4", "nag:4,tau=3"),
        ("nag", ":,tau=2", "nag,tau=2"),
        (None, ":0.3", ":0.3"),
        (":0.3,limit=1", ":0.5", ":0.5,limit=1"),
        (":,limit=1", ":,conflict=2", ":,limit=1,conflict=2"),
        ("none", ":0.3", ":0.3"),
        ("nag:2", "none", "none"),
    ],
)
def test_a_change_of_guidance_keeps_what_it_does_not_name(current: str | None, over: str, then: str) -> None:
    assert change_guidance(current, over) == then


def test_what_is_open_is_the_presets() -> None:
    done = VideoRequest.read({"prompt": "a", "negatives": "b", "guidance": ":0.25"}).resolved(SPRITES)
    video, sampler = SPRITES.video, SPRITES.sampler
    assert (done.width, done.height, done.frames, done.fps) == (video.width, video.height, video.frames, video.fps)
    assert (done.seed, done.steps, done.on_change) == (0, sampler.default_steps, sampler.on_change)
    assert done.guidance == "nasa-centred:0.25,conflict=2,limit=0.3"
    assert VideoRequest.model_validate_json(done.model_dump_json()) == done
    assert VideoRequest.of_metadata(done.to_metadata(), "a.mp4") == done


def test_a_method_from_python_is_taken_as_it_is() -> None:
    method = Nag(3.0, schedule=ScaleSchedule(last_step=0.5, step_scales=(1, 0.5)))
    done = VideoRequest.read({"prompt": "a", "negatives": "b", "guidance": method}).resolved(SPRITES)
    assert done.states(SPRITES, float)(0).guidance == method
    assert VideoRequest.model_validate_json(done.model_dump_json()).states(SPRITES, float)(0).guidance == method


def test_the_timeline_holds_from_its_times_on() -> None:
    entries = [{"at": 1, "negatives": "red:0.5"}, {"at": 2, "guidance": ":0.7"}, {"at": 3, "guidance": "none"}]
    request = VideoRequest.read({"prompt": "a", "guidance": "nasa:1", "timeline": entries}).resolved(SPRITES)
    states = [request.states(SPRITES, float)(second) for second in range(4)]
    assert [state.negatives[0] for state in states] == [(), *3 * [(Negative("red", 0.5),)]]
    assert [state.guidance for state in states] == [Nasa(1.0), Nasa(1.0), Nasa(0.7), None]


def test_the_yaml_is_read_back(tmp_path: Path) -> None:
    entries = [{"at": 0, "prompt": "a"}, {"at": 1, "negatives": ["x", 'say "no", loud', "b:0.5"]}]
    with pytest.raises(InputError, match="not closed"):
        VideoRequest.read({"negatives": ['the " alone']})
    request = VideoRequest.read({"seed": 3, "timeline": entries})
    (tmp_path / "t.yaml").write_text(request.to_yaml())
    assert VideoRequest.read_timeline(tmp_path / "t.yaml") == request


def test_what_an_older_version_stored_is_read() -> None:
    old = {
        "prompt": "a", "negatives": [{"text": "black, white", "weight": 0.5}], "model": "m", "seed": 1, "steps": 4,
        "guidance": {"method": "nag", "settings": {
            "scale": 3.0, "negative_padding": True, "tau": 2.5, "alpha": 0.25,
            "schedule": {"first_step": 0.0, "last_step": 0.5, "first_layer": 0.0, "last_layer": 1.0,
                         "clean_pass": True, "step_scales": [1.0, 0.5], "layer_scales": []}}},
        "first_steps": 2, "frames": 21, "width": 64, "height": 64, "fps": 12, "recompute_window": True,
        "timeline": {"model": "m", "seed": None, "steps": None, "first_steps": None, "frames": None, "timeline": [
            {"at": 0, "prompt": "a", "negatives": None, "guidance": None, "scale": None, "recompute": False},
            {"at": 1, "prompt": None, "negatives": ["one, whole", "b:0.5"], "guidance": "nasa", "scale": 0.7,
             "recompute": None}]},
        "fold_padding": True, "decoder": "full", "compare": False, "rollout": None,
        "window": {"frames": None, "sink": 0, "rope": None},
        "start": {"kind": "image", "path": "a.png", "sha256": "0", "strength": 1.0, "new_frames": 12},
        "loras": [{"path": "a.safetensors", "scale": 0.5}],
        "placement": {"weights": "plain", "offload": False, "text_on_cpu": False, "half_decoder": False},
        "version": "0.1.0", "effect": None,
    }  # fmt: skip
    del old["effect"]
    new = VideoRequest.of_metadata({"nasa_video": old}, "old.mp4")
    assert new.negatives == (Negative("black, white", 0.5),)
    method = Nag(3.0, tau=2.5, alpha=0.25, schedule=ScaleSchedule(last_step=0.5, step_scales=(1.0, 0.5)))
    assert new.guidance == method
    assert (new.first_chunk_steps, new.frames) == (2, 12), "behind a still the frames are the new ones"
    assert new.timeline is not None
    assert new.timeline[1].negatives == (Negative("one, whole"), Negative("b", 0.5))
    assert (new.timeline[1].guidance, new.timeline[1].prompt) == ("nasa:0.7", None)
    assert new.states(SPRITES, float)(1).guidance == Nasa(0.7)
    assert VideoRequest.model_validate_json(new.model_dump_json()).states(SPRITES, float)(0).guidance == method


@pytest.mark.parametrize(
    ("written", "says"),
    [
        ({"promt": "a"}, "promt: there is no such setting .did you mean 'prompt'"),
        ({"guidance": "nasaa"}, "did you mean 'nasa'"),
        ({"guidance": 3}, "must be a method or its spelling"),
        ({"negatives": ["a", None]}, "must hold texts and Negatives, got NoneType"),
        ({"steps": "many"}, "steps: Input should be a valid integer"),
        ({"fps": 0}, "fps must be above 0"),
        ({"timeline": [{"at": 1}, {"at": 0}]}, "the times must rise, got 1, 0"),
        ({"timeline": [{"at": 1, "guidance": "nagg"}]}, r"timeline.0: .*did you mean 'nag'"),
        ({"loras": ["missing.safetensors"]}, "does not exist"),
    ],
)
def test_what_cannot_be_is_said_with_its_place(written: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        VideoRequest.read(written, "a.yaml")


def test_guidance_without_a_negative_is_said() -> None:
    with pytest.warns(PromptWarning, match="no negative prompt"):
        VideoRequest.read({"prompt": "a", "guidance": "nag"}).resolved(SPRITES)
    with pytest.raises(InputError, match="leaves the negative prompts without effect"):
        VideoRequest.read({"prompt": "a", "negatives": "b", "guidance": "none"}).resolved(SPRITES)
    with pytest.raises(InputError, match="say what the video should show"):
        VideoRequest().resolved(SPRITES)


@pytest.mark.parametrize(("stored", "read"), [(False, "keep"), (True, "recache")])
def test_what_an_older_version_stored_of_the_window_is_read(stored: bool, read: str) -> None:
    """Before it could be remade, a truth value said whether it was recomputed."""
    entries = [{"at": 0, "prompt": "a", "recompute": stored}, {"at": 1, "prompt": "b", "recompute": None}]
    new = VideoRequest.read({"prompt": "a", "recompute_window": stored, "timeline": {"timeline": entries}})
    assert new.on_change == read
    assert new.timeline is not None
    assert [entry.on_change for entry in new.timeline] == [read, None]
