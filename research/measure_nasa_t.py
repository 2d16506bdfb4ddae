"""Measures NASA-T on the sprites model: tables 5 and 3 of arXiv 2412.02687 in small, over several training seeds.

    python research/measure_nasa_t.py --output runs/nasa-t    the experiment; stop and start it as you like
    python research/measure_nasa_t.py --output runs/nasa-t --weights FOLDER on other weights: transformer/, vae/,
                                                                           teacher/transformer/, detector.safetensors
    python research/measure_nasa_t.py --output runs/try --iterations 2 --n 2 --captions 4 --seeds 0 --placements nowhere

Every arm trains the same student with the negative in other places, from the same weights and on the same draws of a
seed; then all are judged by the removal table's cases, and on held-out captions. Arms run side by side, one thread
each. Trainings go on from their checkpoints, measurements from their journals. The report, nasa_t_results.md, is
written anew whenever an arm is ready; what a person wrote in it as a judgement stays.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import nasa_t_report as report
import typer

if TYPE_CHECKING:
    from nasa_video.evaluation.samples import Method
    from nasa_video.train.settings import VideoSettings
    from nasa_video.video.pipeline import VideoPipeline
    from research.sprites.held_out import Observer, World

ROOT = Path(__file__).resolve().parent.parent
# Read by the C library and by OpenMP when a process starts: large blocks are kept, which makes CPU training several
# times faster; an arm computes on one thread.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
}
KINDS = ("unmentioned", "stated", "conflict")
WHOLE = (report.STUDENT, report.BEST)
"""Arms of table 3, measured at every step count and with every inference."""
Row = dict[str, Any]
Job = tuple[str, int | None]


@dataclass(frozen=True)
class Experiment:
    """What is asked for."""

    output: Path
    weights: Path | None
    iterations: int
    batch: int
    seeds: tuple[int, ...]
    steps: tuple[int, ...]
    n: int
    captions: int
    attributes: tuple[str, ...]
    placements: tuple[str, ...]
    cfg: str

    @property
    def jobs(self) -> list[Job]:
        """Every model: the shipped one and the arms, seed after seed, those that take longest first."""
        arms = sorted(self.placements, key=lambda arm: arm not in WHOLE)
        return [*((arm, seed) for seed in self.seeds for arm in arms), (report.SHIPPED, None)]

    @property
    def detector(self) -> Path | None:
        """The detector's weights, where they are not the shipped ones."""
        return None if self.weights is None else self.weights / "detector.safetensors"

    @property
    def student(self) -> str:
        """The shipped preset, or one of the given weights."""
        return "sprites" if self.weights is None else str(self.output / "student")

    @property
    def command(self) -> str:
        """What makes the same again, in a folder of its own."""
        words = {
            "iterations": self.iterations, "batch": self.batch, "seeds": ",".join(map(str, self.seeds)),
            "steps": ",".join(map(str, self.steps)), "n": self.n, "captions": self.captions,
            "attributes": ",".join(self.attributes), "cfg": self.cfg,
        }  # fmt: skip
        options = shlex.join(word for name, value in words.items() for word in (f"--{name}", str(value)))
        return f"python research/measure_nasa_t.py --output runs/nasa-t {options}"

    def prepare(self) -> None:
        """Write the preset of the given weights.

        Raises:
            InputError: a part of them is missing.
        """
        import yaml

        from nasa_video.errors import InputError
        from nasa_video.models.presets import configs_dir

        self.output.mkdir(parents=True, exist_ok=True)
        if self.weights is None:
            return
        root = self.weights.absolute()
        parts = ("transformer", "vae", "teacher/transformer", "detector.safetensors")
        missing = [part for part in parts if not (root / part).exists()]
        if missing:
            raise InputError(
                f"{root} has no {', '.join(missing)}; give the weights' folder of research/train_sprites.py"
            )
        preset = yaml.safe_load((configs_dir() / "video" / "sprites.yaml").read_text(encoding="utf-8"))
        preset["components"] |= {part: {"path": str(root / part)} for part in ("transformer", "vae")}
        folder = Path(self.student)
        folder.mkdir(exist_ok=True)
        (folder / "preset.yaml").write_text(yaml.safe_dump(preset, sort_keys=False), encoding="utf-8")

    def settings(self, placement: str, seed: int) -> VideoSettings:
        """The shipped config with an arm's placement and seed."""
        from nasa_video.models.presets import Source
        from nasa_video.train.settings import VideoSettings, load_settings

        shipped = load_settings(ROOT / "configs" / "train" / "nasa-t-sprites.yaml")
        assert isinstance(shipped, VideoSettings)
        run = {"seed": seed, "iterations": self.iterations, "batch_size": self.batch, "sheet_every": self.iterations}
        update: dict[str, Any] = {
            "student": self.student,
            "negatives": shipped.negatives.model_copy(update={"placement": placement}),
            "run": shipped.run.model_copy(update=run),
            "fake_warmup": min(shipped.fake_warmup, self.iterations // 4),
        }
        if self.weights is not None:
            update["teacher"] = Source(path=self.weights.absolute() / "teacher" / "transformer")
        return shipped.model_copy(update=update)

    def start(self) -> str:
        """Eight letters that follow from the weights that every arm starts from."""
        from nasa_video.models.presets import find_preset

        return fingerprint(
            find_preset(self.student).components.transformer.fetch(), self.settings("all", 0).teacher.fetch()
        )


def train_arm(experiment: Experiment, placement: str, seed: int) -> tuple[Path, float]:
    """The model's folder of an arm, trained where it is not there yet, and the processor minutes that it took."""
    from nasa_video.train.distributed import DistributedContext
    from nasa_video.train.run import new_trainer, train

    settings = experiment.settings(placement, seed)
    # weights in the name: after a new training of the shipped model nothing goes on from the old one
    folder = experiment.output / "arms" / f"{placement}-{seed}-{experiment.start()}"
    finished, spent = folder / "finished.json", folder / "minutes.json"
    wanted = settings.model_dump(mode="json")
    before = float(json.loads(spent.read_text(encoding="utf-8"))) if spent.exists() else 0.0
    if finished.exists() and json.loads(finished.read_text(encoding="utf-8")) == wanted:
        return folder / "model", before
    began = time.process_time()
    tell = _teller(f"{placement}, seed {seed}", lambda: _write(spent, before + (time.process_time() - began) / 60))
    context = DistributedContext(precision=settings.run.precision)
    model = train(new_trainer(settings, context, folder), folder, tell)
    _write(finished, wanted)
    return model, float(json.loads(spent.read_text(encoding="utf-8")))


def measure(experiment: Experiment, arm: str, seed: int | None, model: str) -> list[Row]:
    """A row for every inference and step count of one model."""
    from nasa_video.evaluation.samples import methods_of
    from nasa_video.video.pipeline import VideoPipeline

    pipeline = VideoPipeline.from_pretrained(model)
    whole = arm in WHOLE
    labels = f"none,nasa,{experiment.cfg}" if whole else "none,nasa"
    counts = experiment.steps if whole or arm == report.SHIPPED else (max(experiment.steps),)
    name = f"{arm}-{seed}-{fingerprint(pipeline.preset.components.transformer.fetch())}"
    folder = experiment.output / "measured"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for count in counts:
        for method in methods_of(labels, pipeline.preset):
            removal = _removal(experiment, pipeline, method, count, folder / f"{name}.jsonl")
            asked = _held_out(experiment, pipeline, method, count, folder / f"{name}-captions.json")
            rows.append({"arm": arm, "seed": seed, "label": method.label, "steps": count, **removal, **asked})
    return rows


def _removal(experiment: Experiment, pipeline: VideoPipeline, method: Method, steps: int, journal: Path) -> Row:
    """Shares of the removal table, mean over attributes and kinds of case, and by kind."""
    from nasa_video.evaluation.benchmarks.removal import cells
    from research.removal_table import removal_table, summary

    plan = list(cells([method], [steps], KINDS, experiment.attributes))  # type: ignore[arg-type]
    rows = removal_table(
        pipeline, plan, _judge(experiment.detector), n=experiment.n, split="report",
        frames=pipeline.preset.video.frames, batch=min(24, experiment.n), journal=journal,
    )  # fmt: skip
    kinds = {row["case"]: {name: row[name] for name in ("removed", "held", "both")} for row in summary(rows)}
    means = {name: statistics.fmean(kind[name] for kind in kinds.values()) for name in ("removed", "held", "both")}
    return {**means, "kinds": kinds}


def _held_out(experiment: Experiment, pipeline: VideoPipeline, method: Method, steps: int, path: Path) -> Row:
    """Accuracy and looks on held-out captions; kept in a file."""
    from research.sprites.held_out import held_out

    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    key = f"{method.label}/{steps}/{experiment.captions}"
    if key not in stored:
        observer, world = _observer(experiment.detector), _world(experiment.detector)
        stored[key] = held_out(pipeline, method, steps, experiment.captions, observer, world).row()
        _write(path, stored)
    return {name: value for name, value in stored[key].items() if name != "n"}


@cache
def _judge(detector: Path | None) -> Any:
    from nasa_video.evaluation.benchmarks.removal import SpritesJudge

    return SpritesJudge(detector)


@cache
def _observer(detector: Path | None) -> Observer:
    from research.sprites.held_out import Observer

    return Observer(detector)


@cache
def _world(detector: Path | None) -> World:
    from nasa_video.models.presets import find_preset
    from research.sprites.held_out import rendered_world

    return rendered_world(_observer(detector), 192, find_preset("sprites").video.frames)


def do_job(experiment: Experiment, arm: str, seed: int | None) -> dict[str, Any]:
    """Train and measure one model; returns its rows and the processor minutes of both."""
    import torch

    torch.set_num_threads(1)
    model, training = (experiment.student, 0.0) if seed is None else train_arm(experiment, arm, seed)
    began = time.process_time()
    rows = measure(experiment, arm, seed, str(model))
    spent = experiment.output / "measured" / f"{arm}-{seed}-{experiment.start()}-minutes.json"
    before = float(json.loads(spent.read_text(encoding="utf-8"))) if spent.exists() else 0.0
    measuring = before + (time.process_time() - began) / 60
    _write(spent, measuring)
    print(f"{arm}, seed {seed}: {training:.1f} processor minutes training, {measuring:.1f} measuring", flush=True)
    return {"rows": rows, "minutes": (training, measuring)}


def _do(task: tuple[Experiment, Job]) -> dict[str, Any]:
    return do_job(task[0], *task[1])


def run(experiment: Experiment, processes: int, docs: Path) -> None:
    """Every job, and the report after each."""
    experiment.prepare()
    world = _world(experiment.detector)
    facts: dict[str, Any] = {
        "iterations": experiment.iterations, "batch": experiment.batch, "n": experiment.n,
        "captions": experiment.captions, "attributes": ", ".join(experiment.attributes), "steps": experiment.steps,
        "cfg": experiment.cfg, "weights": experiment.start(), "commit": _commit(), "command": experiment.command,
        "world": {"sharpness": world.sharpness, "flicker": world.flicker},
    }  # fmt: skip
    tasks = [(experiment, job) for job in experiment.jobs]
    done: list[dict[str, Any]] = []
    # processes that stay: each imports, loads and renders once
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for outcome in pool.imap_unordered(_do, tasks) if processes > 1 else map(_do, tasks):
            done.append(outcome)
            minutes = [sum(entry["minutes"][part] for entry in done) for part in (0, 1)]
            write_report(experiment, done, facts | {"jobs": (len(done), len(tasks)), "minutes": minutes}, docs)
    print(f"{docs / 'nasa_t_results.md'}")


def write_report(experiment: Experiment, done: list[dict[str, Any]], facts: dict[str, Any], docs: Path) -> None:
    """The report, its plot and every row, as far as they are."""
    rows = [row for entry in done for row in entry["rows"]]
    docs.mkdir(parents=True, exist_ok=True)
    _write(docs / "nasa_t_results.json", {**facts, "rows": rows})
    path = docs / "nasa_t_results.md"
    path.write_text(report.document(rows, facts, report.kept_judgement(path)), encoding="utf-8")
    report.plot(rows, experiment.steps, experiment.cfg, docs / "images" / "nasa_t.png")


def fingerprint(*folders: Path) -> str:
    """Eight letters that follow from the weights in these folders."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.glob("*.safetensors")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _write(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _teller(name: str, spend: Callable[[], None]) -> Any:
    def tell(step: int, steps: int, values: dict[str, float]) -> None:
        if step == 1 or step % 10 == 0 or step == steps:
            spend()
            text = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
            print(f"{name}: {step} of {steps}  {text}", flush=True)

    return tell


def main(
    output: Annotated[Path, typer.Option(help="Folder of checkpoints and journals.")],
    docs: Annotated[Path | None, typer.Option(help="Folder of the report.", show_default="OUTPUT")] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights' folder of research/train_sprites.py; else shipped.")
    ] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Of each arm.")] = 60,
    batch: Annotated[int, typer.Option(min=1, help="Rollouts of an iteration.")] = 12,
    seeds: Annotated[str, typer.Option(help="Comma list of training seeds.")] = "0,1,2",
    steps: Annotated[str, typer.Option(help="Comma list of step counts of table 3; table 5 takes the most.")] = "1,2,4",
    n: Annotated[int, typer.Option("--n", min=1, help="Videos of a removal cell.")] = 24,
    captions: Annotated[int, typer.Option(min=2, help="Held-out captions.")] = 72,
    attributes: Annotated[str, typer.Option(help="Comma list of attributes.")] = "colour,background,blurry",
    placements: Annotated[str, typer.Option(help="Comma list of table 5's rows.")] = ",".join(report.PLACEMENTS),
    cfg: Annotated[str, typer.Option(help="cfg:SCALE of table 3; the paper has 1.5.")] = "cfg:1.5",
    processes: Annotated[int, typer.Option(min=1, help="Arms side by side.")] = os.cpu_count() or 1,
) -> None:
    """Train every arm, measure it, report."""
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ENVIRONMENT})
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    experiment = Experiment(
        output=output, weights=weights, iterations=iterations, batch=batch,
        seeds=tuple(map(int, _words(seeds))), steps=tuple(map(int, _words(steps))), n=n, captions=captions,
        attributes=_words(attributes), placements=_words(placements), cfg=cfg,
    )  # fmt: skip
    run(experiment, processes, docs or output)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


if __name__ == "__main__":
    typer.run(main)
