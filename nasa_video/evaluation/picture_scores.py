"""Benchmarks of pictures and videos that a model judges: HPSv2, NegOpt's CLIP+ and CLIP-, removal of named features."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.evaluation.assets import Asset
from nasa_video.evaluation.cases import CaseKind, Split, attributes_of, build_cases
from nasa_video.evaluation.clip import Backbone, Clip
from nasa_video.evaluation.judges import Judge, Question
from nasa_video.evaluation.measuring import Measurement, Measurements, answers, cosines
from nasa_video.evaluation.prompt_files import (
    PAIRS,
    PROMPTS_A_STYLE,
    STYLES,
    Pair,
    Removal,
    sample_pairs,
    style_prompts,
)
from nasa_video.evaluation.removal_jobs import QUALITY_METRICS, REMOVAL_METRICS
from nasa_video.evaluation.results import Item, Metric, Results
from nasa_video.evaluation.sampling import Planned, Sample
from nasa_video.files.atomic import file_sha256

# 986 million parameters in float16.
HPS_ASSETS = {
    "v2": Asset("the HPS v2 scorer", "xswu/HPSv2", "HPS_v2_compressed.pt", 1.97, "Apache-2.0"),
    "v2.1": Asset("the HPS v2.1 scorer", "xswu/HPSv2", "HPS_v2.1_compressed.pt", 1.97, "Apache-2.0"),
}
HPS_ARCHITECTURE = "ViT-H-14"


@dataclass(frozen=True)
class Benchmark:
    """Samples, how they are measured, and how the measurement becomes values.

    Attributes:
        values: from a sample and what was measured of it, to values by metric.
        settings: what goes into the results beside model and methods.
    """

    kind: str
    title: str
    samples: list[Sample]
    measurement: Measurement
    metrics: tuple[Metric, ...]
    values: Callable[[dict[str, Any]], dict[str, float]]
    settings: dict[str, JsonValue] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def results(self, done: Measurements, plan: Sequence[Planned], settings: dict[str, JsonValue]) -> Results:
        """The results of a run that is complete."""
        arms = {one.arm.label: one.arm for one in plan}
        items = [
            Item(
                id=one.sample.id,
                arm=one.arm.label,
                prompt=one.sample.prompt,
                negative=one.sample.negative,
                seed=one.sample.seed,
                group=one.sample.group,
                values={**self.values(measured.measured), **output.measured.get("quality", {})},
                media=f"outputs/{output.output.name}" if output.output else None,
            )
            for one, output, measured in done.rows
        ]
        job = plan[0].job
        recorded: dict[str, JsonValue] = {
            "model": job.model,
            "checkpoint_sha256": job.checkpoint,
            "version": __version__,
            "frames": job.frames,
            "width": job.width,
            "height": job.height,
            "model_settings": job.settings,
            **self.settings,
            **settings,
        }
        return Results(
            kind=self.kind,
            title=f"{self.title} on {job.model}",
            settings=recorded,
            arms=tuple(arms.values()),
            metrics=(*self.metrics, *QUALITY_METRICS),
            items=tuple(items),
            notes=self.notes,
        )


@dataclass(frozen=True)
class HpsPrompts:
    """Which of HPSv2's prompts: the first ``limit`` of each style (None: all 800), from a folder or the hub's cache."""

    styles: tuple[str, ...]
    limit: int | None
    folder: Path | None
    negative: str
    seed: int


def hpsv2(version: str, prompts: HpsPrompts, checkpoint: Path | None, device: str | None, backbone: str) -> Benchmark:
    """Human Preference Score v2 (arXiv 2306.09341): cosine of picture and prompt under a fine-tuned CLIP, times 100.

    Pictures are padded to squares, as HPSv2's own code does.

    Args:
        version: "v2" or "v2.1"; their scores do not compare.
        checkpoint: the scorer's file, where it is not in the hub's cache.
        backbone: its architecture; ViT-H-14 for the published ones.

    Raises:
        InputError: an unknown version, or prompts or weights are missing.
    """
    if version not in HPS_ASSETS:
        raise InputError(f"--hps-version must be one of {', '.join(HPS_ASSETS)}, got {version!r}")
    samples, sources = _hps_samples(prompts)
    file = checkpoint or HPS_ASSETS[version].fetch("--checkpoint FILE")
    if not file.is_file():
        raise InputError(f"the scorer {file} does not exist; --checkpoint takes {HPS_ASSETS[version].file}")
    scorer = Backbone(backbone, str(file))
    clip = Clip(scorer, device, "longest")
    return Benchmark(
        "hpsv2",
        f"HPS{version}",
        samples,
        cosines(clip, scorer, device, "longest", lambda one: [one.sample.prompt]),
        (Metric(name="hpsv2", title=f"HPS{version}"),),
        lambda measured: {"hpsv2": 100 * measured["cosines"][0]},
        {
            "hps_version": version,
            "scorer": clip.identity,
            "scale": "cosine x 100",
            "prompts": sources,
            "styles": list(prompts.styles),
            "prompts_a_style": prompts.limit,
            "negative": prompts.negative,
            "seed": prompts.seed,
        },
        (
            "One picture a prompt; the i-th prompt of the run has the seed --seed + i, in every arm.",
            *_hps_shortened(samples),
        ),
    )


def _hps_samples(prompts: HpsPrompts) -> tuple[list[Sample], dict[str, JsonValue]]:
    samples: list[Sample] = []
    sources: dict[str, JsonValue] = {}
    for style in prompts.styles:
        texts, path = style_prompts(style, prompts.folder)
        sources[style] = f"{path.name}, SHA-256 {file_sha256(path)}, {len(texts)} prompts"
        for index, text in enumerate(texts[: prompts.limit]):
            seed = prompts.seed + len(samples)
            samples.append(Sample(f"{style}/{index:05d}/{seed}", text, prompts.negative, seed, style))
    return samples, sources


def _hps_shortened(samples: Sequence[Sample]) -> list[str]:
    """A note where prompts are not all of HPSv2's, whatever the reason: an option, or a file that holds fewer."""
    counts = Counter(sample.group for sample in samples)
    if all(counts[style] == PROMPTS_A_STYLE for style in STYLES):
        return []
    told = ", ".join(f"{style} over {counts[style]}" for style in counts)
    return [
        f"{told} prompts only: not comparable, the published scores are over {PROMPTS_A_STYLE} prompts of each of "
        f"{len(STYLES)} styles."
    ]


def negopt(pairs: Sequence[Pair], source: Path, n: int, seed: int, backbone: Backbone, device: str | None) -> Benchmark:
    """CLIP+ and CLIP- of NegOpt's pairs (arXiv 2403.07605): cosines of a picture with its prompt and with its negative.

    Args:
        n: how many pairs are drawn, with ``seed``; the i-th drawn has the seed ``seed + i`` for its picture.

    Raises:
        InputError: there are fewer pairs, or the CLIP model cannot be had.
    """
    clip = Clip(backbone, device)
    drawn = sample_pairs(pairs, n, seed)
    samples = [
        Sample(f"{row}/{seed + index}", pair.prompt, pair.negative, seed + index)
        for index, (row, pair) in enumerate(drawn)
    ]
    return Benchmark(
        "negopt",
        "NegOpt",
        samples,
        cosines(clip, backbone, device, None, lambda one: [one.sample.prompt, one.sample.negative]),
        (
            Metric(name="clip_plus", title="CLIP+", digits=3),
            Metric(name="clip_minus", title="CLIP−", better="lower", digits=3),
        ),
        lambda measured: dict(zip(("clip_plus", "clip_minus"), measured["cosines"], strict=True)),
        {
            "scorer": clip.identity,
            "scale": "cosine",
            "pairs": n,
            "pairs_to_draw_from": len(pairs),
            "seed": seed,
            "prompts": f"{source.name}, SHA-256 {file_sha256(source)}" if source.is_file() else source.name,
        },
        (
            "CLIP+ is the cosine of picture and prompt, CLIP− that of picture and negative prompt; both depend on the "
            "CLIP model, and the paper names none.",
            *_limited(None if n >= PAIRS else n, f"the paper draws {PAIRS:,} pairs"),
        ),
    )


def feature_removal(
    prompts: Sequence[Removal], seeds: Sequence[int], judge: Judge, text: str, device: str | None, source: str
) -> Benchmark:
    """Table 2 of arXiv 2412.02687 with any judge: how often the named feature is absent.

    Args:
        seeds: one picture for each of a prompt's.
        text: names the judge (``parse_judge``), for workers elsewhere.
        source: which prompts, for the record.
    """
    by_sample = {
        f"{index:04d}/{seed}": Sample(f"{index:04d}/{seed}", one.prompt, one.negative, seed)
        for index, one in enumerate(prompts)
        for seed in seeds
    }
    asked = {sample: prompts[int(sample.partition("/")[0])] for sample in by_sample}
    return _removal(list(by_sample.values()), asked, judge, text, device, {"prompts": source, "seeds": list(seeds)})


def sprites_removal(
    kinds: Sequence[CaseKind],
    attributes: Sequence[str] | None,
    n: int,
    split: Split,
    seed: int,
    judge: Judge,
    text: str,
    device: str | None,
) -> Benchmark:
    """The sprites' own cases (see ``build_cases``) with another judge than the detectors."""
    samples, asked = [], {}
    for kind in kinds:
        for attribute in attributes_of(kind):
            if attributes is None or attribute in attributes:
                for index, case in enumerate(build_cases(attribute, kind, n, split, seed)):
                    name = f"{kind}/{attribute}/{index}"
                    samples.append(Sample(name, case.prompt, case.negative, case.seed, kind))
                    asked[name] = Removal(case.prompt, case.negative, case.negative)
    settings: dict[str, JsonValue] = {"prompts": "the sprites' cases", "n": n, "split": split, "seed": seed}
    return _removal(samples, asked, judge, text, device, settings)


def _removal(
    samples: list[Sample],
    asked: dict[str, Removal],
    judge: Judge,
    text: str,
    device: str | None,
    settings: dict[str, JsonValue],
) -> Benchmark:
    def question(planned: Planned) -> Question:
        one = asked[planned.sample.id]
        return Question(one.prompt, one.feature, one.present, one.absent, one.alternatives)

    held = judge.asks_held and all(one.present for one in asked.values())

    def values(measured: dict[str, Any]) -> dict[str, float]:
        removed = measured["shown"] is False
        found = {"removed": float(removed)}
        if held:
            found |= {"held": float(measured["held"] is True), "both": float(removed and measured["held"] is True)}
        return found

    return Benchmark(
        "removal",
        "Removal",
        samples,
        answers(judge, text, device, question),
        REMOVAL_METRICS if held else REMOVAL_METRICS[:1],
        values,
        {"judge": judge.identity, **settings},
        (
            "removed: the judge says that the unwanted feature is not there; “unsure” counts as not removed.",
            *(() if held else ("This judge (or these prompts) cannot say whether the prompt is held.",)),
            "Wilson intervals take samples as independent; several seeds of one prompt are less than that.",
        ),
    )


def _limited(limit: int | None, rule: str) -> tuple[str, ...]:
    return () if limit is None else (f"This run is over {limit} only; {rule}.",)
