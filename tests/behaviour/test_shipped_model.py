"""What a negative prompt does to the shipped model: few videos and wide margins, but it fails when guidance breaks."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from nasa_video import CentredNasa, ClassifierFree, Nasa, VideoPipeline, Vsf
from nasa_video.evaluation.benchmarks.removal import SpritesJudge, run_cases
from nasa_video.evaluation.benchmarks.removal_cases import build_cases
from nasa_video.evaluation.samples import Method
from nasa_video.sprites.world import SHAPES

NUM = 8


def removed(pipeline: VideoPipeline, judge: SpritesJudge, method: Method, steps: int = 4) -> float:
    """Share of conflicts (the prompt asks for a colour or background, the negative names it) where it is gone."""
    cases = [case for name in ("colour", "background") for case in build_cases(name, "conflict", NUM, "choose")]
    verdicts = run_cases(pipeline, method, steps, cases, judge, frames=21, batch=NUM)
    return sum(verdict.removed for verdict in verdicts) / len(verdicts)


def test_the_model_shows_the_colour_and_background_that_it_is_asked_for(
    pipeline: VideoPipeline, judge: SpritesJudge
) -> None:
    # What is asked for is there when it counts as not removed; "unsure" counts as not removed either, so look closer.
    cases = [case for name in ("colour", "background") for case in build_cases(name, "conflict", NUM, "choose")]
    chunks = list(
        pipeline.stream_batch([case.prompt for case in cases], seeds=[case.seed for case in cases], frames=21, steps=4)
    )
    labels = judge(list(np.concatenate([chunk.frames for chunk in chunks], axis=1)))
    shown = [row[case.attribute] == case.value for row, case in zip(labels, cases, strict=True)]
    assert sum(shown) / len(shown) >= 0.7


def test_what_a_prompt_leaves_open_differs_from_seed_to_seed(pipeline: VideoPipeline, judge: SpritesJudge) -> None:
    """Without the opening (docs/method/variety.md) nine in ten sprites are big and plain, and there is no weather."""
    prompts = [f"a {shape}" for shape in SHAPES for _ in range(6)]
    chunks = pipeline.stream_batch(prompts, seeds=range(len(prompts)), frames=21, steps=4)
    labels = judge(list(np.concatenate([chunk.frames for chunk in chunks], axis=1)))
    shown = {name: Counter(row[name] for row in labels) for name in labels[0]}
    assert 0.25 <= shown["size"]["small"] / len(prompts) <= 0.75
    assert 0.1 <= 1 - shown["texture"]["plain"] / len(prompts) <= 0.6
    assert 0.1 <= 1 - shown["weather"]["none"] / len(prompts) <= 0.5
    assert len([value for value, count in shown["background"].items() if count >= 2]) >= 5
    assert max(shown["colour"].values()) <= len(prompts) / 2


def test_a_negative_wins_over_the_prompt_with_nasa_and_not_with_classifier_free_guidance(
    pipeline: VideoPipeline, judge: SpritesJudge
) -> None:
    unguided = removed(pipeline, judge, Method("none", None))
    nasa = removed(pipeline, judge, Method("nasa", Nasa(1.25)))
    cfg = removed(pipeline, judge, Method("cfg", ClassifierFree(3.0)))
    assert unguided <= 0.25
    assert nasa >= 0.6
    assert cfg <= nasa - 0.3


def test_the_models_own_guidance_removes_and_holds(pipeline: VideoPipeline, judge: SpritesJudge) -> None:
    own = pipeline.guidance()
    assert isinstance(own, CentredNasa)
    cases = build_cases("colour", "conflict", NUM, "choose") + build_cases("blurry", "stated", NUM, "choose")
    verdicts = run_cases(pipeline, Method("own", own), 4, cases, judge, frames=21, batch=NUM)
    assert sum(verdict.removed for verdict in verdicts) >= 12
    assert sum(verdict.removed and verdict.held for verdict in verdicts) >= 8


def test_value_sign_flip_removes_too(pipeline: VideoPipeline, judge: SpritesJudge) -> None:
    assert removed(pipeline, judge, Method("vsf", Vsf(1.4))) >= 0.6


def test_the_limit_keeps_what_was_asked_for_where_nothing_contradicts(
    pipeline: VideoPipeline, judge: SpritesJudge
) -> None:
    """Without it, steering away from a dim that nobody asked for turns striped and checkered backgrounds plain."""
    own = pipeline.guidance()
    assert isinstance(own, CentredNasa)
    cases = build_cases("dim", "unmentioned", 2 * NUM, "choose")
    held = {}
    for guidance in (own, replace(own, limit=None)):
        verdicts = run_cases(pipeline, Method("own", guidance), 2, cases, judge, frames=21, batch=NUM)
        assert all(verdict.removed for verdict in verdicts)
        held[guidance.limit] = sum(verdict.held for verdict in verdicts)
    assert held[own.limit] >= held[None] + 2
