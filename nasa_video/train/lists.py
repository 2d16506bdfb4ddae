"""Prompts and negatives: read, made by a seeded grammar, and drawn so that a batch follows from its seed alone."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from nasa_video.errors import InputError
from nasa_video.files.atomic import atomic_write
from nasa_video.train.settings import FileList, GrammarList, SpritesList, TextList

_WORD = re.compile(r"[^\W\d_]+")
# Words that say nothing about what is shown: two texts may share them.
_EMPTY_WORDS_TEXT = """
a an and at background bad by extra for from in is it its low much no of on one or out poor the to two very visibly
with
"""
_EMPTY_WORDS = frozenset(_EMPTY_WORDS_TEXT.split())

_TERMS = {
    "quality": """
        low quality, poor quality, bad photo, amateur, low resolution, unfinished, sloppy, ugly, low detail, upscaled,
        blurry, out of focus
    """,
    "artefact": """
        compression artefacts, noise, grain, banding, chromatic aberration, lens flare, moire, pixelated, scan lines,
        smeared, halo, aliasing, glitch
    """,
    "anatomy": """
        extra fingers, missing fingers, extra limbs, fused hands, bad anatomy, crossed eyes, long neck, deformed face,
        bad teeth, twisted arms, two heads, bad proportions
    """,
    "composition": """
        cropped, out of frame, cluttered, duplicate, tilted horizon, off centre, crowd, border, empty scene, collage,
        split screen, distracting background
    """,
    "style": """
        cartoon, sketch, painting, render, plastic look, monochrome, sepia, clip art, stock photo, doll-like, kitsch
    """,
    "light": """
        overexposed, underexposed, flat light, harsh shadows, washed out, oversaturated, dim, colour cast, backlit,
        low contrast
    """,
    "text": """
        watermark, signature, caption, subtitles, logo, gibberish letters, user name, time stamp, frame number,
        advertisement
    """,
    "temporal": """
        flicker, jitter, frozen, ghosting, stutter, warping, sudden cut, motion blur, looping, morphing, shaky camera
    """,
}
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {name: tuple(term.strip() for term in terms.split(",")) for name, terms in _TERMS.items()}
)
"""Group → common terms of negative prompts; the paper does not publish its 10,000 (arXiv 2412.02687, section 5.3)."""
MODIFIERS = ("very", "extremely", "slightly", "badly", "heavily", "visibly")
STILL_GROUPS = tuple(name for name in GROUPS if name != "temporal")
"""Groups for images."""


def read_texts(path: Path) -> list[str]:
    """The texts of a file, one a line, each once, in order; empty lines and # lines are left out.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as UTF-8 text, one prompt a line: {error}") from error
    texts = list(dict.fromkeys(" ".join(line.split()) for line in lines))
    texts = [text for text in texts if text and not text.startswith("#")]
    if not texts:
        raise InputError(f"{path} holds no text; write one prompt a line")
    return texts


def write_texts(path: Path, texts: Iterable[str], heading: str = "") -> None:
    """Write one text a line, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    with atomic_write(path, parents=True) as part, part.open("w", encoding="utf-8") as file:
        file.writelines([f"# {heading}\n"] if heading else [])
        file.writelines(f"{text}\n" for text in texts)


def build_prompts(paths: Sequence[Path], longest_words: int = 80, limit: int | None = None, seed: int = 0) -> list[str]:
    """A prompt list from any text files: one text a line, cleaned, each once, shuffled by the seed.

    Args:
        longest_words: longer texts are left out; text encoders cut them.
        limit: of the list's length, after the shuffle.

    Raises:
        InputError: a file cannot be read, or nothing is left.
    """
    texts = list(dict.fromkeys(text for path in paths for text in read_texts(path)))
    kept = [text for text in texts if _WORD.search(text) and len(text.split()) <= longest_words]
    if not kept:
        raise InputError(f"none of {len(texts)} texts has a word and at most {longest_words} words")
    random.Random(f"prompts/{seed}").shuffle(kept)
    return kept[:limit]


def make_texts(source: TextList, *, negatives: bool, still: bool = False) -> list[str]:
    """The texts of a list.

    Args:
        negatives: whether negatives are wanted, or prompts.
        still: of images, which have no motion to complain about.

    Raises:
        InputError: no file was given, or it cannot be used.
    """
    what = "negatives" if negatives else "prompts"
    if isinstance(source, FileList):
        if source.path is None:
            raise InputError(f"this config leaves the {what} to you: give --{what} FILE, one a line")
        return read_texts(source.path)
    if isinstance(source, GrammarList):
        return negative_list(source.count, source.seed, STILL_GROUPS if still else tuple(GROUPS))
    return _sprites_negatives(source) if negatives else _sprites_prompts(source)


def content_words(text: str) -> frozenset[str]:
    """Words of a text that say what is shown, in lower case."""
    return frozenset(word for word in _WORD.findall(text.lower()) if word not in _EMPTY_WORDS)


def draw_negative_for(prompt: str, negatives: Sequence[str], rng: random.Random, avoid_overlap: bool) -> str:
    """A negative for a prompt; one that shares no word with it where that is wanted and found within 20 tries."""
    chosen = rng.choice(negatives)
    if not avoid_overlap:
        return chosen
    words = content_words(prompt)
    for _ in range(20):
        if not words & content_words(chosen):
            return chosen
        chosen = rng.choice(negatives)
    return ""  # everything overlaps: rather none than one that forbids what is asked for


def _sprites_prompts(source: SpritesList) -> list[str]:
    """Captions for training of scenes drawn with the seed, each once."""
    import torch

    from nasa_video.sprites.captions import random_caption
    from nasa_video.sprites.world import sample_scenes

    rng = random.Random(f"captions/{source.seed}")
    generator = torch.Generator().manual_seed(source.seed)
    texts: dict[str, None] = {}
    while len(texts) < source.count:
        scenes = sample_scenes(min(256, source.count), generator)
        for index in range(len(scenes)):
            texts.setdefault(random_caption(scenes.row(index), rng).text)
    return list(texts)[: source.count]


def _sprites_negatives(source: SpritesList) -> list[str]:
    """Every phrase of the world's vocabulary by itself, and lists of two or three of them, up to the count."""
    from nasa_video.sprites.captions import TERMS

    rng = random.Random(f"sprites negatives/{source.seed}")
    phrases = {
        attribute: [phrase for value, choices in values.items() if value not in ("none", "one") for phrase in choices]
        for attribute, values in TERMS.items()
    }
    texts = dict.fromkeys(phrase for choices in phrases.values() for phrase in choices)
    while len(texts) < source.count:
        attributes = rng.sample(sorted(phrases), rng.randint(2, 3))
        texts.setdefault(", ".join(rng.choice(phrases[attribute]) for attribute in attributes))
    return list(texts)[: source.count]


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
