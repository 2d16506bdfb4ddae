"""Intervals, measures and the bookkeeping of the removal table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nasa_video.errors import InputError
from nasa_video.evaluation import removal
from nasa_video.evaluation.cases import CONFLICT, STATED, UNMENTIONED, attributes_of, build_cases
from nasa_video.evaluation.quality import Quality, quality
from nasa_video.evaluation.removal import Cell, Method, Verdict, cells, parse_methods, row_of, verdict
from nasa_video.evaluation.report import markdown, summary
from nasa_video.evaluation.statistics import wilson
from nasa_video.guidance.methods import METHODS, CentredNasa, Guidance, Nag, Nasa, Vsf
from nasa_video.sprites.captions import TERMS

ANY = Quality(100.0, 1.0, 0.0, 50.0, 0.0, 1.0)


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
    assert verdict(case, good, 0.0, ANY).removed
    assert verdict(case, good, 0.0, ANY).held
    assert not verdict(case, {**good, "colour": "unsure"}, 0.0, ANY).removed
    assert not verdict(case, {**good, "colour": f"{case.value}+pink"}, 0.0, ANY).removed
    assert not verdict(case, {**good, "shape": "unsure"}, 0.0, ANY).held


def test_a_row_counts_removed_held_and_both() -> None:
    verdicts = [Verdict(True, True, 0.0, ANY), Verdict(True, False, 0.2, ANY), Verdict(False, True, 0.0, ANY)]
    row = row_of(Cell(Method("nasa:1", Nasa(1.0)), 4, "colour", "conflict"), verdicts)
    assert (row["n"], row["removed"], row["held"], row["both"]) == (3, 2 / 3, 2 / 3, 1 / 3)
    assert row["both_interval"] == wilson(1, 3)
    assert row["out_of_range"] == pytest.approx(0.2 / 3)
    assert {"method", "scale", "steps", "attribute", "case"} <= row.keys()


def test_a_killed_table_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = list(cells([Method("none", None)], [4], ["conflict"], ["colour", "shape", "size"]))
    made: list[str] = []

    def run_cases(pipeline: Any, method: Method, steps: int, cases: Any, *rest: Any) -> list[Verdict]:
        made.append(cases[0].attribute)
        if len(made) == 3:
            raise KeyboardInterrupt
        return [Verdict(True, True, 0.0, ANY)] * len(cases)

    class Model:
        class preset:
            name = "m"

        def opening_in(self, first_steps: None) -> Model:
            return self

    monkeypatch.setattr(removal, "run_cases", run_cases)
    journal = tmp_path / "journal.jsonl"

    def run(n: int) -> list[dict[str, Any]]:
        return removal.removal_table(Model(), plan, None, n=n, split="report", frames=9, journal=journal)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        run(2)
    with journal.open("a") as file:
        file.write('{"key": "none/4/conflict/si')  # what a kill in the middle of a write leaves
    rows = run(2)
    assert made == ["shape", "colour", "size", "size"]
    assert [row["attribute"] for row in rows] == ["shape", "colour", "size"]
    run(5)
    assert made[4:] == ["shape", "colour", "size"], "another n is another table"


def test_the_report_has_every_cell(tmp_path: Path) -> None:
    from nasa_video.evaluation.report import plot

    cell = Cell(Method("nasa:1", Nasa(1.0)), 4, "colour", "conflict")
    rows = [row_of(cell, [Verdict(True, i % 2 == 0, 0.0, ANY) for i in range(8)])]
    text = markdown(rows)
    assert "| nasa:1 | 4 | conflict | colour | 8 | 100.0 (67.6 to 100.0) | 50.0 (21.5 to 78.5) |" in text
    assert summary(rows)[0]["held"] == 0.5
    plot(rows, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000
    assert json.loads(json.dumps(rows)) is not None


def test_any_number_of_variants_is_drawn(tmp_path: Path) -> None:
    from nasa_video.evaluation.report import plot

    variants = [Method(f"nag+tau{tau}:3", Nasa(1.0)) for tau in range(30)]
    verdicts = [Verdict(True, True, 0.0, ANY)]
    plot([row_of(Cell(one, 4, "colour", "conflict"), verdicts) for one in variants], tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 5000


def test_kinds_cover_the_world() -> None:
    assert {"blurry", "watermark"} <= set(STATED) & set(UNMENTIONED)
    assert set(CONFLICT) == {"shape", "colour", "background", "motion", "size"}


class _Preset:
    """A model whose centred NASA rises with what prompt and negative share, and has a limit."""

    def guidance(self, method: str = "nasa", scale: float | None = None) -> Guidance:
        if method not in METHODS:
            raise InputError(f"no method {method}")
        settings: dict[str, float] = {"conflict": 1.0, "limit": 0.4} if method == "nasa-centred" else {}
        return METHODS[method](**settings | ({} if scale is None else {"scale": scale}))


def test_methods_are_read_with_their_switches():
    text = (
        "none, nasa:0.8, nasa+nopad:0.1, nasa-centred:0.5, nasa-centred+conflict2.5+nolimit:1, "
        "nasa-centred+conflict0+nopad+limit0.2:1, nag+nopad+tau1.5+alpha0.5:3, vsf+bias-1.5:2"
    )
    methods = parse_methods(text, _Preset())
    assert [method.guidance for method in methods] == [
        None,
        Nasa(0.8),
        Nasa(0.1, negative_padding=False),
        CentredNasa(0.5, conflict=1.0, limit=0.4),
        CentredNasa(1.0, conflict=2.5),
        CentredNasa(1.0, limit=0.2, negative_padding=False),
        Nag(3.0, tau=1.5, alpha=0.5, negative_padding=False),
        Vsf(2.0, bias=-1.5),
    ]


@pytest.mark.parametrize(
    "label",
    [
        "nasa+conflict2:1",
        "nasa-centred+conflict:1",
        "nasa-centred+conflict99999:1",
        "nasa-centred+limit:1",
        "nasa-centred+limit99999:1",
        "nasa+nolimit:1",
        "nasa+loud",
        "nasa+tau2:1",
        "nag+alpha1.5:3",
        "nag+bias1:3",
        "nag+name2:3",
        "vsf+bias--1:1",
        "cfg+nopad:2",
        "apg",
        "nasa:x",
        "nasa:-1",
        "none:1",
        "",
    ],
)
def test_methods_that_there_are_not_are_refused(label):
    with pytest.raises(InputError):
        parse_methods(label, _Preset())
