"""Trains the shipped model from nothing: autoencoder, clips, base, few-step student and its opening, detector, card.

    python research/train_sprites.py                        two CPU cores, hours
    python research/train_sprites.py --preset sprites-gpu --device cuda          a quarter of an hour
    python research/train_sprites.py --keep autoencoder,detector,base --tune   the student alone, on from the package's
    python research/train_sprites.py --keep autoencoder,detector --continue --tune       base and student, on from those

Every stage resumes where it stopped. Curves and contact sheets appear under the run's folder while it trains, and the
weights are placed in the package after every stage and every now and then inside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

    from causvid_adapter import CausalWan, FlowMatchSchedule
    from nasa_video.sprites.detectors import Detector
    from nasa_video.train.distributed import DistributedContext
    from nasa_video.train.run import Report
    from research.sprites.dataset import LatentClips
    from research.sprites.latent_detector import LatentDetector
    from research.sprites.plan import TrainingPlan

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("autoencoder", "base", "student", "detector")
STAGES = ("autoencoder", "dataset", "base", "latent_detector", "student", "reader", "opening", "detector", "card")
# Read by the C library and by OpenMP when a process starts: large blocks are kept, threads sleep while they wait.
CPU_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "200000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OMP_NUM_THREADS": "1",
}
STARTED = "TRAIN_SPRITES_STARTED"
SHEET_PROMPTS = (
    "a big red star bouncing on a dark background",
    "a small blue circle moving right on a checkered background",
    "a big green triangle spinning on a light background",
    "a purple heart pulsing on a starry background",
    "a big yellow square moving up on a striped background, snow",
    "a small orange ring moving left on a gradient background",
    "a big striped blue square still on a light background",
    "a red heart moving down on a dark background, blurry",
    "a big yellow star on a checkered background, border",
    "a green circle on a gradient background, noisy",
    "a red star and a blue circle moving right on a dark background",
    "a star",
)


@dataclass
class Run:
    """One process's view of a training run."""

    plan: TrainingPlan
    folder: Path
    weights: Path
    context: DistributedContext
    continued: bool
    tuned: bool = False
    report: Report | None = None

    def autoencoder(self) -> AutoencoderKLWan:
        """Trains the autoencoder, or reads the finished one."""
        from diffusers import AutoencoderKLWan

        from research.sprites.autoencoder import train_autoencoder, write_sheet

        folder = self.folder / "vae"
        if not (folder / "config.json").exists():
            args = (self.folder, self.plan.seed, self.context, self.report, self._placed("vae"))
            vae = train_autoencoder(self.plan.autoencoder, *args)
            if self.context.leads:
                vae.save_pretrained(folder)
                vae.half().save_pretrained(self.weights / "vae")
                write_sheet(vae.float(), self.folder / "sheets" / "autoencoder-final.png", self.context.device)
            self.context.wait()
        vae = AutoencoderKLWan.from_pretrained(folder, low_cpu_mem_usage=False).to(self.context.device).eval()
        return vae.requires_grad_(False)  # type: ignore[no-any-return]

    @cached_property
    def clips(self) -> LatentClips:
        """Renders and encodes the clips, or reads them."""
        settings = self.plan.dataset
        return self._encoded("clips", settings.clips, settings.switched_share, self.plan.seed)

    @cached_property
    def short_clips(self) -> LatentClips:
        """Renders and encodes first chunks, or reads them."""
        from research.sprites.dataset import CHUNK_FRAMES

        seed = self.plan.seed + 500_000  # other scenes than the whole clips'
        return self._encoded("short-clips", self.plan.dataset.short_clips, 0.0, seed, CHUNK_FRAMES)

    def dataset(self) -> None:
        """Renders and encodes all clips."""
        _ = self.clips, self.short_clips

    def _encoded(self, name: str, count: int, switched: float, seed: int, frames: int = 33) -> LatentClips:
        from research.sprites.dataset import encode_clips

        report = self.report
        shards = (lambda done, total: report(done, total, {})) if report else None
        args = (self.folder / name, seed, self.context, shards, frames)
        return encode_clips(self.autoencoder(), count, switched, *args)

    def detector(self) -> Detector:
        """Trains the detector, or reads the finished one."""
        from nasa_video.sprites.detectors import Detector
        from research.sprites.detector import train_detector

        path = self.folder / "detector.safetensors"
        if not path.exists():
            args = (self.folder, self.plan.seed, self.context, self.report)
            placed = self.weights / "detector.safetensors" if self.continued else None
            detector = train_detector(self.plan.detector, self.autoencoder(), *args, placed)
            if self.context.leads:
                detector.save(self.weights / "detector.safetensors")
                detector.save(path)
            self.context.wait()
        return Detector.load(path)

    def base(self) -> CausalWan:
        """Trains the base, or reads the finished one."""
        from causvid_adapter import FlowMatchSchedule
        from nasa_video.text import WordLlamaEncoder
        from research.sprites.flow import train_flow

        folder = self.folder / "base"
        if not (folder / "config.json").exists():
            encoder = WordLlamaEncoder(self.plan.text_tokens)
            schedule = FlowMatchSchedule(1.0, (1000, 964, 923, 875, 818, 750, 667, 563, 429, 250))
            # a student that goes on from the package's must still find it there
            show = self._show("base", schedule, student_too=not self.tuned)
            args = (self.folder, self.plan.seed, self.context, self.report, show)
            placed = self._placed("teacher/transformer")
            model = train_flow(self.plan.base, self.clips, self.short_clips, encoder, *args, placed)
            if self.context.leads:
                self._note_hardware()
            self._finish(model, folder, "teacher/transformer")
        return self._read_transformer(folder)

    def latent_detector(self) -> LatentDetector:
        """Trains what conditions the student on its prompts, or reads the finished one."""
        from research.sprites.latent_detector import train_latent_detector

        args = (self.folder / "latent-detector.pt", self.plan.seed, self.context, self.report)
        return train_latent_detector(self.plan.latent_detector, (self.clips, self.short_clips), *args)

    def student(self) -> CausalWan:
        """Distils the student, or reads the finished one."""
        from causvid_adapter import FlowMatchSchedule
        from nasa_video.text import WordLlamaEncoder
        from research.sprites.distill import train_student

        folder = self.folder / "student"
        if not (folder / "config.json").exists():
            encoder = WordLlamaEncoder(self.plan.text_tokens)
            show = self._show("student", FlowMatchSchedule(1.0, self.plan.student.steps[4]))
            args = (self.folder, self.plan.seed, self.context, self.report, show)
            base, detector = self.base(), self.latent_detector()
            placed = self._placed("transformer") if self.tuned else None
            model = train_student(self.plan.student, base, self.plan.latent_size, encoder, *args, detector, placed)
            self._finish(model, folder, "transformer")
        return self._read_transformer(folder)

    def reader(self) -> LatentDetector:
        """Trains what reads noisy first chunks for the opening, or reads the finished one."""
        from research.sprites.latent_detector import train_latent_detector

        args = (self.folder / "reader.pt", self.plan.seed, self.context, self.report)
        return train_latent_detector(self.plan.reader, (self.short_clips,), *args)

    def opening(self) -> CausalWan:
        """Teaches the student what to do with what a prompt leaves open, or reads the finished one.

        A plan may go without, by no iterations: then it is the student as it was distilled.
        """
        if self.plan.opening.iterations == 0:
            return self.student()
        from nasa_video.text import WordLlamaEncoder
        from research.sprites.opening import Opening

        folder = self.folder / "opening"
        if not (folder / "config.json").exists():
            encoder = WordLlamaEncoder(self.plan.text_tokens)
            models = (self.student(), self.base(), self.reader())
            show = self._show("opening", self.plan.schedule(4))
            args = (self.clips, encoder, self.plan.seed, self.context)
            stage = Opening(self.plan.opening, self.plan.student.steps, *models, *args)
            self._finish(stage.train(self.folder, self.report, show), folder, "transformer")
        return self._read_transformer(folder)

    def card(self) -> None:
        """Measures everything and writes the model card (the first process only)."""
        from nasa_video.text import WordLlamaEncoder
        from research.sprites.assessment import Studio
        from research.sprites.card import measure, write_card

        vae, detector, base, student = self.autoencoder(), self.detector(), self.base(), self.opening()
        if self.context.leads:
            studio = Studio(vae, WordLlamaEncoder(self.plan.text_tokens), self.plan.latent_size)
            results = measure(self.plan, studio, detector, base, student)
            (self.folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
            write_card(self.weights.parent / "MODEL_CARD.md", self.plan, results, self.folder)
        self.context.wait()

    def _show(self, name: str, schedule: FlowMatchSchedule, student_too: bool = False):  # type: ignore[no-untyped-def]
        from nasa_video.text import WordLlamaEncoder
        from nasa_video.train.curves import save_sheet
        from research.sprites.assessment import Studio

        studio = Studio(self.autoencoder(), WordLlamaEncoder(self.plan.text_tokens), self.plan.latent_size)

        def show(model: CausalWan, step: int) -> None:
            # before the sheet is drawn: on a machine that is at hand for minutes, the time may be up meanwhile
            self._place(model, "teacher/transformer" if student_too else "transformer")
            if student_too:
                self._place(model, "transformer")
            clips = studio.stream(model, SHEET_PROMPTS, range(len(SHEET_PROMPTS)), schedule)
            save_sheet(clips, SHEET_PROMPTS, self.folder / "sheets" / f"{name}-{step:05d}.png")

        return show

    def keep(self, stage: str) -> None:
        """Takes the package's weights of a stage for finished, where the run has none of its own."""
        import shutil

        from diffusers import AutoencoderKLWan

        place = {"autoencoder": "vae", "detector": "detector.safetensors"}.get(stage, stage)
        if (self.folder / place).exists():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if stage == "detector":
            shutil.copy(self.weights / place, self.folder / place)
        elif stage == "autoencoder":
            vae = AutoencoderKLWan.from_pretrained(self.weights / "vae", low_cpu_mem_usage=False)
            vae.float().save_pretrained(self.folder / place)
        else:
            source = self.weights / ("teacher/transformer" if stage == "base" else "transformer")
            self._read_transformer(source).transformer.save_pretrained(self.folder / place)

    def _note_hardware(self) -> None:
        """Writes down for the card what trained the model: it may be measured elsewhere."""
        import platform

        import torch

        name = torch.cuda.get_device_name() if self.context.device.type == "cuda" else f"CPU, {platform.machine()}"
        (self.folder / "hardware.txt").write_text(f"{name}, PyTorch {torch.__version__}", encoding="utf-8")

    def _placed(self, what: str) -> Path | None:
        """The package's weights of a model to begin with, where `--continue` asks for it."""
        path = self.weights / what / "diffusion_pytorch_model.safetensors"
        return path if (self.continued or self.tuned) and path.exists() else None

    def _finish(self, model: CausalWan, folder: Path, where: str) -> None:
        """Keeps a finished transformer in the run's folder and places it in the package's weights."""
        if self.context.leads:
            model.transformer.save_pretrained(folder)
            self._place(model, where)
        self.context.wait()

    def _place(self, model: CausalWan, where: str) -> None:
        """Writes a transformer's float16 copy into the package's weights."""
        import copy

        half = copy.deepcopy(model.transformer).half()
        half.save_pretrained(self.weights / where)

    def _read_transformer(self, folder: Path) -> CausalWan:
        from diffusers import WanTransformer3DModel
        from safetensors.torch import load_file

        from research.sprites.attention import trainable

        # built by hand: from_pretrained wants accelerate for a model with modules that stay in float32
        transformer = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(folder))
        weights = load_file(folder / "diffusion_pytorch_model.safetensors")
        transformer.load_state_dict({name: value.float() for name, value in weights.items()})
        return trainable(transformer.to(self.context.device)).eval()


def train(
    preset: Annotated[str, typer.Option(help="A file under research/configs, without .yaml.")] = "sprites",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    folder: Annotated[Path, typer.Option(help="Where the run keeps its data and checkpoints.")] = ROOT
    / "runs"
    / "sprites",
    weights: Annotated[Path, typer.Option(help="Where finished weights are placed.")] = ROOT
    / "nasa_video"
    / "sprites"
    / "weights",
    processes: Annotated[int, typer.Option(help="Processes that train together; one a CPU core, one on a GPU.")] = 2,
    continued: Annotated[
        bool, typer.Option("--continue", help="Begin with the package's weights, not with random ones.")
    ] = False,
    tuned: Annotated[
        bool, typer.Option("--tune", help="Distil on from the package's student, not from the base.")
    ] = False,
    keep: Annotated[
        str, typer.Option(help=f"Stages whose weights in the package stay as they are, of {', '.join(KEPT)}.")
    ] = "",
    until: Annotated[str, typer.Option(help=f"Last stage to run: {', '.join(STAGES)}.")] = STAGES[-1],
) -> None:
    """Trains the sprites model from nothing, or goes on where the last run stopped."""
    if until not in STAGES:
        raise typer.BadParameter(f"--until must be one of {', '.join(STAGES)}, got {until}")
    kept = [stage.strip() for stage in keep.split(",") if stage.strip()]
    if unknown := [stage for stage in kept if stage not in KEPT]:
        raise typer.BadParameter(f"--keep takes some of {', '.join(KEPT)}, got {unknown[0]}")
    if processes > 1 and device == "cpu" and STARTED not in os.environ:
        sys.exit(_start_processes(processes))
    sys.path.insert(0, str(ROOT))
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nasa_video.train.distributed import DistributedContext
    from research.sprites.plan import load_plan

    plan = load_plan(ROOT / "research" / "configs" / f"{preset}.yaml")
    context = DistributedContext(cpu=device == "cpu")
    if device != "cpu":
        torch.set_float32_matmul_precision("high")
    run = Run(plan, folder, weights, context, continued, tuned)
    if context.leads:
        for stage in kept:
            run.keep(stage)
    context.wait()
    columns = (
        TextColumn("{task.description:15}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )
    with Progress(*columns, disable=not context.leads) as progress:
        for stage in STAGES[: STAGES.index(until) + 1]:
            if _is_needless(stage, plan, folder):
                continue
            task = progress.add_task(stage, total=None, values="")

            def report(step: int, steps: int, values: dict[str, float], task=task) -> None:  # type: ignore[no-untyped-def]
                text = "  ".join(f"{name} {value:.3f}" for name, value in values.items())
                progress.update(task, completed=step, total=steps, values=text)

            run.report = report if context.leads else None
            getattr(run, stage)()
            progress.update(task, total=1, completed=1)


def _is_needless(stage: str, plan: TrainingPlan, folder: Path) -> bool:
    """Whether all that a stage is there for is finished, or never asked for."""
    for_whom = {"dataset": "opening" if plan.opening.iterations else "student", "latent_detector": "student"}
    if stage == "reader":
        return not plan.opening.iterations or (folder / "opening" / "config.json").exists()
    return stage in for_whom and (folder / for_whom[stage] / "config.json").exists()


def _start_processes(count: int) -> int:
    """Start this script in several processes, which find each other through torchrun's environment."""
    environment = {**CPU_ENVIRONMENT, **os.environ, STARTED: "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    return subprocess.call([*launcher, *sys.argv], env=environment)


if __name__ == "__main__":
    typer.run(train)
