"""Guidance and negatives as jobs of an evaluation store them."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from nasa_video.guidance.methods import Guidance, find_method
from nasa_video.guidance.terms import Negative
from nasa_video.models.presets import Strict


class StoredNegative(Strict):
    """A negative prompt and its weight."""

    text: str
    weight: float = 1.0


class StoredGuidance(Strict):
    """A guidance method and all of its settings."""

    method: str
    settings: dict[str, Any]


def store_guidance(guidance: Guidance | None) -> StoredGuidance | None:
    """The method with all its settings, as JSON has them: what is read back is equal to what was stored."""
    if guidance is None:
        return None
    return StoredGuidance(method=guidance.name, settings=json.loads(json.dumps(dataclasses.asdict(guidance))))


def restore_guidance(stored: StoredGuidance | None) -> Guidance | None:
    """The inverse of :func:`store_guidance`.

    Raises:
        InputError: the stored settings are not ones of that method.
    """
    return None if stored is None else find_method(stored.method).of(stored.settings)


def store_negatives(negatives: tuple[Negative, ...]) -> tuple[StoredNegative, ...]:
    """Negatives in their stored form."""
    return tuple(StoredNegative(text=n.text, weight=n.weight) for n in negatives)


def restore_negatives(stored: tuple[StoredNegative, ...]) -> tuple[Negative, ...]:
    """The inverse of :func:`store_negatives`."""
    return tuple(Negative(n.text, n.weight) for n in stored)
