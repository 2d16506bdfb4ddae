"""Score distillation with a negative prompt: the formulas, and the iteration that image and video training share.

Distribution matching (arXiv 2311.18828) and variational score distillation (2305.16213) with the negative in the
teacher's guidance and NASA in the student (arXiv 2412.02687, section 5.3).
"""

# B batch, everything after it is the sample; S scales of a contact sheet, F frames, H W height and width

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasa_video.text import TextContext, TextEncoder
from nasa_video.train.attention import TrainingGuidance, doubled, guided_training
from nasa_video.train.batch import Contexts, Texts, at_scale, draw_texts, encode_texts, seeded, without_some
from nasa_video.train.curves import save_sheet
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.settings import ImageSettings, VideoSettings
from nasa_video.train.state import TrainState


def per_sample(values_B: Tensor, like: Tensor) -> Tensor:
    """(B,) against (B, ...)."""
    return values_B.to(like.device, torch.float32).reshape(-1, *(1,) * (like.ndim - 1))


def guided_target(x_pos: Tensor, x_neg: Tensor, kappa_B: Tensor) -> Tensor:
    """``(1 - kappa) x(y-) + kappa x(y)``: the teacher with the negative in its guidance (arXiv 2412.02687, sec. 5.3).

    Holds for clean estimates as well as for noise or flow predictions.
    """
    kappa = per_sample(kappa_B, x_pos)
    return (1 - kappa) * x_neg + kappa * x_pos


def matching_direction(sample: Tensor, x_real: Tensor, x_fake: Tensor) -> Tensor:
    """DMD's gradient ``(x_fake - x_real) / mean |sample - x_real|``, by sample (arXiv 2311.18828, eq. 7 and 8)."""
    size = (sample - x_real).abs().flatten(1).mean(1)
    return torch.nan_to_num((x_fake - x_real) / (per_sample(size, sample) + 1e-6))


def score_direction(eps_real: Tensor, eps_fake: Tensor, weight_B: Tensor) -> Tensor:
    """Variational score distillation's ``w (eps_teacher - eps_lora)`` (arXiv 2305.16213, eq. 9; 2412.02687, sec. 5.3).

    A sample moves against it: where the teacher sees more noise in it than the LoRA teacher does, it is taken out.
    """
    return torch.nan_to_num(per_sample(weight_B, eps_real) * (eps_real - eps_fake))


def descend(sample: Tensor, direction: Tensor) -> Tensor:
    """A loss whose gradient with respect to the sample is the direction, over the number of elements."""
    target = (sample - direction).detach()
    return 0.5 * (sample.double() - target.double()).square().mean().float()


def stratified(batch: int, generator: torch.Generator) -> Tensor:
    """Uniform numbers (B,), one in each of B equal parts of [0, 1], shuffled: less noise than B free draws."""
    device = generator.device
    u = (torch.arange(batch, device=device) + torch.rand(batch, generator=generator, device=device)) / batch
    return u[torch.randperm(batch, generator=generator, device=device)]


def shifted(u: Tensor, shift: float) -> Tensor:
    """Noise level of a uniform draw: ``shift u / (1 + (shift - 1) u)``, as in causvid_adapter's schedule."""
    return shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class Sample:
    """What the student made of a batch of texts; the fake score learns from it."""

    x: Tensor
    contexts: Contexts


class Distillation(ABC):
    """Student, frozen teacher and fake score, and one iteration of their training.

    Every process calls each method. A subclass makes the networks and says how a student samples, at which noise levels
    its samples are looked at, and how two scores are compared.

    Attributes:
        sample_shape: of one sample, without the batch.
        states: what is trained: "student" and "fake".
        guidance: NASA in the student.
        real, fake: the scores; one module where the fake score is the teacher with an adapter.
    """

    settings: VideoSettings | ImageSettings
    sample_shape: tuple[int, ...]
    states: dict[str, TrainState]
    guidance: TrainingGuidance
    real: nn.Module
    fake: nn.Module
    fake_updates = 1
    fake_warmup = 0
    fake_empty_share = 0.1

    def __init__(
        self, encoder: TextEncoder, prompts: Sequence[str], negatives: Sequence[str], context: DistributedContext
    ) -> None:
        self.encoder, self.prompts, self.negatives, self.context = encoder, prompts, negatives, context

    @abstractmethod
    def generate(self, noise: Tensor, text: TextContext, plan: Any, generator: torch.Generator) -> Tensor:
        """The student's samples (B, ...) from noise, inside a scope of ``guided_training``."""

    @abstractmethod
    def draw_levels(self, batch: int, generator: torch.Generator, for_fake: bool) -> Tensor:
        """Noise levels or timesteps (B,), on the device, to compare the scores at, or to teach the fake score at."""

    @abstractmethod
    def add_noise(self, x: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """The sample at these noise levels."""

    @abstractmethod
    def predict(self, model: nn.Module, noisy: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """A score's prediction (B, ...), float32."""

    @abstractmethod
    def compare(self, x: Tensor, real: Tensor, fake: Tensor, level_B: Tensor) -> Tensor:
        """Which way a sample is off, by the two scores' predictions."""

    @abstractmethod
    def fake_error(self, x: Tensor, noise: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """Mean squared error of the fake score on a sample."""

    @abstractmethod
    def decode(self, samples: Tensor) -> Tensor | None:
        """Clips (N, F, 3, H, W) in about [-1, 1] of samples (B, S, ...) for a contact sheet; None draws none."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Write the averaged student as a model."""

    def plan(self, step: int) -> Any:
        """How this step's samples are made, the same in every process; None is as always."""
        return None

    def real_score(self) -> AbstractContextManager[None]:
        """A scope in which ``real`` is the frozen teacher."""
        return nullcontext()

    def extra_loss(self, x: Tensor, prompts: Sequence[str], progress: float) -> tuple[Tensor, dict[str, float]]:
        """What is added to the student's loss, and what curves show of it."""
        return x.new_zeros(()), {}

    def measure(self, x: Tensor) -> dict[str, float]:
        """What curves show of finished samples."""
        return {}

    def iterate(self, step: int) -> dict[str, float]:
        """Samples, an update of the student on them, and updates of the fake score on them; values for the curves.

        An iteration follows from the step and the state alone.
        """
        run, warming = self.settings.run, step <= self.fake_warmup
        plan = self.plan(step)
        samples: list[Sample] = []
        totals: dict[str, float] = {}
        for part in range(run.accumulate):
            generator = seeded(run.seed, "batch", step, self.context.stream(part))
            sample, values = self._sample_and_gradient(plan, generator, warming, step / run.iterations)
            samples.append(sample)
            totals = {name: totals.get(name, 0.0) + value / run.accumulate for name, value in values.items()}
        if not warming:
            totals["student gradient"] = self.states["student"].step(step / run.iterations)
        effect = self.guidance.meter.effect
        self.guidance.meter.reset()
        totals["effect"] = 0.0 if effect is None else effect.relative_change
        losses = [self._update_fake(samples, step, number) for number in range(self.fake_updates)]
        totals["fake"] = sum(losses) / len(losses)
        return totals

    def _sample_and_gradient(
        self, plan: Any, generator: torch.Generator, warming: bool, progress: float
    ) -> tuple[Sample, dict[str, float]]:
        """Samples; unless the fake score is warming up, also the student's gradient on them."""
        settings = self.settings
        values: dict[str, float] = {}
        batch = settings.run.batch_size
        texts = draw_texts(settings.negatives, self.prompts, self.negatives, batch, generator)
        contexts = encode_texts(texts, self.encoder, self.context.device)
        text, alpha_B, lengths = self.student_text(contexts)
        noise = torch.randn((batch, *self.sample_shape), generator=generator).to(self.context.device)
        # one scope around forward and backward: gradient checkpointing runs the layers again in between
        with guided_training(self.guidance, alpha_B, lengths), torch.set_grad_enabled(not warming):
            x = self.generate(noise, text, plan, generator)
            if not warming:
                direction = self.direction(x.detach(), contexts, generator)
                extra, values = self.extra_loss(x, texts.prompts, progress)
                ((descend(x, direction) + extra) / settings.run.accumulate).backward()  # type: ignore[no-untyped-call]
                values = {"direction": float(direction.abs().mean()), **values}
        return Sample(x.detach(), contexts), values | self.measure(x.detach())

    def student_text(self, contexts: Contexts) -> tuple[TextContext, Tensor | None, Tensor | None]:
        """What the student reads: with NASA both prompts, the scales, and real tokens where padding is masked out."""
        negatives, positive, negative = self.settings.negatives, contexts.positive, contexts.negative
        if not negatives.reaches("student"):
            return positive, None, None
        both = doubled(positive.embeds, negative.embeds)
        text = TextContext(both, torch.stack([positive.lengths, negative.lengths], 1))
        return text, contexts.alpha_B, None if negatives.padding else negative.lengths

    @torch.no_grad()
    def direction(self, x: Tensor, contexts: Contexts, generator: torch.Generator) -> Tensor:
        """Which way the fake score sees samples off the teacher's; zero where both are the same and nothing guides."""
        negatives = self.settings.negatives
        level_B = self.draw_levels(len(x), generator, for_fake=False)
        noisy = self.add_noise(x, torch.randn(x.shape, generator=generator).to(x), level_B)
        with self.real_score():
            real = self.predict(self.real, noisy, level_B, contexts.positive)
            if bool((contexts.kappa_B != 1).any()):
                away = contexts.against(negatives.reaches("teacher"))
                real = guided_target(real, self.predict(self.real, noisy, level_B, away), contexts.kappa_B)
        fake = self.predict(self.fake, noisy, level_B, contexts.positive)
        if negatives.reaches("fake"):
            away = contexts.negative
            fake = guided_target(fake, self.predict(self.fake, noisy, level_B, away), contexts.kappa_B)
        return self.compare(x, real, fake, level_B)

    def _update_fake(self, samples: Sequence[Sample], step: int, number: int) -> float:
        """One update of the fake score on the student's samples, with the prompt alone; returns the loss."""
        run, total = self.settings.run, 0.0
        for part, sample in enumerate(samples):
            generator = seeded(run.seed, "fake", step, number, self.context.stream(part))
            x, contexts = sample.x, sample.contexts
            text = without_some(contexts.positive, contexts.empty, self.fake_empty_share, generator)
            level_B = self.draw_levels(len(x), generator, for_fake=True)
            noise = torch.randn(x.shape, generator=generator).to(x)
            loss = self.fake_error(x, noise, level_B, text) / len(samples)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.states["fake"].step(step / run.iterations)
        return total

    @torch.no_grad()
    def sample(self, texts: Texts, seed: int, plan: Any = None) -> Tensor:
        """Samples (B, ...) by the student as it is now, under the texts' own scales."""
        contexts = encode_texts(texts, self.encoder, self.context.device)
        text, alpha_B, lengths = self.student_text(contexts)
        generator = seeded(seed, "sample")
        noise = torch.randn((len(texts.prompts), *self.sample_shape), generator=generator).to(self.context.device)
        with guided_training(self.guidance, alpha_B, lengths):
            return self.generate(noise, text, plan, generator)

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Samples of fixed prompts and seeds by the averaged student: without NASA, and where it knows it, with."""
        run, negatives = self.settings.run, self.settings.negatives
        texts = draw_texts(negatives, self.prompts, self.negatives, run.sheet_samples, seeded(run.seed, "sheet"))
        scales = (0.0, 1.0) if negatives.reaches("student") else (0.0,)
        with self.states["student"].averaged():
            samples = [self.sample(at_scale(texts, scale), run.seed) for scale in scales]
        clips = self.decode(torch.stack(samples, 1)) if self.context.leads else None
        if clips is None:
            return
        labels = [f"{p}  |  without: {n}" for p, n in zip(texts.prompts, texts.negatives, strict=True)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".txt").write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        if len(clips) > len(labels):  # a clip for each scale; several stills are one row
            labels = [f"{label}  |  NASA {scale:g}" for label in labels for scale in scales]
        save_sheet(clips, labels, path)
