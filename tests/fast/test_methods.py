"""The registry of methods and their one spelling."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, TextKeys, WeightedKeys
from nasa_video.guidance.methods import (
    METHODS,
    AttentionGuidance,
    CentredNasa,
    ClassifierFree,
    GuidedAttention,
    Nag,
    Nasa,
    Vsf,
    check_settings,
    parse_guidance,
    parse_methods,
    register,
    spell,
)
from nasa_video.guidance.schedule import ScaleSchedule

MODEL = {"nasa-centred": {"scale": 0.5, "conflict": 2.0, "limit": 0.3}, "nag": {"negative_padding": False}}


@pytest.mark.parametrize(
    ("spelling", "method"),
    [
        ("nasa", Nasa()),
        ("nasa:0.8", Nasa(0.8)),
        ("NASA : 0.8", Nasa(0.8)),
        ("nasa-centred", CentredNasa(0.5, conflict=2.0, limit=0.3)),
        ("nasa-centred:1,limit=none", CentredNasa(1.0, conflict=2.0)),
        ("nasa-centred:0.5, conflict=0, limit=0.6", CentredNasa(0.5, limit=0.6)),
        ("nag:3,tau=1.5,alpha=0.5", Nag(3, tau=1.5, alpha=0.5, negative_padding=False)),
        ("nag,padding=yes", Nag()),
        ("vsf:1.4,bias=-1.5,padding=yes", Vsf(1.4, bias=-1.5, negative_padding=True)),
        ("cfg:2", ClassifierFree(2)),
        (
            "nasa:1,last_step=0.5,clean_pass=no,layer_scales=0/1",
            Nasa(1, schedule=ScaleSchedule(last_step=0.5, clean_pass=False, layer_scales=(0.0, 1.0))),
        ),
        ("nasa+nopad:0.1", Nasa(0.1, negative_padding=False)),
        ("nasa-centred+conflict0+nolimit:2", CentredNasa(2)),
        ("none", None),
        ("", None),
        (Nasa(0.3), Nasa(0.3)),
    ],
)
def test_a_spelling_with_a_models_settings(spelling: Any, method: Any) -> None:
    assert parse_guidance(spelling, MODEL) == method


@pytest.mark.parametrize(
    ("spelling", "told"),
    [
        ("nasa-centered", "did you mean 'nasa-centred'"),
        ("nsa:1", "did you mean 'nasa'"),
        ("nasa:x", "scale must be a number, got 'x'"),
        ("nasa:-1", "from 0 to 100"),
        ("nasa:nan", "from 0 to 100"),
        ("nag:0.5", "from 1 to 100"),
        ("nasa:1,conflict=2", "nasa has no setting 'conflict'"),
        ("nasa-centred,limt=2", "did you mean 'limit'"),
        ("nasa,padding=maybe", "yes or no"),
        ("nasa,step_scales=1/x", "numbers such as 1/0.5/0"),
        ("nasa,first_step=0.8,last_step=0.2", "first <= last"),
        ("nasa,0.5", "SETTING=VALUE"),
        ("nasa,scale=none", "must be a number"),
        ("none:2", "no settings"),
        (3, "spelling such as"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(spelling: Any, told: str) -> None:
    with pytest.raises(InputError, match="(?s)" + told.replace("(", r"\(")):
        parse_guidance(spelling)


SHARES = st.lists(st.floats(0, 1), max_size=3).map(tuple)
SCHEDULES = st.builds(ScaleSchedule, last_step=st.floats(0, 1), clean_pass=st.booleans(), step_scales=SHARES)
NUMBERS = st.floats(0, 100)


@given(
    st.builds(Nasa, NUMBERS, negative_padding=st.booleans(), schedule=SCHEDULES)
    | st.builds(CentredNasa, NUMBERS, conflict=NUMBERS, limit=st.none() | NUMBERS)
    | st.builds(Nag, st.floats(1, 100), tau=st.floats(1, 100), alpha=st.floats(0, 1), schedule=SCHEDULES)
    | st.builds(Vsf, NUMBERS, bias=st.floats(-100, 100), negative_padding=st.booleans())
    | st.builds(ClassifierFree, st.floats(1, 100))
)
def test_a_method_is_read_back_from_its_spelling(method: Any) -> None:
    assert parse_guidance(spell(method)) == method


def test_older_recipes_store_fields_and_lists() -> None:
    stored = {
        "scale": 0.5,
        "negative_padding": True,
        "schedule": {"last_step": 0.5, "step_scales": [1, 0]},
        "limit": None,
    }
    assert CentredNasa.of(stored) == CentredNasa(0.5, schedule=ScaleSchedule(last_step=0.5, step_scales=(1, 0)))
    with pytest.raises(InputError, match="a schedule has no 'middle'"):
        Nasa.of({"schedule": {"middle": 1}})


def test_lists_of_methods() -> None:
    read = parse_methods("none, cfg:2,nasa-centred:0.5,conflict=2,limit=0.3;vsf:1.4")
    assert read == {
        "none": None,
        "cfg:2": ClassifierFree(2),
        "nasa-centred:0.5,conflict=2,limit=0.3": CentredNasa(0.5, conflict=2, limit=0.3),
        "vsf:1.4": Vsf(1.4),
    }
    for wrong in ("", " , ", "nasa,nasa", "nasa,what"):
        with pytest.raises(InputError):
            parse_methods(wrong)


def test_a_models_settings_are_checked() -> None:
    assert check_settings(MODEL) == MODEL
    for wrong in ({"nasa": {"conflict": 1}}, {"what": {}}, {"nag": {"scale": 0}}, {"nasa": {"negative_padding": 1}}):
        with pytest.raises(InputError):
            check_settings(wrong)


@pytest.fixture
def half() -> Iterator[type[AttentionGuidance]]:
    """A method of a user's own, registered for one test."""

    @register
    @dataclass(frozen=True)
    class Half(AttentionGuidance):
        name: ClassVar[str] = "half"
        label: ClassVar[str] = "half"

        def __call__(
            self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
        ) -> GuidedAttention:
            return Nasa(self.scale / 2)(q, positive, negatives, attend)

    yield Half
    del METHODS["half"]


def test_a_method_of_ones_own_is_spelled_like_any_other(half: type[AttentionGuidance]) -> None:
    method = parse_guidance("half:0.5,padding=no")
    assert method == half(0.5, negative_padding=False)
    assert parse_guidance(spell(method)) == method


def test_a_name_is_registered_once_and_can_be_spelled() -> None:
    for name in ("nasa", "none", "", "two words", "Capital", "a:b"):
        with pytest.raises(InputError):
            register(type("Other", (AttentionGuidance,), {"name": name}))

    class Unknown(Nasa):
        pass

    with pytest.raises(InputError, match="not registered"):
        spell(Unknown(1))


def test_every_setting_has_bounds_and_help() -> None:
    for method in METHODS.values():
        settings = method.settings()
        assert settings[0].name == "scale"
        assert len({s.name for s in settings}) == len(settings)
        assert all(s.help for s in settings)
        assert method.label


def test_methods_terms_and_schedules_load_without_torch() -> None:
    probe = "import sys, nasa_video.guidance.methods, nasa_video.guidance.terms; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe], check=False).returncode == 0
