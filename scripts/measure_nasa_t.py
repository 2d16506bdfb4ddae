"""Measures NASA-T on the shipped model: tables 5 and 3 of arXiv 2412.02687 in small, over several training seeds.

    python scripts/measure_nasa_t.py --output runs/nasa-t          the experiment; stop and start it as you like
    python scripts/measure_nasa_t.py --output runs/try --iterations 2 --n 2 --seeds 0 --accuracy-prompts 2

Every arm trains the same student with the negative in other places, from the same weights and on the same draws of a
seed; then all are judged by the removal table's detectors, and on held-out captions without a negative. Trainings go on
from their checkpoints, measurements from their journals. Tables are written anew whenever an arm is ready.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nasa_video.pipeline import VideoPipeline
    from nasa_video.training.nasa_t.settings import VideoSettings

ROOT = Path(__file__).resolve().parent.parent
# Read by the C library when a process starts: large blocks are kept, which makes CPU training several times faster.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "200000000",
}
# Quantiles of Student's t at 97.5 % for 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
COLUMNS = ("removed", "held", "both", "out_of_range", "sharpness", "flicker")
START = "student"
BEST = "student+teacher"


@dataclass(frozen=True)
class Experiment:
    """What is asked for."""

    output: Path
    student: str
    teacher: Path | None
    iterations: int
    seeds: tuple[int, ...]
    placements: tuple[str, ...]
    steps: tuple[int, ...]
    n: int
    kinds: tuple[str, ...]
    attributes: tuple[str, ...] | None
    methods: str
    accuracy_prompts: int
    batch: int

    def settings(self, placement: str, seed: int) -> VideoSettings:
        """The shipped config with an arm's placement and seed."""
        from nasa_video.models import Source
        from nasa_video.training.nasa_t.settings import VideoSettings, load_settings

        shipped = load_settings(ROOT / "configs" / "train" / "nasa-t-sprites.yaml")
        assert isinstance(shipped, VideoSettings)
        update: dict[str, Any] = {
            "student": self.student,
            "negatives": shipped.negatives.model_copy(update={"placement": placement}),
            "run": shipped.run.model_copy(
                update={"seed": seed, "iterations": self.iterations, "batch_size": self.batch}
            ),
            "fake_warmup": min(shipped.fake_warmup, self.iterations // 4),
        }
        if self.teacher is not None:
            update["teacher"] = Source(path=self.teacher)
        return shipped.model_copy(update=update)

    def train(self, placement: str, seed: int) -> Path:
        """The model's folder of an arm, trained where it is not there yet."""
        from nasa_video.models import find_preset
        from nasa_video.training.nasa_t.fleet import Fleet
        from nasa_video.training.nasa_t.run import train
        from nasa_video.training.nasa_t.start import start_game

        settings = self.settings(placement, seed)
        # weights in the name: after a new training of the shipped model nothing goes on from the old one
        start = fingerprint(find_preset(self.student).components.transformer.fetch(), settings.teacher.fetch())
        folder = self.output / "arms" / f"{placement}-{seed}-{start}"
        finished = folder / "finished.json"
        wanted = settings.model_dump(mode="json")
        if finished.exists() and json.loads(finished.read_text(encoding="utf-8")) == wanted:
            return folder / "model"
        fleet = Fleet(precision=settings.run.precision)
        tell = _teller(f"{placement}, seed {seed}")
        model = train(settings, start_game(settings, fleet, folder), folder, fleet, tell)
        finished.write_text(json.dumps(wanted), encoding="utf-8")
        return model

    def measure(
        self, arm: str, seed: int | None, model: str, steps: tuple[int, ...], methods: str
    ) -> list[dict[str, Any]]:
        """Rows of the removal table of one model, averaged over the attributes, and its accuracy."""
        from nasa_video.evaluation.removal import SpritesJudge, cells, parse_methods, removal_table
        from nasa_video.evaluation.report import summary
        from nasa_video.pipeline import VideoPipeline

        pipeline = VideoPipeline.from_pretrained(model)
        plan = list(cells(parse_methods(methods, pipeline), steps, self.kinds, self.attributes))  # type: ignore[arg-type]
        folder = self.output / "measured"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{arm}-{seed}-{fingerprint(pipeline.preset.components.transformer.fetch())}"
        rows = removal_table(
            pipeline, plan, SpritesJudge(), n=self.n, split="report", frames=pipeline.preset.video.frames, batch=16,
            journal=folder / f"{name}.jsonl",
        )  # fmt: skip
        accuracies = {count: self._accuracy(pipeline, folder / f"{name}-accuracy.json", count) for count in steps}
        return [{"arm": arm, "seed": seed, **row, "accuracy": accuracies[row["steps"]]} for row in summary(rows)]

    def _accuracy(self, pipeline: VideoPipeline, path: Path, steps: int) -> float:
        """Share of what held-out captions state that the videos show, without a negative."""
        stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        key = f"{steps}/{self.accuracy_prompts}"
        if key not in stored:
            stored[key] = accuracy(pipeline, self.accuracy_prompts, steps)
            path.write_text(json.dumps(stored), encoding="utf-8")
        return float(stored[key])


def fingerprint(*folders: Path) -> str:
    """Eight letters that follow from the weights in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def accuracy(pipeline: VideoPipeline, prompts: int, steps: int) -> float:
    """Share of the stated attributes that the detectors find."""
    import numpy as np

    from nasa_video.evaluation.removal import SpritesJudge
    from nasa_video.training.assessment import held_out_prompts

    judge, cases = SpritesJudge(), held_out_prompts(prompts, seed=20261123)
    right = total = 0
    for start in range(0, len(cases), 16):
        part = cases[start : start + 16]
        seeds = range(start, start + len(part))
        chunks = pipeline.stream_batch([case.text for case in part], seeds=list(seeds), steps=steps)
        videos = np.concatenate([chunk.frames for chunk in chunks], axis=1)
        for case, labels in zip(part, judge(list(videos)), strict=True):
            right += sum(labels[attribute] == value for attribute, value in case.stated.items())
            total += len(case.stated)
    return right / total


def over_seeds(values: list[float]) -> str:
    """Mean with the 95 % interval of Student's t over training seeds."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    quantile = T_QUANTILES[len(values) - 2] if len(values) <= len(T_QUANTILES) + 1 else 1.96
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.3f} ± {half:.3f}"


def table(rows: list[dict[str, Any]], title: str) -> str:
    """A Markdown table: one line an arm, method, step count and kind of case; intervals are over training seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["label"], row["steps"], row["case"]), []).append(row)
    columns = (*COLUMNS, "accuracy")
    lines = [f"## {title}", "", "| model | inference | steps | case | seeds | " + " | ".join(columns) + " |"]
    lines.append("|---" * (5 + len(columns)) + "|")
    for key, group in groups.items():
        cells = [over_seeds([row[column] for row in group]) for column in columns]
        lines.append("| " + " | ".join(map(str, (*key, len(group), *cells))) + " |")
    return "\n".join(lines) + "\n"


def write_tables(experiment: Experiment, rows: list[dict[str, Any]]) -> None:
    """Both tables and every row, as far as they are."""
    most = max(experiment.steps)
    five = [row for row in rows if row["steps"] == most and not row["label"].startswith("cfg")]
    three = [row for row in rows if row["arm"] in (START, BEST)]
    text = (
        f"# NASA-T on {experiment.student}\n\n{experiment.iterations} iterations of {experiment.batch} clips an arm, "
        f'n = {experiment.n} a cell; ± is 95 % of Student\'s t over training seeds. "accuracy": what held-out captions '
        "state and the video shows, without a negative.\n\n"
        + table(five, "Where the negative goes while training (table 5 of the paper)")
        + "\n"
        + table(three, "Student, NASA-I, NASA-T, both, CFG (table 3 of the paper)")
    )
    experiment.output.mkdir(parents=True, exist_ok=True)
    (experiment.output / "results.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (experiment.output / "nasa_t.md").write_text(text, encoding="utf-8")


def _teller(name: str) -> Any:
    def tell(step: int, steps: int, values: dict[str, float]) -> None:
        if step == 1 or step % 10 == 0 or step == steps:
            text = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
            print(f"{name}: {step} of {steps}  {text}", flush=True)

    return tell


def _run(experiment: Experiment) -> None:
    rows = experiment.measure(START, None, experiment.student, experiment.steps, experiment.methods)
    write_tables(experiment, rows)
    attention_only = ",".join(m for m in experiment.methods.split(",") if not m.strip().startswith("cfg"))
    for seed in experiment.seeds:
        for placement in experiment.placements:
            model = experiment.train(placement, seed)
            whole = placement == BEST  # the arm of table 3: every step count, and CFG beside it
            steps = experiment.steps if whole else (max(experiment.steps),)
            methods = experiment.methods if whole else attention_only
            rows += experiment.measure(placement, seed, str(model), steps, methods)
            write_tables(experiment, rows)
    print(f"{experiment.output}/nasa_t.md")


def main(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints, journals and tables.")],
    student: Annotated[
        str, typer.Option(help="Preset or folder of the student that every arm begins with.")
    ] = "sprites",
    teacher: Annotated[
        Path | None, typer.Option(help="Folder of the teacher's weights; the shipped ones if none.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of each arm.")] = 80,
    batch: Annotated[int, typer.Option(min=1, help="Clips of an iteration.")] = 12,
    seeds: Annotated[str, typer.Option(help="Comma list of training seeds.")] = "0,1,2",
    placements: Annotated[str, typer.Option(help="Comma list; the rows of table 5.")] = (
        "nowhere,teacher,teacher+fake,student+teacher,all"
    ),
    steps: Annotated[str, typer.Option(help="Comma list of step counts of table 3.")] = "1,2,4",
    n: Annotated[int, typer.Option("--n", min=1, help="Videos a cell.")] = 32,
    kinds: Annotated[str, typer.Option(help="Comma list of unmentioned, stated, conflict.")] = (
        "unmentioned,stated,conflict"
    ),
    attributes: Annotated[str, typer.Option(help="Comma list of attributes.")] = (
        "colour,background,shape,weather,count,blurry,border"
    ),
    methods: Annotated[str, typer.Option(help="Comma list of METHOD[:SCALE].")] = "none,nasa,nasa:0.5,cfg:2",
    accuracy_prompts: Annotated[int, typer.Option(min=1, help="Held-out captions.")] = 96,
) -> None:
    """Train every arm and measure it."""
    if any(os.environ.get(name) != value for name, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    sys.path.insert(0, str(ROOT))
    kinds_, attributes_ = _words(kinds), _words(attributes)
    seeds_, steps_ = (tuple(int(word) for word in _words(text)) for text in (seeds, steps))
    experiment = Experiment(
        output=output,
        student=student,
        teacher=teacher,
        iterations=iterations,
        seeds=seeds_,
        placements=_words(placements),
        steps=steps_,
        n=n,
        kinds=kinds_,
        attributes=attributes_ or None,
        methods=methods,
        accuracy_prompts=accuracy_prompts,
        batch=batch,
    )
    _run(experiment)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


if __name__ == "__main__":
    typer.run(main)
