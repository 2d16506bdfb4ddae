"""Human Preference Score v2 (arXiv 2306.09341) over its four styles of prompts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import JsonValue

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import Asset, read_json
from nasa_video.evaluation.benchmarks.base import Benchmark, CosineScorer
from nasa_video.evaluation.clip import Backbone
from nasa_video.evaluation.results import Metric
from nasa_video.evaluation.samples import Sample
from nasa_video.files.atomic import file_sha256

# 986 million parameters in float16.
HPS_ASSETS = {
    "v2": Asset("the HPS v2 scorer", "xswu/HPSv2", "HPS_v2_compressed.pt", 1.97, "Apache-2.0"),
    "v2.1": Asset("the HPS v2.1 scorer", "xswu/HPSv2", "HPS_v2.1_compressed.pt", 1.97, "Apache-2.0"),
}
STYLES = ("anime", "concept-art", "paintings", "photo")
PROMPTS_A_STYLE = 800


@dataclass(frozen=True)
class HpsPrompts:
    """Which of HPSv2's prompts: the first ``limit`` of each style (None: all 800), from a folder or the hub's cache."""

    styles: tuple[str, ...]
    limit: int | None
    folder: Path | None
    negative: str
    seed: int


def hpsv2(version: str, prompts: HpsPrompts, checkpoint: Path | None, device: str | None, backbone: str) -> Benchmark:
    """Cosine of still and prompt under a fine-tuned CLIP, times 100; stills are padded to squares, as in HPSv2's code.

    Args:
        version: "v2" or "v2.1"; their scores do not compare.
        checkpoint: the scorer's file, where it is not in the hub's cache.
        backbone: its architecture; ViT-H-14 for the published ones.

    Raises:
        InputError: an unknown version, or prompts or weights are missing.
    """
    if version not in HPS_ASSETS:
        raise InputError(f"--hps-version must be one of {', '.join(HPS_ASSETS)}, got {version!r}")
    samples, sources = _samples(prompts)
    file = checkpoint or HPS_ASSETS[version].fetch("--checkpoint FILE")
    if not file.is_file():
        raise InputError(f"the scorer {file} does not exist; --checkpoint takes {HPS_ASSETS[version].file}")
    new_scorer = partial(CosineScorer, Backbone(backbone, str(file)), device, "longest")
    scorer = new_scorer()
    settings: dict[str, JsonValue] = {
        "hps_version": version, "scorer": scorer.identity, "scale": "cosine x 100", "prompts": sources,
        "styles": list(prompts.styles), "prompts_a_style": prompts.limit, "negative": prompts.negative,
        "seed": prompts.seed,
    }  # fmt: skip
    return Benchmark(
        "hpsv2",
        f"HPS{version}",
        samples,
        lambda sample: {"texts": [sample.prompt]},
        scorer,
        new_scorer,
        (Metric(name="hpsv2", title=f"HPS{version}"),),
        lambda measured: {"hpsv2": 100 * measured["cosines"][0]},
        settings,
        ("One still a prompt; the i-th prompt of the run has the seed --seed + i, in every arm.", *shortened(samples)),
    )


def _samples(prompts: HpsPrompts) -> tuple[list[Sample], dict[str, JsonValue]]:
    samples: list[Sample] = []
    sources: dict[str, JsonValue] = {}
    for style in prompts.styles:
        texts, path = style_prompts(style, prompts.folder)
        sources[style] = f"{path.name}, SHA-256 {file_sha256(path)}, {len(texts)} prompts"
        for index, text in enumerate(texts[: prompts.limit]):
            seed = prompts.seed + len(samples)
            samples.append(Sample(f"{style}/{index:05d}/{seed}", text, prompts.negative, seed, style))
    return samples, sources


def shortened(samples: Sequence[Sample]) -> list[str]:
    """A note where prompts are not all of HPSv2's, whatever the reason: an option, or a file that holds fewer."""
    counts = Counter(sample.group for sample in samples)
    if all(counts[style] == PROMPTS_A_STYLE for style in STYLES):
        return []
    told = ", ".join(f"{style} over {counts[style]}" for style in counts)
    return [
        f"{told} prompts only: not comparable, the published scores are over {PROMPTS_A_STYLE} prompts of each of "
        f"{len(STYLES)} styles."
    ]


def style_prompts(style: str, folder: Path | None) -> tuple[list[str], Path]:
    """The prompts of a style, and the file that they were read from: ``STYLE.json`` in a folder, or the hub's cache.

    Raises:
        InputError: the file is missing, or is not a list of texts.
    """
    if style not in STYLES:
        raise InputError(f"styles must be among {', '.join(STYLES)}, got {style!r}")
    if folder is None:
        asset = Asset(
            f"HPSv2's {style} prompts", "zhwang/HPDv2", f"benchmark/{style}.json", 0.0001, "Apache-2.0", dataset=True
        )
        path = asset.fetch("--prompts FOLDER")
    else:
        path = folder / f"{style}.json"
        if not path.is_file():
            raise InputError(f"{path} does not exist; --prompts takes a folder with {', '.join(STYLES)} as .json files")
    prompts = read_json(path)
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError(f"{path} must hold a JSON list of prompts, as HPSv2's benchmark/{style}.json does")
    return prompts, path
