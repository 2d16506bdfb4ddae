"""NASA-T for causal video: the student rolls out its own chunks under NASA, and two bidirectional scores teach it.

Self-forcing distribution matching (arXiv 2506.08009, 2311.18828) with the negative prompt in the teacher's guidance
and NASA in the student (arXiv 2412.02687, section 5.3, which has it for one-step image models).
"""

# B batch, T latent frames, C channels, h w latent height and width

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from causvid_adapter import CausalWan, StreamingDecoder, denormalize
from nasa_video.errors import InputError
from nasa_video.text import TextContext
from nasa_video.train.draws import (
    Contexts,
    Texts,
    at_scale,
    draw_texts,
    encode_texts,
    seeded,
    without_some,
)
from nasa_video.train.fleet import Fleet
from nasa_video.train.journal import contact_sheet
from nasa_video.train.lora import without_lora
from nasa_video.train.matching import (
    descend,
    guided_target,
    matching_direction,
    per_sample,
    shifted,
    stratified,
)
from nasa_video.train.player import Player
from nasa_video.train.rollout import RolloutPlan, roll_out
from nasa_video.train.settings import VideoSettings
from nasa_video.train.steering import doubled, steered
from nasa_video.train.video_parts import VideoParts, export_model, prepare_networks


@dataclass(frozen=True)
class _Lesson:
    """A finished rollout that the fake score learns from."""

    clip: Tensor
    contexts: Contexts


class VideoGame:
    """Student, teacher and fake score, and one iteration of their game."""

    def __init__(
        self, settings: VideoSettings, parts: VideoParts, prompts: Sequence[str], negatives: Sequence[str], fleet: Fleet
    ) -> None:
        self.settings, self.parts, self.fleet = settings, parts, fleet
        self.prompts, self.negatives = prompts, negatives
        sampler = parts.preset.sampler
        if settings.latent_frames % sampler.frames_per_chunk:
            raise InputError(
                f"latent_frames must be a multiple of {sampler.frames_per_chunk}, a chunk of {settings.student}, got "
                f"{settings.latent_frames}"
            )
        for count in settings.step_counts:
            sampler.timesteps(count)  # a wrong one is refused here, not in the middle of a run
        self.networks = prepare_networks(settings, parts, fleet)
        student, fake = self.networks.student, self.networks.fake
        self.players = {
            "student": Player(student, settings.student_optimiser, fleet, settings.run.average_decay),
            "fake": Player(fake, settings.fake_optimiser, fleet),
        }

    def iterate(self, step: int) -> dict[str, float]:
        """Rollouts, an update of the student on them, and updates of the fake score on them."""
        run, warming = self.settings.run, step <= self.settings.fake_warmup
        plan = self._plan(step)
        lessons, totals = [], {"direction": 0.0, "motion": 0.0, "chunk jump": 0.0}
        for part in range(run.accumulate):
            generator = seeded(run.seed, "batch", step, self.fleet.stream(part))
            lesson, values = self._lesson(plan, generator, warming)
            lessons.append(lesson)
            totals = {name: totals[name] + values[name] / run.accumulate for name in totals}
        if warming:
            del totals["direction"]
        else:
            totals["student gradient"] = self.players["student"].step(step / run.iterations)
        effect = self.networks.steering.meter.effect
        self.networks.steering.meter.reset()
        totals["effect"] = 0.0 if effect is None else effect.relative_change
        totals["fake"] = sum(self._teach_fake(lessons, step, number) for number in range(self.settings.fake_updates))
        totals["fake"] /= self.settings.fake_updates
        return totals

    def _plan(self, step: int) -> RolloutPlan:
        """The same in the whole fleet, so that nobody waits."""
        generator = seeded(self.settings.run.seed, "plan", step)
        counts = self.settings.step_counts
        count = counts[int(torch.randint(len(counts), (1,), generator=generator))]
        return self.plan_of(count, int(torch.randint(count, (1,), generator=generator)))

    def plan_of(self, count: int, exit_step: int) -> RolloutPlan:
        """A rollout in so many steps that stops after one of them."""
        sampler = self.parts.preset.sampler
        return RolloutPlan(
            sampler.schedule(count),
            exit_step,
            sampler.frames_per_chunk,
            sampler.window,
        )

    def _lesson(self, plan: RolloutPlan, generator: torch.Generator, warming: bool) -> tuple[_Lesson, dict[str, float]]:
        """A rollout; unless the fake score is warming up, also the student's gradient on it."""
        settings = self.settings
        texts = draw_texts(settings.negatives, self.prompts, self.negatives, settings.run.batch_size, generator)
        contexts = encode_texts(texts, self.parts.encoder, self.fleet.device)
        context, alpha_B, lengths = self._student_text(contexts)
        shape = (settings.run.batch_size, settings.latent_frames, *self.parts.latent_size)
        noise = torch.randn(shape, generator=generator).to(self.fleet.device)
        values = {"direction": 0.0}
        # one scope around forward and backward: gradient checkpointing runs the layers again in between
        with steered(self.networks.steering, alpha_B, lengths), torch.set_grad_enabled(not warming):
            clip = roll_out(self.networks.student, context, noise, plan, generator, self.fleet.autocast)
            if not warming:
                direction = self.direction(clip.detach(), contexts, generator)
                (descend(clip, direction) / settings.run.accumulate).backward()  # type: ignore[no-untyped-call]
                values["direction"] = float(direction.abs().mean())
        clip = clip.detach()
        return _Lesson(clip, contexts), values | _continuity(clip, plan.frames_per_chunk)

    def _student_text(self, contexts: Contexts) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the student reads: with NASA both prompts and the scales."""
        negatives = self.settings.negatives
        if not negatives.reaches("student"):
            return contexts.positive.embeds, None, None
        both = doubled(contexts.positive.embeds, contexts.negative.embeds)
        return both, contexts.alpha_B, None if negatives.padding else contexts.negative.lengths

    @torch.no_grad()
    def direction(self, clip: Tensor, contexts: Contexts, generator: torch.Generator) -> Tensor:
        """Which way the fake score sees the clip (B, T, C, h, w) off the teacher's; zero where both are the same."""
        networks, negatives = self.networks, self.settings.negatives
        sigma_B = self._sigma(len(clip), generator).to(clip.device)
        level = per_sample(sigma_B, clip)
        noise = torch.randn(clip.shape, generator=generator).to(clip.device)
        noisy = (1 - level) * clip + level * noise
        with without_lora(networks.real) if networks.shared else nullcontext():
            x_real = self._estimate(networks.real, noisy, sigma_B, contexts.positive)
            if bool((contexts.kappa_B != 1).any()):
                away = contexts.against(negatives.reaches("teacher"))
                x_away = self._estimate(networks.real, noisy, sigma_B, away)
                x_real = guided_target(x_real, x_away, contexts.kappa_B)
        x_fake = self._estimate(networks.fake, noisy, sigma_B, contexts.positive)
        if negatives.reaches("fake"):
            x_away = self._estimate(networks.fake, noisy, sigma_B, contexts.negative)
            x_fake = guided_target(x_fake, x_away, contexts.kappa_B)
        return matching_direction(clip, x_real, x_fake)

    def _estimate(self, model: CausalWan, noisy: Tensor, sigma_B: Tensor, text: TextContext) -> Tensor:
        """A score's clean clip, bidirectional, one noise level a clip."""
        with self.fleet.autocast():
            flow: Tensor = model(noisy, sigma_B * 1000, text.embeds)
        return noisy - per_sample(sigma_B, noisy) * flow.float()

    def _sigma(self, batch: int, generator: torch.Generator) -> Tensor:
        low, high = self.settings.score_range
        return shifted(stratified(batch, generator), self.settings.score_shift).clamp(low, high)

    def _teach_fake(self, lessons: Sequence[_Lesson], step: int, number: int) -> float:
        """One update by flow matching on the student's clips, with the prompt alone; returns the loss."""
        run = self.settings.run
        total = 0.0
        for part, lesson in enumerate(lessons):
            generator = seeded(run.seed, "fake", step, number, self.fleet.stream(part))
            clip, contexts = lesson.clip, lesson.contexts
            text = without_some(contexts.positive, contexts.empty, self.settings.fake_empty_share, generator)
            sigma_B = self._sigma(len(clip), generator).to(clip.device)
            noise = torch.randn(clip.shape, generator=generator).to(clip.device)
            level = per_sample(sigma_B, clip)
            with self.fleet.autocast():
                flow = self.networks.fake((1 - level) * clip + level * noise, sigma_B * 1000, text.embeds)
            loss = (flow.float() - (noise - clip)).square().mean() / len(lessons)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.players["fake"].step(step / run.iterations)
        return total

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Clips of fixed prompts and seeds by the averaged student: without NASA, and where it knows it, with."""
        run = self.settings.run
        generator = seeded(run.seed, "sheet")
        texts = draw_texts(self.settings.negatives, self.prompts, self.negatives, run.sheet_samples, generator)
        count = max(self.settings.step_counts)
        with self.players["student"].averaged():
            scales = (0.0, 1.0) if self.settings.negatives.reaches("student") else (0.0,)
            clips = [self.sample(at_scale(texts, scale), count, run.seed) for scale in scales]
        if self.parts.vae is None or not self.fleet.leads:
            return
        vae = self.parts.vae.to(self.fleet.device)
        latents = torch.stack(clips, 1).flatten(0, 1)
        frames = [StreamingDecoder(vae).decode(denormalize(vae, one)).float().cpu() for one in latents.split(4)]
        pictures = torch.cat(frames)
        contact_sheet(pictures, path, zoom=max(1, 128 // pictures.shape[-1]))
        path.with_suffix(".txt").write_text(
            "".join(f"{p}  |  without: {n}\n" for p, n in zip(texts.prompts, texts.negatives, strict=True)),
            encoding="utf-8",
        )

    @torch.no_grad()
    def sample(self, texts: Texts, count: int, seed: int) -> Tensor:
        """Clips (B, T, C, h, w) by the student as it is now, in so many steps, under the texts' own scales."""
        contexts = encode_texts(texts, self.parts.encoder, self.fleet.device)
        context, alpha_B, lengths = self._student_text(contexts)
        generator = seeded(seed, "sample")
        shape = (len(texts.prompts), self.settings.latent_frames, *self.parts.latent_size)
        noise = torch.randn(shape, generator=generator).to(self.fleet.device)
        plan = self.plan_of(count, count - 1)
        with steered(self.networks.steering, alpha_B, lengths):
            return roll_out(self.networks.student, context, noise, plan, generator, self.fleet.autocast)

    def export(self, folder: Path) -> None:
        """Write the averaged student as a model folder."""
        export_model(folder, self.settings, self.parts, self.players["student"])


def _continuity(clip: Tensor, size: int) -> dict[str, float]:
    """Motion, the mean change between latent frames; and the change over chunks' borders in units of that inside."""
    change = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3, 4))
    border = torch.arange(1, clip.shape[1], device=clip.device) % size == 0
    inside = change[~border].mean() if bool((~border).any()) else change.new_ones(())
    jump = change[border].mean() / (inside + 1e-6) if bool(border.any()) else change.new_zeros(())
    return {"motion": float(change.mean()) if len(change) else 0.0, "chunk jump": float(jump)}
