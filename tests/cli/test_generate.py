"""The main job, through the command line, on a small real model."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nasa_video.files.metadata import read_metadata
from nasa_video.files.source import probe, read_frames

Run = Callable[..., Any]


def test_a_prompt_and_its_negatives_become_a_file_with_its_recipe(nasa_video: Run) -> None:
    done = nasa_video(
        "generate", "a red ball", "--neg", "blurry", "--neg", "text:0.4", "--model", "{model}", "-o", "a.mp4", "--json"
    )
    assert done.status == 0
    assert set(done.json) >= {"output", "frames", "fps", "seconds", "seed", "model", "guidance", "effect"}
    assert (done.json["frames"], done.json["fps"], done.json["guidance"]) == (21, 12, "nasa-centred")
    assert 0.01 < done.json["effect"]["relative_change"] < 2
    assert 0 < done.json["effect"]["negative_share"] < 1
    info = probe("a.mp4")
    assert (info.frames, info.width, info.height) == (21, 64, 32)
    recipe = read_metadata("a.mp4")["nasa_video"]
    assert recipe["negatives"] == [{"text": "blurry", "weight": 1.0}, {"text": "text", "weight": 0.4}]
    assert recipe["prompt"] == "a red ball"


def test_a_file_makes_itself_again(nasa_video: Run) -> None:
    words = ["--neg", "blurry:0.7", "--scale", "0.6", "--seed", "5", "--guide-steps", "0:0.6", "--guidance", "nag"]
    nasa_video("generate", "a star", "--scale", "2", *words, "--scale", "2.5", "--model", "{model}", "-o", "a.mp4")
    assert nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4").status == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_an_option_beside_from_replaces_the_stored_one(nasa_video: Run) -> None:
    nasa_video("generate", "a star", "--seed", "5", "--model", "{model}", "-o", "a/")
    nasa_video("generate", "a star", "--seed", "6", "--model", "{model}", "-o", "b/")
    nasa_video("generate", "--from", "a/", "--seed", "6", "-o", "c/")
    a, b, c = (np.asarray(Image.open(f"{name}/000020.png")) for name in "abc")
    assert np.array_equal(b, c)
    assert not np.array_equal(a, b)


def test_no_guidance_scale_zero_and_no_negative_are_one_video(nasa_video: Run) -> None:
    nasa_video("generate", "a star", "--model", "{model}", "-o", "plain/")
    nasa_video("generate", "a star", "--neg", "red", "--scale", "0", "--model", "{model}", "-o", "zero/")
    nasa_video("generate", "a star", "--guidance", "none", "--model", "{model}", "-o", "none/")
    nasa_video("generate", "a star", "--neg", "red", "--model", "{model}", "-o", "guided/")
    plain, zero, none, guided = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(Path(name).glob("*.png"))])
        for name in ("plain", "zero", "none", "guided")
    )
    assert np.array_equal(plain, zero)
    assert np.array_equal(plain, none)
    assert not np.array_equal(plain, guided)


def test_a_prompt_is_extended_as_its_seed_has_it_and_stored_so(nasa_video: Run) -> None:
    Path("t.yaml").write_text("timeline:\n- {at: 0, prompt: a star}\n- {at: 0.8, prompt: a heart}\n")
    options = ["--timeline", "t.yaml", "--extend-prompt", "--steps", "1", "--frames", "21"]
    done = nasa_video("generate", *options, "--seed", "3", "-o", "a/")
    nasa_video("generate", *options, "--seed", "4", "-o", "b/")
    recipes = [read_metadata(name)["nasa_video"] for name in ("a/", "b/")]
    prompts = [[entry["prompt"] for entry in recipe["timeline"]] for recipe in recipes]
    assert prompts[0] != prompts[1]
    assert [text.split(",")[0] for text in prompts[0]] == ["a star", "a heart"]
    assert all(recipe["prompt"] == texts[0] != "a star" for recipe, texts in zip(recipes, prompts, strict=True))
    assert f"prompt: {recipes[0]['prompt']}" in " ".join(done.stderr.split())
    assert nasa_video("generate", "--from", "a/", "-o", "c/").status == 0
    assert Path("a/000020.png").read_bytes() == Path("c/000020.png").read_bytes()


def test_only_the_sprites_have_words_to_extend_a_prompt_with(nasa_video: Run) -> None:
    done = nasa_video("generate", "a cat", "--extend-prompt", "--model", "causvid", "-o", "a.mp4")
    assert done.status == 1
    assert "language model" in done.stderr


@pytest.mark.parametrize("method", ["nasa", "nasa-centred", "nag", "vsf", "cfg"])
def test_every_method_runs_and_reports_its_effect(nasa_video: Run, method: str) -> None:
    done = nasa_video(
        "generate", "a star", "--neg", "red", "--guidance", method, "--model", "{model}", "-o", "a.mp4", "--json"
    )
    assert done.status == 0
    assert done.json["guidance"] == method
    assert done.json["effect"]["relative_change"] > 1e-3


def test_compare_shows_both_videos_and_a_contact_sheet(nasa_video: Run) -> None:
    done = nasa_video("generate", "a star", "--neg", "red", "--compare", "--model", "{model}", "-o", "c.mp4", "--json")
    assert done.json["contact_sheet"] == "c.png"
    assert Image.open("c.png").width > 400
    wide = read_frames("c.mp4")
    assert wide.shape[0] == 21
    assert wide.shape[2] >= 2 * 64
    nasa_video("generate", "a star", "--neg", "red", "--model", "{model}", "-o", "guided.mp4")
    guided = read_frames("guided.mp4")
    right = wide[:, -guided.shape[1] :, -guided.shape[2] :]
    assert np.abs(right.astype(int) - guided).mean() < 6


def test_a_contact_sheet_does_not_replace_a_picture_of_the_same_name(nasa_video: Run) -> None:
    Image.new("RGB", (64, 32), (200, 30, 40)).save("c.png")
    before = Path("c.png").read_bytes()
    words = ("a star", "--neg", "red", "--compare", "--frames", "9", "--model", "{model}", "-o", "c.mp4", "--json")
    assert nasa_video("generate", *words).json["contact_sheet"] == "c-sheet.png"
    assert nasa_video("generate", *words).json["contact_sheet"] == "c-sheet.png"
    assert Path("c.png").read_bytes() == before


def test_a_video_made_without_folding_is_made_again_without_it(nasa_video: Run) -> None:
    words = ("a star", "--neg", "red", "--frames", "9", "--model", "{model}")
    nasa_video("generate", *words, "--no-fold", "-o", "a.mp4")
    nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4")
    assert read_metadata("b.mp4")["nasa_video"]["fold_padding"] is False
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()
    nasa_video("generate", "--from", "a.mp4", "--fold", "-o", "c.mp4")
    assert read_metadata("c.mp4")["nasa_video"]["fold_padding"] is True


def test_the_scale_may_follow_the_steps_and_the_layers(nasa_video: Run) -> None:
    words = ("a star", "--neg", "red", "--frames", "9", "--model", "{model}", "--json")
    effects = {}
    for name, options in {
        "whole": (),
        "falling": ("--scale-steps", "1,0"),
        "rising": ("--scale-layers", "0,1"),
        "half": ("--scale-steps", "0.5"),
        "scaled": ("--scale", "0.25"),
    }.items():
        done = nasa_video("generate", *words, *options, "-o", f"{name}.mp4")
        effects[name] = done.json["effect"]["relative_change"]
    assert effects["half"] == pytest.approx(effects["scaled"]), "the default scale is 0.5"
    assert effects["half"] < effects["whole"]
    # One of two steps and of two layers is guided with the whole scale, the other not at all.
    assert effects["falling"] != pytest.approx(effects["half"])
    assert nasa_video("generate", "--from", "rising.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path("rising.mp4").read_bytes()


def test_notes_are_shown_before_the_work_begins(nasa_video: Run) -> None:
    done = nasa_video("generate", "a red star " * 20, "--model", "{model}", "--frames", "9", "-o", "a.mp4")
    lines = done.stderr.splitlines()
    note, finished = (next(i for i, line in enumerate(lines) if text in line) for text in ("cut", "9 frames in"))
    assert note < finished


def test_a_seed_is_one_video_whatever_the_sink(nasa_video: Run) -> None:
    words = ("a star", "--neg", "red", "--seed", "3", "--frames", "21", "--model", "{model}")
    for output in ("png/", "again/", "a.mp4", "a.webm"):
        assert nasa_video("generate", *words, "-o", output).status == 0
    exact, again = (
        np.stack([np.asarray(Image.open(path)) for path in sorted(Path(name).glob("*.png"))])
        for name in ("png", "again")
    )
    assert np.array_equal(exact, again)
    for name in ("a.mp4", "a.webm"):
        frames = read_frames(name)
        assert frames.shape == exact.shape
        assert np.abs(frames.astype(int) - exact).mean() < 6, "no more than the encoder's loss"


def test_standard_output_carries_a_playable_stream(model_folder: Path, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "nasa_video", "generate", "a star", "--model", str(model_folder), "-o", "-"]
    done = subprocess.run(command, capture_output=True, check=True)
    (tmp_path / "out.mp4").write_bytes(done.stdout)
    assert len(read_frames(tmp_path / "out.mp4")) == 21


def test_a_timeline_changes_the_picture_from_its_chunk_on(nasa_video: Run) -> None:
    Path("t.yaml").write_text(
        "timeline:\n- {at: 0, prompt: a red star}\n- {at: 0.5, negatives: ['red:0.5', blurry], scale: 0.7}\n"
    )
    nasa_video("generate", "--timeline", "t.yaml", "--frames", "33", "--model", "{model}", "-o", "t/")
    nasa_video("generate", "a red star", "--frames", "33", "--model", "{model}", "-o", "plain/")
    pairs = list(zip(sorted(Path("t").glob("*.png")), sorted(Path("plain").glob("*.png")), strict=True))
    same = [np.array_equal(np.asarray(Image.open(a)), np.asarray(Image.open(b))) for a, b in pairs]
    # 0.5 s at 12 FPS is inside the first chunk of 9 frames; the next chunk is the first that can change.
    assert all(same[:9])
    assert not any(same[10:])


def test_the_window_changes_what_follows_a_prompt_switch(nasa_video: Run) -> None:
    Path("t.yaml").write_text("timeline:\n- {at: 0, prompt: a red star}\n- {at: 0.7, prompt: a blue heart}\n")
    names = ("keep", "recompute", "regenerate")  # the second is what 0.1 called recache
    for name in names:
        nasa_video("generate", "--timeline", "t.yaml", "--on-change", name, "--model", "{model}", "-o", f"{name}/")
    for frame, same in ((8, True), (15, False)):
        pictures = [np.asarray(Image.open(f"{name}/{frame:06}.png")) for name in names]
        for one, other in itertools.combinations(pictures, 2):
            assert np.array_equal(one, other) is same


def test_a_default_name_never_replaces_a_file(nasa_video: Run) -> None:
    first = nasa_video("generate", "a Star!", "--model", "{model}", "--frames", "9", "--json").json["output"]
    second = nasa_video("generate", "a Star!", "--model", "{model}", "--frames", "9", "--json").json["output"]
    assert (first, second) == ("a-star.mp4", "a-star-2.mp4")


def test_models_lists_what_there_is_and_what_it_needs(nasa_video: Run) -> None:
    rows = {row["name"]: row for row in nasa_video("models", "--json").json}
    assert {"sprites", "causvid", "self-forcing"} <= rows.keys()
    assert all({"name", "kind", "present", "licence", "needs"} <= row.keys() for row in rows.values())
    assert rows["causvid"]["present"] is False
    assert any("tianweiy/CausVid" in need for need in rows["causvid"]["needs"])
