"""The one grammar of negatives."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasa_video.errors import InputError
from nasa_video.guidance.terms import Negative, as_negatives, format_terms, parse_terms, split_prompt


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("blurry", [("blurry", 1)]),
        ("ugly, blurry,  low quality", [("ugly", 1), ("blurry", 1), ("low quality", 1)]),
        ("blurry:0.4, (rain:1.2)", [("blurry", 0.4), ("rain", 1.2)]),
        ("blurry: .5", [("blurry", 0.5)]),
        ("clock 10:30", [("clock 10:30", 1)]),
        ("ratio 16:9", [("ratio 16:9", 1)]),
        ('"clock 10:30": 0.5', [("clock 10:30", 0.5)]),
        ('"black, white", grey', [("black, white", 1), ("grey", 1)]),
        ("(blurry, rain)", [("(blurry, rain)", 1)]),
        ("a) first, b) second", [("a) first", 1), ("b) second", 1)]),
        ("(open, bracket", [("(open", 1), ("bracket", 1)]),
        ("note: good", [("note: good", 1)]),
        ("", []),
        (" , ,", []),
        ("(glasses)", [("(glasses)", 1)]),
        ("Unschärfe:2, 雨:0.5", [("Unschärfe", 2), ("雨", 0.5)]),
    ],
)
def test_a_text_is_read_as_these_terms(text: str, terms: list[tuple[str, float]]) -> None:
    assert [(term.text, term.weight) for term in parse_terms(text)] == terms


@pytest.mark.parametrize(
    "text", ["blurry:0", "blurry:-1", "blurry:101", "blurry:nan", "blurry:inf", ":0.5", '"', 'a "b']
)
def test_what_is_no_term_is_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_terms(text)


@given(
    st.lists(
        st.builds(
            Negative,
            st.text(st.characters(exclude_characters='"', exclude_categories=["Cs"]), min_size=1)
            .map(str.strip)
            .filter(bool),
            st.floats(min_value=0.01, max_value=100) | st.just(1.0),
        ),
        max_size=4,
    )
)
def test_formatted_terms_are_read_as_the_same(negatives: list[Negative]) -> None:
    assert parse_terms(format_terms(negatives)) == tuple(negatives)


def test_inline_negatives_leave_the_prompt() -> None:
    assert split_prompt("a man (glasses:-1) in a park") == ("a man in a park", (Negative("glasses"),))
    assert split_prompt("a cat, (blurry: -0.5), (rain:-2)") == ("a cat", (Negative("blurry", 0.5), Negative("rain", 2)))
    assert split_prompt("a (red:1.2) ball") == ("a (red:1.2) ball", ())


@pytest.mark.parametrize("given", [None, "", (), [], [""], "  "])
def test_nothing_is_no_negative(given: Any) -> None:
    assert as_negatives(given) == ()


def test_whatever_a_caller_finds_natural() -> None:
    assert as_negatives(["a, b", Negative("c, d", 2)]) == (Negative("a"), Negative("b"), Negative("c, d", 2))


@pytest.mark.parametrize("given", [3, b"x", [None], [1], {"a": 1}, object()])
def test_what_is_no_negative_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="must"):
        as_negatives(given)
