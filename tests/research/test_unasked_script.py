"""What counts as something that nobody asked for."""

from __future__ import annotations

import pytest

from nasa_video.evaluation.cases import Case
from nasa_video.sprites.detectors import UNSURE
from nasa_video.sprites.world import ATTRIBUTES


@pytest.mark.parametrize(
    ("attribute", "seen", "expected"),
    [
        ("colour", {}, set()),
        ("colour", {"weather": "rain", "count": "two", "colour": "blue"}, {"weather", "count"}),
        ("weather", {"weather": "rain", "dim": "dim"}, {"dim"}),
        ("colour", {"texture": UNSURE, "motion": "left"}, set()),
    ],
)
def test_what_a_plain_sprite_is_without_is_unasked_but_what_the_case_is_about(
    request, monkeypatch, attribute, seen, expected
):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "research"))
    from measure_unasked import unasked

    plain = {name: values[0] for name, values in ATTRIBUTES.items()}
    case = Case(attribute, ATTRIBUTES[attribute][1], "unmentioned", "a star", "a term", {}, 0)
    assert unasked(case, plain | seen) == expected
