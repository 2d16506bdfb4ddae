"""The grammar of negative prompts: one text to its weighted terms, the same wherever a person can write one.

blurry, rain:0.4, (snow:1.2), "black, white": 2      four terms with their weights
a man (glasses:-1) in a park                         inline, in a prompt
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from nasa_video.errors import InputError

MAX_SCALE = 100.0

_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# A number after a colon is a weight, unless a digit stands before the colon: "clock 10:30" is a term.
_WEIGHT = re.compile(rf"^(?P<text>.*?[^\d\s])\s*:\s*(?P<weight>{_NUMBER}|[+-]?(?:nan|inf(?:inity)?))$", re.S | re.I)
_QUOTED = re.compile(rf'^"(?P<text>[^"]*)"\s*(?::\s*(?P<weight>{_NUMBER}|[+-]?(?:nan|inf(?:inity)?)))?$', re.S | re.I)
_INLINE = re.compile(r"\(\s*(?P<text>[^()]*?[^()\d\s])\s*:\s*(?P<weight>-(?:\d+\.?\d*|\.\d+))\s*\)")


@dataclass(frozen=True)
class Negative:
    """One negative prompt and its share of the scale (1 = the whole)."""

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise InputError(f"a negative prompt must be a text, got {type(self.text).__name__}")
        if not self.text.strip():
            raise InputError("a negative prompt must not be empty; leave it out to run without one")
        if isinstance(self.weight, bool) or not isinstance(self.weight, int | float):
            raise InputError(f"the weight of {self.text!r} must be a number such as 0.4, got {self.weight!r}")
        if not (math.isfinite(self.weight) and 0 < self.weight <= MAX_SCALE):
            raise InputError(
                f"the weight of {self.text!r} must be above 0 and at most {MAX_SCALE:g}, got {self.weight}"
            )


Negatives = str | Negative | Sequence[str | Negative] | None
"""Whatever a caller finds natural."""


def parse_terms(text: str) -> tuple[Negative, ...]:
    """The terms of a text: commas separate them, quotes keep one together, ``term:0.4`` and ``(term:1.2)`` weigh it.

    Raises:
        InputError: a quote that is not closed, a weight without a term, or one that is not a positive number.
    """
    return tuple(_term(part) for part in _split(text) if part.strip())


def as_negatives(negative: Negatives) -> tuple[Negative, ...]:
    """Negatives from a text (by the grammar), a :class:`Negative`, several of them, or None.

    Raises:
        InputError: something else, or as :func:`parse_terms`.
    """
    if negative is None:
        return ()
    if isinstance(negative, Negative):
        return (negative,)
    if isinstance(negative, str):
        return parse_terms(negative)
    if not isinstance(negative, Sequence) or isinstance(negative, bytes):
        raise InputError(f"a negative must be a text, a Negative or a list of them, got {type(negative).__name__}")
    for item in negative:
        if not isinstance(item, str | Negative):
            raise InputError(f"a list of negatives must hold texts and Negatives, got {type(item).__name__} in it")
    return tuple(term for item in negative for term in as_negatives(item))


def format_terms(negatives: Sequence[Negative]) -> str:
    """The text that :func:`parse_terms` reads as these negatives."""
    return ", ".join(map(format_term, negatives))


def format_term(negative: Negative) -> str:
    """One term as a text, in quotes where the grammar would read it otherwise."""
    text = negative.text.strip()
    plain = f"{text}{'' if negative.weight == 1 else f':{negative.weight!r}'}"
    try:
        same = parse_terms(plain) == (Negative(text, negative.weight),)
    except InputError:
        same = False
    # The grammar has no escape for a quote inside quotes.
    return plain if same else plain.replace(text, '"' + text.replace('"', "'") + '"', 1)


def split_prompt(prompt: str) -> tuple[str, tuple[Negative, ...]]:
    """A prompt without its inline negatives ``(term:-1)``, and those.

    Raises:
        InputError: a weight that is 0 or too large.
    """
    negatives = tuple(Negative(m["text"].strip(), -float(m["weight"])) for m in _INLINE.finditer(prompt))
    if not negatives:
        return prompt, ()
    rest = re.sub(r"\s+([,.;])", r"\1", " ".join(_INLINE.sub(" ", prompt).split()))
    return re.sub(r"(?:,\s*){2,}", ", ", rest).strip(" ,"), negatives


def _split(text: str) -> list[str]:
    """The parts between commas that are outside quotes and brackets."""
    parts, quoted, depth = [""], False, 0
    for character in text:
        if character == '"':
            quoted = not quoted
        elif not quoted:
            depth = max(0, depth + (character == "(") - (character == ")"))
        if character == "," and not quoted and not depth:
            parts.append("")
        else:
            parts[-1] += character
    if quoted:
        raise InputError(f'the quotes in {text!r} are not closed; close them, as in "black, white"')
    if depth:  # a bracket that stands alone keeps nothing together
        return [piece for part in parts for piece in part.split(",")]
    return parts


def _term(part: str) -> Negative:
    text = part.strip()
    if text.startswith("(") and text.endswith(")") and (inner := _weighted(text[1:-1].strip())):
        return inner
    if text.lstrip('"').startswith(":") and _WEIGHT.match("x" + text):
        raise InputError(f"the negative {text!r} has a weight but no text")
    return _weighted(text) or Negative(text)


def _weighted(text: str) -> Negative | None:
    """A term with a weight or in quotes; None for any other text."""
    found = _QUOTED.match(text) or _WEIGHT.match(text)
    if found is None:
        return None
    weight = found["weight"]
    if weight is not None and not math.isfinite(float(weight)):
        raise InputError(f"the weight in {text!r} must be a number such as 0.4")
    if weight is not None and float(weight) < 0:
        raise InputError(
            f"the weight in {text!r} is negative; a negative prompt needs no sign: write {found['text'].strip()}"
            f":{-float(weight):g}"
        )
    return Negative(found["text"].strip(), 1.0 if weight is None else float(weight))
