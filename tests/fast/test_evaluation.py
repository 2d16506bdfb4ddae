"""Intervals, measures and the bookkeeping of the removal table."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation import metrics
from nasa_video.evaluation.benchmarks.removal import verdict
from nasa_video.evaluation.benchmarks.removal_cases import CONFLICT, STATED, UNMENTIONED, attributes_of, build_cases
from nasa_video.evaluation.metrics import Quality, quality
from nasa_video.evaluation.results import Metric
from nasa_video.evaluation.statistics import wilson
from nasa_video.sprites.captions import TERMS

ANY = {"out_of_range": 0.0, **dataclasses.asdict(Quality(100.0, 1.0, 0.0, 50.0, 0.0, 1.0))}


def test_wilson_matches_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    low, high = wilson(81, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_wilson_stays_inside_and_holds_the_share() -> None:
    for n in (1, 7, 200):
        for successes in (0, n // 2, n):
            low, high = wilson(successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert high - low > 0
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="from 0 to n = 3"):
        wilson(4, 3)


def _picture(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    y, x = np.mgrid[0:48, 0:64]
    grey = 60 + 120 * (((x // 8) + (y // 8)) % 2) + 0.3 * x
    frame = np.stack([grey, grey * 0.8, 255 - grey], axis=-1)
    return np.repeat(frame[None], 6, axis=0) + rng.normal(0, 0.1, (6, 48, 64, 3))


def _as_video(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return values.clip(0, 255).round().astype(np.uint8)


def test_each_measure_answers_to_its_own_flaw() -> None:
    from PIL import Image, ImageFilter

    rng = np.random.default_rng(0)
    clean = _picture(rng)
    base = quality(_as_video(clean))
    blurred = np.stack([np.asarray(Image.fromarray(f).filter(ImageFilter.GaussianBlur(3))) for f in _as_video(clean)])
    noisy = quality(_as_video(clean + rng.normal(0, 18, clean.shape)))
    dim = quality(_as_video(clean * 0.3))
    flicker = quality(_as_video(clean * np.array([1, 0.6] * 3)[:, None, None, None]))
    assert quality(blurred).sharpness < 0.5 * base.sharpness
    assert noisy.noise > 5 > base.noise
    assert noisy.sharpness == pytest.approx(base.sharpness, rel=0.25)
    assert dim.luma == pytest.approx(0.3 * base.luma, rel=0.02)
    assert dim.sharpness == pytest.approx(base.sharpness, rel=0.1)
    assert flicker.flicker > 20 > base.flicker
    assert flicker.motion < flicker.flicker
    assert quality(_as_video(clean.mean(axis=-1, keepdims=True).repeat(3, axis=-1))).colourfulness < 1
    assert base.motion < 1 < quality(_as_video(np.stack([np.roll(f, 4 * i, 1) for i, f in enumerate(clean)]))).motion


def test_one_frame_and_flat_pictures_have_measures() -> None:
    flat = quality(np.full((1, 8, 8, 3), 90, np.uint8))
    assert (flat.sharpness, flat.flicker, flat.motion) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("kind", ["unmentioned", "stated", "conflict"])
def test_cases_say_what_their_kind_promises(kind: Any) -> None:
    for attribute in attributes_of(kind):
        for case in build_cases(attribute, kind, 12, "report"):
            assert case.negative in {phrases[0] for phrases in TERMS[attribute].values()}
            mentioned = [p for p in TERMS[attribute][case.value] if f" {p}" in f" {case.prompt},"]
            if kind == "unmentioned":
                assert attribute not in case.stated
                if attribute not in ("texture", "background", "count", "shape"):  # their words occur in other phrases
                    assert not mentioned, case
            elif attribute not in ("count",):
                assert mentioned, case
            assert attribute not in case.stated


def test_the_two_splits_share_nothing_and_draws_repeat() -> None:
    for attribute in ("colour", "blurry"):
        choose = build_cases(attribute, "unmentioned", 50, "choose")
        report = build_cases(attribute, "unmentioned", 50, "report")
        assert not {case.seed for case in choose} & {case.seed for case in report}
        assert report == build_cases(attribute, "unmentioned", 50, "report")
        assert report[:10] == build_cases(attribute, "unmentioned", 10, "report")
        assert report != build_cases(attribute, "unmentioned", 50, "report", seed=1)


def test_unsure_is_neither_removed_nor_held() -> None:
    case = build_cases("colour", "conflict", 1, "report")[0]
    good = {**case.stated, "colour": "none"}
    assert verdict(case, good, ANY).removed
    assert verdict(case, good, ANY).held
    assert not verdict(case, {**good, "colour": "unsure"}, ANY).removed
    assert not verdict(case, {**good, "colour": f"{case.value}+pink"}, ANY).removed
    assert not verdict(case, {**good, "shape": "unsure"}, ANY).held


def test_kinds_cover_the_world() -> None:
    assert {"blurry", "watermark"} <= set(STATED) & set(UNMENTIONED)
    assert set(CONFLICT) == {"shape", "colour", "background", "motion", "size"}


def test_a_new_measure_is_one_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image
    from typer.testing import CliRunner

    from nasa_video.cli.evaluate import evaluate

    monkeypatch.setattr(metrics, "MEASURES", dict(metrics.MEASURES))

    @metrics.register_measure
    class Red(metrics.Measure):
        metrics = (Metric(name="red", title="red"),)

        def __call__(self, frames: Any) -> dict[str, float]:
            return {"red": float(frames[..., 0].mean())}

    Image.new("RGB", (8, 8), (200, 0, 0)).save(tmp_path / "a.png")
    said = CliRunner().invoke(evaluate, ["quality", str(tmp_path / "a.png"), "--json"])
    assert json.loads(said.stdout.splitlines()[-1])["rows"][0]["red"] == 200
    assert "red" in [metric.name for metric in metrics.measured_metrics()]

    class Again(metrics.Measure):
        metrics = (Metric(name="luma", title="luma"),)

    with pytest.raises(InputError, match="names of their own"):
        metrics.register_measure(Again)

    @metrics.register_measure
    class Broken(Red):
        metrics = (Metric(name="broken", title="broken"),)

        def __call__(self, frames: Any) -> dict[str, float]:
            return {"broken": float("nan")}

    with pytest.raises(NasaVideoError, match="Broken gave no number for broken"):
        metrics.measure(np.zeros((1, 8, 8, 3), np.uint8))
