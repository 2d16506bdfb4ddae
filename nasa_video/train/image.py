"""NASA-T as published: image-free variational score distillation of a one-step student that runs with NASA.

arXiv 2412.02687, section 5.3, on SwiftBrush (arXiv 2312.05239, 2408.14176): a frozen teacher with the negative prompt
in its guidance, and the same network with an adapter, the LoRA teacher, that keeps learning the student's pictures.
"""

# B batch, C channels, h w latent height and width, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from nasa_video.text import TextContext
from nasa_video.train.clip_loss import clamped_loss
from nasa_video.train.draws import Contexts, at_scale, draw_texts, encode_texts, seeded, without_some
from nasa_video.train.fleet import Fleet
from nasa_video.train.image_parts import ImageParts, export_denoiser
from nasa_video.train.journal import contact_sheet
from nasa_video.train.lora import add_lora, without_lora
from nasa_video.train.matching import descend, guided_target, per_sample, score_direction
from nasa_video.train.player import Player
from nasa_video.train.settings import ImageSettings
from nasa_video.train.steering import doubled, steer, steered


@dataclass(frozen=True)
class _Lesson:
    """Finished latents that the LoRA teacher learns from."""

    latents: Tensor
    contexts: Contexts


class ImageGame:
    """Student, frozen teacher and LoRA teacher, and one iteration of their game."""

    def __init__(
        self, settings: ImageSettings, parts: ImageParts, prompts: Sequence[str], negatives: Sequence[str], fleet: Fleet
    ) -> None:
        self.settings, self.parts, self.fleet = settings, parts, fleet
        self.prompts, self.negatives = prompts, negatives
        self.teacher = parts.teacher.to(fleet.device).eval()
        add_lora(self.teacher, settings.lora, settings.run.seed + 1)
        self.student = parts.student.to(fleet.device).eval().float().requires_grad_(True)
        tokens = settings.max_tokens
        self.steering = steer(self.student, tokens)
        steer(self.teacher, tokens)
        for model in (self.student, self.teacher):
            if settings.run.gradient_checkpointing:
                model.enable_gradient_checkpointing()  # type: ignore[operator]
            fleet.place(model, _layers(model))
        self.alphas = parts.alphas.to(fleet.device, torch.float32)
        self.decoder = None if parts.decoder is None else parts.decoder.to(fleet.device).requires_grad_(False)
        self.judge = None if parts.judge is None else parts.judge.to(fleet.device)
        self.players = {
            "student": Player(self.student, settings.student_optimiser, fleet, settings.run.average_decay),
            "fake": Player(self.teacher, settings.fake_optimiser, fleet),
        }

    def iterate(self, step: int) -> dict[str, float]:
        """An update of the student and one of the LoRA teacher, on the same pictures."""
        run = self.settings.run
        lessons = []
        totals = {"direction": 0.0} | ({"clip": 0.0} if self.judge is not None else {})
        for part in range(run.accumulate):
            generator = seeded(run.seed, "batch", step, self.fleet.stream(part))
            lesson, values = self._lesson(generator, step / run.iterations)
            lessons.append(lesson)
            totals = {name: totals[name] + values[name] / run.accumulate for name in totals}
        totals["student gradient"] = self.players["student"].step(step / run.iterations)
        effect = self.steering.meter.effect
        self.steering.meter.reset()
        totals["effect"] = 0.0 if effect is None else effect.relative_change
        totals["fake"] = self._teach_fake(lessons, step)
        return totals

    def _lesson(self, generator: torch.Generator, progress: float) -> tuple[_Lesson, dict[str, float]]:
        """One batch of pictures and the student's gradient on them."""
        settings = self.settings
        texts = draw_texts(settings.negatives, self.prompts, self.negatives, settings.run.batch_size, generator)
        contexts = encode_texts(texts, self.parts.encoder, self.fleet.device)
        shape = (settings.run.batch_size, *self.parts.latent_size)
        noise = torch.randn(shape, generator=generator).to(self.fleet.device)
        values = {"clip": 0.0}
        # one scope around forward and backward: gradient checkpointing runs the layers again in between
        with steered(self.steering, contexts.alpha_B if settings.negatives.reaches("student") else None):
            latents = self.generate(noise, contexts)
            direction = self.direction(latents.detach(), contexts, generator)
            loss = descend(latents, direction)
            if self.judge is not None:
                weight, off = self._clip_loss(latents, texts.prompts, progress)
                loss = loss + weight * off
                values["clip"] = float(off.detach())
            (loss / settings.run.accumulate).backward()  # type: ignore[no-untyped-call]
        return _Lesson(latents.detach(), contexts), values | {"direction": float(direction.abs().mean())}

    def generate(self, noise: Tensor, contexts: Contexts) -> Tensor:
        """The student's latents (B, C, h, w) from noise in one step, inside a scope of ``steered``."""
        text = contexts.positive
        if self.settings.negatives.reaches("student"):
            lengths = torch.stack([contexts.positive.lengths, contexts.negative.lengths], 1)
            text = TextContext(doubled(contexts.positive.embeds, contexts.negative.embeds), lengths)
        t_B = torch.full((len(noise),), self.settings.student_timestep, device=noise.device)
        eps = self._noise(self.student, noise, t_B, text)
        alpha, sigma = self._levels(t_B, noise)
        return (noise - sigma * eps) / alpha

    @torch.no_grad()
    def direction(self, latents: Tensor, contexts: Contexts, generator: torch.Generator) -> Tensor:
        """Which way latents (B, C, h, w) are off; zero where both teachers are the same and nothing guides."""
        negatives = self.settings.negatives
        t_B = self._timesteps(self.settings.score_timesteps, len(latents), generator)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        alpha, sigma = self._levels(t_B, latents)
        noisy = alpha * latents + sigma * noise
        with without_lora(self.teacher):
            eps_real = self._noise(self.teacher, noisy, t_B, contexts.positive)
            if bool((contexts.kappa_B != 1).any()):
                away = contexts.against(negatives.reaches("teacher"))
                eps_real = guided_target(eps_real, self._noise(self.teacher, noisy, t_B, away), contexts.kappa_B)
        eps_fake = self._noise(self.teacher, noisy, t_B, contexts.positive)
        if negatives.reaches("fake"):
            eps_away = self._noise(self.teacher, noisy, t_B, contexts.negative)
            eps_fake = guided_target(eps_fake, eps_away, contexts.kappa_B)
        return score_direction(eps_real, eps_fake, 1 - self.alphas[t_B])

    def _noise(self, model: nn.Module, noisy: Tensor, t_B: Tensor, text: TextContext) -> Tensor:
        """Predicted noise (B, C, h, w), float32, whatever the network predicts."""
        extra = {}
        if self.settings.family == "pixart":
            extra = {
                "encoder_attention_mask": _mask(text, self.settings.max_tokens),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
        dtype = next(model.parameters()).dtype
        with self.fleet.autocast():
            out = model(
                noisy.to(dtype), timestep=t_B, encoder_hidden_states=text.embeds.to(dtype), return_dict=False, **extra
            )[0]
        predicted: Tensor = out[:, : noisy.shape[1]].float()  # PixArt predicts its variance too
        if self.settings.prediction == "epsilon":
            return predicted
        alpha, sigma = self._levels(t_B, noisy)
        return alpha * predicted + sigma * noisy

    def _levels(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(self.alphas[t_B].sqrt(), like), per_sample((1 - self.alphas[t_B]).sqrt(), like)

    def _timesteps(self, limits: tuple[int, int], batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(limits[0], limits[1] + 1, (batch,), generator=generator).to(self.fleet.device)

    def _clip_loss(self, latents: Tensor, prompts: Sequence[str], progress: float) -> tuple[float, Tensor]:
        """The present weight of the clamped CLIP loss, and the loss."""
        settings = self.settings.clip
        assert settings is not None
        assert self.judge is not None
        with self.fleet.autocast():
            pictures = self.decode(latents)
            similarity = self.judge.similarity(pictures, prompts)
        weight = settings.first_weight + progress * (settings.last_weight - settings.first_weight)
        return weight, clamped_loss(similarity, settings.margin)

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about [-1, 1], from latents."""
        assert self.decoder is not None
        scaled = (latents / self.decoder.config.scaling_factor).to(self.decoder.dtype)
        pictures: Tensor = self.decoder.decode(scaled).sample.float()
        return pictures

    def _teach_fake(self, lessons: Sequence[_Lesson], step: int) -> float:
        """One update of the LoRA teacher by noise prediction, without the negative; returns the loss."""
        run = self.settings.run
        total = 0.0
        for part, lesson in enumerate(lessons):
            generator = seeded(run.seed, "fake", step, self.fleet.stream(part))
            latents, contexts = lesson.latents, lesson.contexts
            text = without_some(contexts.positive, contexts.empty, self.settings.lora_empty_share, generator)
            t_B = self._timesteps(self.settings.lora_timesteps, len(latents), generator)
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            alpha, sigma = self._levels(t_B, latents)
            eps = self._noise(self.teacher, alpha * latents + sigma * noise, t_B, text)
            loss = (eps - noise).square().mean() / len(lessons)
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        self.players["fake"].step(step / run.iterations)
        return total

    @torch.no_grad()
    def sheet(self, path: Path) -> None:
        """Pictures of fixed prompts and seeds by the averaged student: without NASA, and where it knows it, with."""
        run, reaches = self.settings.run, self.settings.negatives.reaches("student")
        generator = seeded(run.seed, "sheet")
        texts = draw_texts(self.settings.negatives, self.prompts, self.negatives, run.sheet_samples, generator)
        noise = torch.randn((run.sheet_samples, *self.parts.latent_size), generator=generator).to(self.fleet.device)
        rows = []
        with self.players["student"].averaged():
            for scale in (0.0, 1.0) if reaches else (0.0,):
                contexts = encode_texts(at_scale(texts, scale), self.parts.encoder, self.fleet.device)
                with steered(self.steering, contexts.alpha_B if reaches else None):
                    rows.append(self.generate(noise, contexts))
        if self.decoder is not None and self.fleet.leads:
            pictures = torch.stack([self.decode(row) for row in rows], 1)
            contact_sheet(pictures, path, range(len(rows)), zoom=1)

    def export(self, folder: Path) -> None:
        """Write the averaged student as a denoiser's folder."""
        export_denoiser(folder, self.settings.family, self.players["student"])


def _mask(text: TextContext, tokens: int) -> Tensor:
    """(B, L), or (B, 2 L) for two prompts, whose lengths are (B, 2): 1 where a token is real."""
    columns = torch.arange(tokens, device=text.lengths.device)
    return (columns < text.lengths[..., None]).flatten(1).long()


def _layers(model: nn.Module) -> list[nn.Module]:
    """What is sharded by itself: a transformer's blocks, or a UNet's."""
    for name in ("transformer_blocks", "blocks"):
        if hasattr(model, name):
            return list(getattr(model, name))
    middle = [model.mid_block] if getattr(model, "mid_block", None) is not None else []
    return [*model.down_blocks, *middle, *model.up_blocks]  # type: ignore[union-attr,misc,list-item]
