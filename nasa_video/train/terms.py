"""Negative prompts by a seeded grammar of our own: common terms in eight groups, some with a modifier.

The paper trains with 10,000 negatives "from common terms" and does not publish them (arXiv 2412.02687, section 5.3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from types import MappingProxyType

from nasa_video.errors import InputError

GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "quality": (
            "low quality",
            "poor quality",
            "bad photo",
            "amateur",
            "low resolution",
            "unfinished",
            "sloppy",
            "ugly",
            "low detail",
            "upscaled",
            "blurry",
            "out of focus",
        ),
        "artefact": (
            "compression artefacts",
            "noise",
            "grain",
            "banding",
            "chromatic aberration",
            "lens flare",
            "moire",
            "pixelated",
            "scan lines",
            "smeared",
            "halo",
            "aliasing",
            "glitch",
        ),
        "anatomy": (
            "extra fingers",
            "missing fingers",
            "extra limbs",
            "fused hands",
            "bad anatomy",
            "crossed eyes",
            "long neck",
            "deformed face",
            "bad teeth",
            "twisted arms",
            "two heads",
            "bad proportions",
        ),
        "composition": (
            "cropped",
            "out of frame",
            "cluttered",
            "duplicate",
            "tilted horizon",
            "off centre",
            "crowd",
            "border",
            "empty scene",
            "collage",
            "split screen",
            "distracting background",
        ),
        "style": (
            "cartoon",
            "sketch",
            "painting",
            "render",
            "plastic look",
            "monochrome",
            "sepia",
            "clip art",
            "stock photo",
            "doll-like",
            "kitsch",
        ),
        "light": (
            "overexposed",
            "underexposed",
            "flat light",
            "harsh shadows",
            "washed out",
            "oversaturated",
            "dim",
            "colour cast",
            "backlit",
            "low contrast",
        ),
        "text": (
            "watermark",
            "signature",
            "caption",
            "subtitles",
            "logo",
            "gibberish letters",
            "user name",
            "time stamp",
            "frame number",
            "advertisement",
        ),
        "temporal": (
            "flicker",
            "jitter",
            "frozen",
            "ghosting",
            "stutter",
            "warping",
            "sudden cut",
            "motion blur",
            "looping",
            "morphing",
            "shaky camera",
        ),
    }
)
"""Group → terms."""
MODIFIERS = ("very", "extremely", "slightly", "badly", "heavily", "visibly")
STILL_GROUPS = tuple(name for name in GROUPS if name != "temporal")
"""Groups for pictures."""


def draw_negative(rng: random.Random, groups: tuple[str, ...]) -> str:
    """One prompt: 1 + Poisson(3) terms, at most 8, each with a modifier at 15 %; a tenth of them one or two terms."""
    count = rng.randint(1, 2) if rng.random() < 0.1 else min(1 + _poisson(3.0, rng), 8)
    terms = [term for name in groups for term in GROUPS[name]]
    chosen = rng.sample(terms, min(count, len(terms)))
    return ", ".join(f"{rng.choice(MODIFIERS)} {term}" if rng.random() < 0.15 else term for term in chosen)


def negative_list(count: int, seed: int = 0, groups: tuple[str, ...] = tuple(GROUPS)) -> list[str]:
    """``count`` different negative prompts that follow from the seed.

    Raises:
        InputError: there is no such group, or the groups do not hold so many different prompts.
    """
    unknown = sorted(set(groups) - set(GROUPS))
    if unknown or not groups:
        raise InputError(f"no group of terms {', '.join(unknown) or '(none given)'}; there are {', '.join(GROUPS)}")
    rng = random.Random(f"negatives/{seed}")
    made: dict[str, None] = {}
    tries = 0
    while len(made) < count:
        made.setdefault(draw_negative(rng, groups))
        tries += 1
        if tries > 20 * count + 1000:
            raise InputError(f"these groups hold fewer than {count} different negatives; ask for {len(made)} or fewer")
    return list(made)


def _poisson(mean: float, rng: random.Random) -> int:
    """A Poisson number by multiplication of uniform ones (D. Knuth, The Art of Computer Programming 2, 3.4.1)."""
    limit, product, number = math.exp(-mean), rng.random(), 0
    while product > limit:
        product *= rng.random()
        number += 1
    return number
