"""NASA-T as published: image-free variational score distillation of a one-step student that runs with NASA.

arXiv 2412.02687, section 5.3, on SwiftBrush (arXiv 2312.05239, 2408.14176): a frozen teacher with the negative prompt
in its guidance, and the same network with an adapter, the LoRA teacher, that keeps learning the student's images.
"""

# B batch, C channels, h w latent height and width, H W image height and width, L text tokens

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasa_video.text import TextContext
from nasa_video.train.attention import add_guidance
from nasa_video.train.distillation import Distillation, per_sample, score_direction
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.image_networks import ImageParts, clamped_loss, export_denoiser
from nasa_video.train.settings import ImageSettings
from nasa_video.train.state import TrainState, add_lora, without_lora


class ImageTrainer(Distillation):
    """Student, frozen teacher and LoRA teacher of a one-step image model."""

    settings: ImageSettings

    def __init__(
        self,
        settings: ImageSettings,
        parts: ImageParts,
        prompts: Sequence[str],
        negatives: Sequence[str],
        context: DistributedContext,
    ) -> None:
        super().__init__(parts.encoder, prompts, negatives, context)
        self.settings, self.parts = settings, parts
        self.sample_shape, self.fake_empty_share = parts.latent_size, settings.lora_empty_share
        self.real = self.fake = parts.teacher.to(context.device).eval()
        add_lora(self.fake, settings.lora, settings.run.seed + 1)
        self.student = parts.student.to(context.device).eval().float().requires_grad_(True)
        self.guidance = add_guidance(self.student, settings.max_tokens)
        add_guidance(self.fake, settings.max_tokens)
        for model in (self.student, self.fake):
            if settings.run.gradient_checkpointing:
                model.enable_gradient_checkpointing()  # type: ignore[operator]
            context.place(model, _layers(model))
        self.alphas = parts.alphas.to(context.device, torch.float32)
        self.decoder = None if parts.decoder is None else parts.decoder.to(context.device).requires_grad_(False)
        self.judge = None if parts.judge is None else parts.judge.to(context.device)
        self.states = {
            "student": TrainState(self.student, settings.student_optimiser, context, settings.run.average_decay),
            "fake": TrainState(self.fake, settings.fake_optimiser, context),
        }

    def generate(self, noise: Tensor, text: TextContext, plan: None, generator: torch.Generator) -> Tensor:
        """Latents (B, C, h, w) from noise in one step."""
        t_B = torch.full((len(noise),), self.settings.student_timestep, device=noise.device)
        eps = self.predict(self.student, noise, t_B, text)
        alpha, sigma = self._scales(t_B, noise)
        return (noise - sigma * eps) / alpha

    def draw_levels(self, batch: int, generator: torch.Generator, for_fake: bool) -> Tensor:
        """Timesteps (B,)."""
        low, high = self.settings.lora_timesteps if for_fake else self.settings.score_timesteps
        return torch.randint(low, high + 1, (batch,), generator=generator).to(self.context.device)

    def add_noise(self, x: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """``sqrt(alpha) x + sqrt(1 - alpha) noise``."""
        alpha, sigma = self._scales(level_B, x)
        return alpha * x + sigma * noise

    def _scales(self, t_B: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        return per_sample(self.alphas[t_B].sqrt(), like), per_sample((1 - self.alphas[t_B]).sqrt(), like)

    def predict(self, model: nn.Module, noisy: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """Predicted noise (B, C, h, w), float32, whatever the network predicts."""
        extra: dict[str, Any] = {}
        if self.settings.family == "pixart":
            extra = {
                "encoder_attention_mask": _mask(text, self.settings.max_tokens),
                "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
            }
        dtype = next(model.parameters()).dtype
        embeds = text.embeds.to(dtype)
        with self.context.autocast():
            out = model(noisy.to(dtype), timestep=level_B, encoder_hidden_states=embeds, return_dict=False, **extra)[0]
        predicted: Tensor = out[:, : noisy.shape[1]].float()  # PixArt predicts its variance too
        if self.settings.prediction == "epsilon":
            return predicted
        alpha, sigma = self._scales(level_B, noisy)
        return alpha * predicted + sigma * noisy

    def real_score(self) -> AbstractContextManager[None]:
        """The teacher without its adapter."""
        return without_lora(self.real)

    def compare(self, x: Tensor, real: Tensor, fake: Tensor, level_B: Tensor) -> Tensor:
        """Variational score distillation's direction."""
        return score_direction(real, fake, 1 - self.alphas[level_B])

    def fake_error(self, x: Tensor, noise: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """Noise prediction on the student's images."""
        return (self.predict(self.fake, self.add_noise(x, noise, level_B), level_B, text) - noise).square().mean()

    def extra_loss(self, x: Tensor, prompts: Sequence[str], progress: float) -> tuple[Tensor, dict[str, float]]:
        """The clamped CLIP loss at its present weight."""
        clip = self.settings.clip
        if clip is None or self.judge is None:
            return x.new_zeros(()), {}
        with self.context.autocast():
            similarity = self.judge.similarity(self.decode_images(x), prompts)
        loss = clamped_loss(similarity, clip.margin)
        weight = clip.first_weight + progress * (clip.last_weight - clip.first_weight)
        return weight * loss, {"clip": float(loss.detach())}

    def decode_images(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W), about [-1, 1], from latents."""
        assert self.decoder is not None
        scaled = (latents / self.decoder.config.scaling_factor).to(self.decoder.dtype)
        images: Tensor = self.decoder.decode(scaled).sample.float()
        return images

    def decode(self, samples: Tensor) -> Tensor | None:
        """Images of latents (B, S, C, h, w), those of one prompt side by side."""
        if self.decoder is None:
            return None
        return torch.stack([self.decode_images(latents) for latents in samples.unbind(1)], 1)

    def export(self, folder: Path) -> None:
        """Write the averaged student as a denoiser's folder."""
        export_denoiser(folder, self.settings.family, self.states["student"])


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
