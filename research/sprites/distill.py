"""Stage two: a few-step student, trained on its own rollouts by distribution matching.

Self-Forcing (arXiv 2506.08009) with DMD (arXiv 2311.18828, 2405.14867): the student rolls out a clip chunk by chunk
with its cache; the gradient of the divergence from the data is the difference of two denoisers, the frozen teacher
(real) and one that keeps learning the student's clips (fake), both bidirectional. No clip is needed for it, captions
are. Most state everything; what happens where they do not is learnt in `research.sprites.opening`.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.captions import leaves_open, random_caption
from nasa_video.sprites.world import ATTRIBUTES, MOTIONS, Scenes, sample_scenes
from nasa_video.text import TextEncoder
from nasa_video.train.attention import compile_blocks
from nasa_video.train.distillation import descend, guided_target, matching_direction, shifted, stratified
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.rollout import RolloutPlan, roll_out
from nasa_video.train.run import Report
from nasa_video.train.settings import Optimiser
from nasa_video.train.state import TrainState
from research.sprites.captions import switched_captions
from research.sprites.dataset import text_a_chunk
from research.sprites.latent_detector import LatentDetector, blurred_by_noise, stated_loss, visible_targets
from research.sprites.scenes import CLIP_CHUNKS, sample_switches
from research.sprites.stage import Stage, autocast, matrix_optimiser, per_clip


@dataclass(frozen=True)
class DistillTraining:
    """Settings of the distillation.

    `steps` maps a number of steps to the sampler's timesteps; `step_counts` is what a rollout's number is drawn from.
    `teacher_scale` is the teacher's classifier-free guidance, 1 being none. `short_share` of the iterations roll out
    first chunks alone, as many more as take the same work; `switched_share` of the others roll out clips whose prompt
    changes between chunks. `hard_share` of the clips that do not switch show what is hardest to draw. Captions are
    empty for `empty_share` of the clips, and state all there is for `full_share` of them. `conditioned_weight` is the
    weight of the latent detector's gradient towards what the clips are to show, at most `conditioned_limit` times as
    large as that of the distribution. The detector reads clips with a noise level of at most `conditioned_noise`:
    without any its gradient is not to be trusted, and a lot of it hides whether a clip is blurry.
    """

    steps: dict[int, tuple[float, ...]] = field(default_factory=dict)
    step_counts: tuple[int, ...] = (1, 2, 4, 4)
    iterations: int = 500
    batch_size: int = 16
    frames_per_chunk: int = 3
    matrix_rate: float = 6e-4
    other_rate: float = 4e-4
    fake_rate_factor: float = 2.0
    fake_updates: int = 1
    fake_warmup: int = 20
    average_decay: float = 0.98
    shift: float = 3.0
    teacher_scale: float = 1.75
    conditioned_weight: float = 30.0
    conditioned_limit: float = 0.8
    conditioned_noise: float = 0.15
    empty_share: float = 0.05
    short_share: float = 0.4
    hard_share: float = 0.25
    full_share: float = 0.7
    switched_share: float = 0.25
    checkpoint_every: int = 25
    sheet_every: int = 50


def clean_estimate(model: CausalWan, noisy: Tensor, sigma_B: Tensor, context: Tensor) -> Tensor:
    """The denoiser's x0 (B, T, C, h, w) at one noise level a clip, bidirectional."""
    with autocast(noisy.device):
        flow: Tensor = model(noisy, sigma_B * 1000, context)
    return noisy - per_clip(sigma_B) * flow.float()


@torch.no_grad()
def score_difference(
    real: CausalWan, fake: CausalWan, clip: Tensor, context: Tensor, scale: float, sigma_B: Tensor, noise: Tensor
) -> Tensor:
    """Distribution matching's direction for clips (B, T, C, h, w), the teacher under classifier-free guidance."""
    level = per_clip(sigma_B)
    noisy = (1 - level) * clip + level * noise
    x_fake = clean_estimate(fake, noisy, sigma_B, context)
    x_real = clean_estimate(real, noisy, sigma_B, context)
    if scale != 1:
        x_empty = clean_estimate(real, noisy, sigma_B, torch.zeros_like(context))
        x_real = guided_target(x_real, x_empty, torch.full_like(sigma_B, scale))
    return matching_direction(clip, x_real, x_fake)


def _size(x: Tensor) -> Tensor:
    """Norm of each clip, (B, 1, 1, 1, 1)."""
    norms: Tensor = x.flatten(1).norm(dim=1)
    return per_clip(norms)


def _at_most(x: Tensor, limit: Tensor) -> Tensor:
    """Every clip of x with a norm of at most its limit."""
    return x * (limit / _size(x).clamp_min(1e-9)).clamp(max=1)


@dataclass(frozen=True)
class DistillDraw:
    """One iteration's rollout: how many steps its sampler has and the one it stops at, its start noise and its clips.

    `embeds` are those of the captions: one a clip, or one a chunk where they switch. `values` are the scenes' (B,) by
    name, `conditioned` what the detector looks for in them.
    """

    steps: int
    exit_step: int
    whole: bool
    noise: NDArray[np.float32]
    embeds: NDArray[np.float32]
    values: dict[str, NDArray[Any]]
    conditioned: list[frozenset[str]]


@dataclass(frozen=True, eq=False)
class DistillDraws(Dataset[DistillDraw]):
    """What the iterations of one process are made of; it follows from the seed and the step alone."""

    settings: DistillTraining
    latent_size: tuple[int, int, int]
    encoder: TextEncoder
    seed: int
    context: DistributedContext

    def __getitem__(self, step: int) -> DistillDraw:
        settings = self.settings
        # the number of steps is the same in every process, so that nobody waits
        plan = torch.Generator().manual_seed(self.seed * 5_000_011 + step)
        count = settings.step_counts[int(torch.randint(len(settings.step_counts), (1,), generator=plan))]
        exit_step = int(torch.randint(count, (1,), generator=plan))
        kinds = torch.rand(2, generator=plan).tolist()
        whole = kinds[0] >= settings.short_share
        switching = whole and kinds[1] < settings.switched_share
        size = settings.batch_size if whole else settings.batch_size * CLIP_CHUNKS  # as many as take the same work
        number = self.seed * 11_000_003 + self.context.stream(step)
        generator, rng = torch.Generator().manual_seed(number), random.Random(number)
        frames = settings.frames_per_chunk * (CLIP_CHUNKS if whole else 1)
        noise = torch.randn(size, frames, *self.latent_size, generator=generator)
        scenes = sample_scenes(size, generator)
        if switching:
            captions, conditioned = _switching(scenes, generator, rng, settings.empty_share), [frozenset[str]()] * size
        else:
            scenes = _with_hard_ones(scenes, settings.hard_share, rng)
            captions, conditioned = self._captions(scenes, rng)
        values = {f.name: getattr(scenes, f.name).numpy() for f in fields(Scenes)}
        embeds = self.encoder(captions).embeds.numpy()
        return DistillDraw(count, exit_step, whole, noise.numpy(), embeds, values, conditioned)

    def _captions(self, scenes: Scenes, rng: random.Random) -> tuple[list[str], list[frozenset[str]]]:
        """A caption for each scene, and what the detector says of it: all where nothing is left open."""
        texts, conditioned = [], []
        for index in range(len(scenes)):
            caption = random_caption(scenes.row(index), rng, full=rng.random() < self.settings.full_share)
            empty = rng.random() < self.settings.empty_share
            texts.append("" if empty else caption.text)
            everything = caption.stated if leaves_open(caption.stated) else frozenset(ATTRIBUTES)
            conditioned.append(frozenset() if empty else everything)
        return texts, conditioned


HARDEST: tuple[Mapping[str, int], ...] = (
    {"count": ATTRIBUTES["count"].index("two"), "size": ATTRIBUTES["size"].index("small")},
    {"motion": MOTIONS.index("spinning")},
    {"weather": ATTRIBUTES["weather"].index("snow")},
    {"weather": ATTRIBUTES["weather"].index("rain")},
    {"blurry": 1},
    {"pixelated": 1},
)
"""What small models draw worst: two sprites, which are small, one that spins, weather, and flaws that hide in it."""


def _with_hard_ones(scenes: Scenes, share: float, rng: random.Random) -> Scenes:
    """The scenes, a share of them changed to something out of `HARDEST`."""
    values = {f.name: getattr(scenes, f.name).clone() for f in fields(Scenes)}
    for index in range(len(scenes)):
        if rng.random() < share:
            for name, value in rng.choice(HARDEST).items():
                values[name][index] = value
    return Scenes(**values)


def _switching(scenes: Scenes, generator: torch.Generator, rng: random.Random, empty_share: float) -> list[str]:
    """A caption for each chunk of each clip, of scenes that turn into others."""
    later, chunks = sample_switches(scenes, 1.0, generator)
    captions = []
    for index, first in enumerate(chunks.tolist()):
        before, after = switched_captions(scenes.row(index), later.row(index), rng)
        if rng.random() < empty_share:
            before = after = ""
        captions += [before if chunk < first else after for chunk in range(CLIP_CHUNKS)]
    return captions


class Distillation(Stage[DistillDraw]):
    """Student, teacher and fake score, and one iteration of their training."""

    PARTS = ("state", "fake_state")

    def __init__(
        self,
        settings: DistillTraining,
        base: CausalWan,
        latent_size: tuple[int, int, int],
        encoder: TextEncoder,
        seed: int,
        context: DistributedContext,
        detector: LatentDetector | None = None,
        start_from: Path | None = None,
    ) -> None:
        self.detector = detector
        self.settings, self.seed, self.context = settings, seed, context
        self.draws = DistillDraws(settings, latent_size, encoder, seed, context)
        self.real = base.eval().requires_grad_(False)
        self.student = copy.deepcopy(base).requires_grad_(True)
        if start_from is not None:
            weights = {name: value.float() for name, value in load_file(start_from).items()}
            self.student.transformer.load_state_dict(weights)
        self.fake = copy.deepcopy(base).requires_grad_(True)
        for score in (self.real, self.fake):
            compile_blocks(score)
        rates = (settings.matrix_rate, settings.other_rate)
        factor = settings.fake_rate_factor
        self.state = TrainState(
            self.student, matrix_optimiser(*rates, betas=(0.5, 0.95), flat=0.7), context, settings.average_decay
        )
        steady = Optimiser(kind="matrix", rate=rates[0] * factor, other_rate=rates[1] * factor, betas=(0.5, 0.95))
        self.fake_state = TrainState(self.fake, steady, context)
        self.device = base.device

    def _sigma(self, batch: int, generator: torch.Generator, low: float = 0.02, high: float = 0.98) -> Tensor:
        u = stratified(batch, generator)
        return shifted(u, self.settings.shift).clamp(low, high)

    def iterate(self, step: int, drawn: DistillDraw) -> dict[str, float]:
        """A rollout, an update of the student on it, and updates of the fake score on it."""
        settings = self.settings
        generator = torch.Generator(self.device)
        generator.manual_seed(self.seed * 9_000_011 + self.context.stream(step))
        start = torch.from_numpy(drawn.noise).to(self.device)
        context = text_a_chunk(drawn.embeds, start, drawn.whole)

        def normal() -> Tensor:
            return torch.randn(start.shape, generator=generator, device=self.device)

        warming = step <= settings.fake_warmup
        with torch.set_grad_enabled(not warming):
            schedule = FlowMatchSchedule(1.0, settings.steps[drawn.steps])
            plan = RolloutPlan(schedule, drawn.exit_step, settings.frames_per_chunk)
            clip = roll_out(self.student, context, start, plan, generator, partial(autocast, self.device))
        values = {}
        if not warming:
            sigma = self._sigma(len(clip), generator)
            direction = score_difference(
                self.real, self.fake, clip.detach(), context, settings.teacher_scale, sigma, normal()
            )
            values["direction"] = float(direction.abs().mean())
            conditioned = self._conditioned(clip.detach(), drawn, generator)
            values["conditioned"] = float(conditioned.abs().mean())
            direction = direction + _at_most(conditioned, settings.conditioned_limit * _size(direction))
            descend(clip, direction).backward()  # type: ignore[no-untyped-call]
            progress = (step - settings.fake_warmup) / (settings.iterations - settings.fake_warmup)
            values["student gradient"] = self.state.step(progress)
        values["fake"] = sum(
            self._update_fake(clip.detach(), context, normal(), generator) for _ in range(settings.fake_updates)
        )
        return values

    def _conditioned(self, clip: Tensor, drawn: DistillDraw, generator: torch.Generator) -> Tensor:
        """What the latent detector would change of the clips so that they show their scenes."""
        settings = self.settings
        if self.detector is None or settings.conditioned_weight == 0 or not any(drawn.conditioned):
            return torch.zeros_like(clip)
        scenes = Scenes(**{name: torch.from_numpy(value) for name, value in drawn.values.items()})
        clip = clip.requires_grad_(True)
        with torch.enable_grad(), autocast(self.device):
            logits = self.detector(blurred_by_noise(clip, settings.conditioned_noise, generator))
        loss = stated_loss(
            {n: v.float() for n, v in logits.items()}, scenes, visible_targets(drawn.conditioned, scenes)
        )
        return torch.nan_to_num(settings.conditioned_weight * torch.autograd.grad(loss, clip)[0])

    def _update_fake(self, clip: Tensor, context: Tensor, noise: Tensor, generator: torch.Generator) -> float:
        sigma = self._sigma(len(clip), generator)
        level = per_clip(sigma)
        with autocast(self.device):
            flow = self.fake((1 - level) * clip + level * noise, sigma * 1000, context)
        loss = (flow.float() - (noise - clip)).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        self.fake_state.step(1.0)
        return float(loss.detach()) / self.settings.fake_updates


def train_student(
    settings: DistillTraining,
    base: CausalWan,
    latent_size: tuple[int, int, int],
    encoder: TextEncoder,
    folder: Path,
    seed: int,
    context: DistributedContext,
    report: Report | None = None,
    show: Callable[[CausalWan, int], None] | None = None,
    detector: LatentDetector | None = None,
    start_from: Path | None = None,
) -> CausalWan:
    """Distils the base and returns the student's average; resumes from `folder`/student.pt.

    `start_from` is a safetensors file of a student to go on with, in place of the base.
    """
    torch.manual_seed(seed)
    averaged = copy.deepcopy(base).eval().requires_grad_(False)
    stage = Distillation(settings, base, latent_size, encoder, seed, context, detector, start_from)
    return stage.run(settings, averaged, folder / "student.pt", report, show)
