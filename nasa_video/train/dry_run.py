"""A config tried out: tiny networks of its true classes go one step with its own settings, nothing is downloaded."""

# L text tokens, E text dim

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from causvid_adapter import CausalWan
from nasa_video.models.presets import find_preset
from nasa_video.text import TextContext
from nasa_video.train.distillation import Distillation
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import train
from nasa_video.train.settings import ImageSettings, Lora, Settings, VideoSettings
from nasa_video.train.state import add_lora

PROMPTS = ["a red ball on a table", "two birds in the rain", "a house by the sea at night", "a boat"]
NEGATIVES = ["blurry", "low quality, watermark", "snow", "cartoon"]
# What the published Wan 2.1 generators share; of other models it is read from their config, where that is here.
_WAN = {"in_channels": 16, "out_channels": 16, "text_dim": 4096, "patch_size": [1, 2, 2]}


class HashEncoder:
    """A text encoder without weights: every word has a random vector of its own, zeros stand after the words.

    Args:
        full: count padding as real tokens, as Stable Diffusion does.
    """

    def __init__(self, max_tokens: int, dim: int, full: bool = False) -> None:
        self.max_tokens, self.dim, self.full = max_tokens, dim, full

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        embeds = torch.zeros(len(prompts), self.max_tokens, self.dim)
        lengths = []
        for row, prompt in enumerate(prompts):
            words = prompt.lower().split()[: self.max_tokens]
            for column, word in enumerate(words):
                generator = torch.Generator().manual_seed(random.Random(word).getrandbits(62))
                embeds[row, column] = torch.randn(self.dim, generator=generator)
            lengths.append(self.max_tokens if self.full else len(words))
        return TextContext(embeds, torch.tensor(lengths))


def shrunk(settings: Settings) -> Settings:
    """The same run with one iteration (two where the first only warms the fake score up) and a batch of two.

    Ranks fit tiny layers, and bfloat16 stays.
    """
    run = settings.run.model_copy(
        update={
            "iterations": 2, "batch_size": 2, "accumulate": min(settings.run.accumulate, 2), "checkpoint_every": 1,
            "sheet_every": 2, "sheet_samples": min(settings.run.sheet_samples, 2), "compile": False,
        }
    )  # fmt: skip
    update: dict[str, Any] = {"run": run}
    for name in ("student_lora", "fake_lora", "lora"):
        lora = getattr(settings, name, None)
        if lora is not None:
            update[name] = lora.model_copy(update={"rank": 2, "scaling": 2 * lora.scaling / lora.rank})
    if isinstance(settings, VideoSettings):
        size = find_preset(settings.student).sampler.frames_per_chunk
        update |= {"latent_frames": min(settings.latent_frames, 3 * size), "fake_warmup": min(settings.fake_warmup, 1)}
        update["fake_updates"] = min(settings.fake_updates, 2)
    return settings.model_copy(update=update)


def tiny_trainer(settings: Settings, context: DistributedContext) -> Distillation:
    """A config's training on tiny networks of the true classes, with their true channels, text width and length."""
    if isinstance(settings, ImageSettings):
        from nasa_video.train.image import ImageTrainer
        from nasa_video.train.image_networks import tiny_image_parts

        return ImageTrainer(settings, tiny_image_parts(settings), PROMPTS, NEGATIVES, context)
    from nasa_video.train.video import VideoParts, VideoTrainer

    preset = find_preset(settings.student)
    config = {name: true_config(settings)[name] for name in _WAN}
    small = {"num_attention_heads": 2, "attention_head_dim": 12, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2}
    torch.manual_seed(settings.run.seed)
    student, teacher = (CausalWan(WanTransformer3DModel(**config, **small)) for _ in range(2))
    encoder = HashEncoder(preset.components.text_encoder.max_tokens, int(config["text_dim"]))
    parts = VideoParts(preset, student, teacher, encoder, (int(config["in_channels"]), 4, 4))
    return VideoTrainer(settings, parts, PROMPTS, NEGATIVES, context)


def true_config(settings: VideoSettings) -> dict[str, Any]:
    """The student's architecture: from its preset, from its weights' folder where they are here, else Wan 2.1's."""
    parts = find_preset(settings.student).components
    if parts.config is not None:
        return dict(parts.config)
    found = parts.transformer.find()
    if found is not None and (found / "config.json").is_file():
        read = json.loads((found / "config.json").read_text(encoding="utf-8"))
        return {name: value for name, value in read.items() if not name.startswith("_")}
    return dict(_WAN)


def true_student(settings: Settings) -> nn.Module:
    """The student at its true size, without memory (on "meta")."""
    with torch.device("meta"):
        if isinstance(settings, ImageSettings):
            from nasa_video.train.image_networks import true_denoiser

            return true_denoiser(settings)  # type: ignore[no-any-return]
        wan: nn.Module = WanTransformer3DModel(**true_config(settings))
        return wan


def sizes(settings: Settings) -> list[dict[str, Any]]:
    """A row for each network: parameters, trained ones, and bytes of weights, gradients, AdamW's states and average.

    Activations, the VAE and the text encoder come on top.
    """
    model = true_student(settings)
    total = sum(p.numel() for p in model.parameters())
    video = isinstance(settings, VideoSettings)
    own, fake = (settings.student_lora, settings.fake_lora) if video else (None, settings.lora)  # type: ignore[union-attr]
    rows = []
    for name, lora, averaged in (("student", own, True), ("teacher and fake score", fake, False)):
        trained = total if lora is None else _lora_parameters(settings, lora)
        frozen = total if lora is not None or name != "student" else 0
        # float32: weight, gradient and two moments of what is trained; what is frozen waits in bfloat16
        size = trained * (16 + 4 * averaged) + 2 * frozen
        rows.append({"network": name, "parameters": total, "trained": trained, "bytes": size})
    return rows


def _lora_parameters(settings: Settings, lora: Lora) -> int:
    model = true_student(settings)
    add_lora(model, lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def dry_run(settings: Settings, context: DistributedContext, folder: Path | None = None) -> list[dict[str, float]]:
    """Run a config in small; returns the values of its iterations."""
    small = shrunk(settings)
    values: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        train(tiny_trainer(small, context), place, lambda step, steps, row: values.append(row))
    return values
