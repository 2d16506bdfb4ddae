# ruff: noqa: D103
"""A fast laboratory for removal: batches of first chunks (or clips), guided, decoded and read by the shipped detector.

Shape legend: B batch, T latent frames, C channels, h w latent height and width, Q query tokens, H heads, D head dim.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, ModelCall
from causvid_adapter.noise import SeededNoise
from causvid_adapter.vae_stream import StreamingDecoder, denormalize
from nasa_video.attention import TextKeys, make_attend
from nasa_video.backbones import wan
from nasa_video.sprites import detectors
from nasa_video.steering import PromptKeys, Steering
from nasa_video.text import WordLlamaEncoder
from nasa_video.training.attention import trainable

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ROOT / "nasa_video" / "sprites" / "weights"
SHIPPED = WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
FOLDER = Path(os.environ.get("REMOVAL_FOLDER", ROOT / "runs" / "removal"))
"""Where clips, bank, pairs, checkpoints and results are kept."""
DEVICE = torch.device(os.environ.get("REMOVAL_DEVICE", "cpu"))
SCHEDULES = {
    4: FlowMatchSchedule(1.0, (1000, 750, 500, 250), alone=FlowMatchSchedule(1.0, (990, 750, 500, 250), euler_steps=1)),
    2: FlowMatchSchedule(1.0, (1000, 750), alone=FlowMatchSchedule(1.0, (990, 750), euler_steps=1)),
    1: FlowMatchSchedule(1.0, (1000,)),
}
BF16 = os.environ.get("LAB_DTYPE", "bf16") == "bf16"


def autocast() -> Any:
    return torch.autocast(DEVICE.type, torch.bfloat16) if BF16 else contextlib.nullcontext()


def model_of(path: Path) -> CausalWan:
    """The shipped architecture with the weights of a file."""
    config = WanTransformer3DModel.load_config(WEIGHTS / "transformer")
    transformer = WanTransformer3DModel.from_config(config)
    transformer.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return trainable(transformer.to(DEVICE)).eval().requires_grad_(False)


class LabSteering(Steering):
    """Calls `rule(state, layer, q, positive, negatives)`; the rule sees step and chunk in `state.call`."""

    rule: Callable[..., Tensor] | None = None

    def guide(self, layer: int, q: Tensor, positive: TextKeys) -> Tensor:
        if self.rule is None or not self.negatives:
            return self.attend(q, positive)
        negatives = [(keys.layers[layer], weight) for keys, weight in self.negatives]
        return self.rule(self, layer, q, positive, negatives)


@dataclass
class Videos:
    """What a batch made: latents (B, T, C, h, w), labels by attribute, the detector's logits by head."""

    latents: Tensor
    labels: dict[str, list[str]]
    logits: dict[str, Tensor] = field(default_factory=dict)

    def row(self, i: int) -> dict[str, str]:
        return {name: column[i] for name, column in self.labels.items()}


class Lab:
    """Model, decoder and detector."""

    def __init__(self, weights: Path | None = None) -> None:
        self.model = model_of(weights or SHIPPED)
        vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).float().eval().to(DEVICE)
        self.vae = vae.requires_grad_(False)
        self.encoder = WordLlamaEncoder(24)
        self.detector = detectors.Detector.load(WEIGHTS / "detector.safetensors")
        self.state = LabSteering(make_attend("sdpa"), self.model.num_layers)

    def keys(self, texts: Sequence[str], padding: bool = True) -> PromptKeys:
        return wan.prompt_keys(self.model.transformer, self.encoder(list(texts)), fold=True, padding=padding)

    @torch.no_grad()
    def make(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        negatives: Sequence[Sequence[str]] | None = None,
        rule: Callable[..., Tensor] | None = None,
        steps: int = 4,
        frames: int = 3,
        first_steps: int | None = None,
        batch: int = 32,
        padding: bool = True,
        extra: Sequence[Sequence[str]] | None = None,
        decode: bool = True,
    ) -> Videos:
        """Videos of prompts and seeds. `negatives` are lists of terms; `extra` are further texts a row, whose keys the
        rule finds in `state.extra` (a list of PromptKeys)."""
        latents = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            latents.append(
                self._latents(
                    prompts[part], seeds[part], negatives[part] if negatives else None, rule, steps, frames,
                    first_steps, padding, extra[part] if extra else None,
                )
            )  # fmt: skip
        x = torch.cat(latents)
        return self.read(x) if decode else Videos(x, {})

    def _latents(self, prompts, seeds, negatives, rule, steps, frames, first_steps, padding, extra):
        state = self.state
        state.positive = self.keys(prompts)
        width = max(map(len, negatives)) if negatives else 0
        filled = [[*row, *[""] * (width - len(row))] for row in negatives or []]
        state.negatives = [(self.keys([row[i] for row in filled], padding), 1.0) for i in range(width)]
        state.present = [torch.tensor([i < len(row) for row in negatives]) for i in range(width)]
        state.extra = [self.keys([row[i] for row in extra]) for i in range(len(extra[0]))] if extra else []
        state.rule = rule
        if hasattr(rule, "begin"):
            rule.begin(len(prompts), width)
        first = SCHEDULES[first_steps] if first_steps else None
        window = {"window_frames": 9, "sink_frames": 3, "rope": "window"}
        sampler = ChunkSampler(self.model, SCHEDULES[steps], 3, first_schedule=first, **window)
        noise = SeededNoise(list(seeds), (12, 8, 8), DEVICE)

        def before(call: ModelCall) -> None:
            state.call = call
            if hasattr(rule, "before"):
                rule.before(call)

        with wan.install(self.model.transformer, state), autocast():
            return torch.cat(
                [c.float().cpu() for c in sampler.stream(None, noise, num_frames=frames, before_call=before)], 1
            )

    @torch.no_grad()
    def decode(self, latents: Tensor, batch: int = 16) -> Tensor:
        parts = []
        for part in latents.split(batch):
            with autocast():
                parts.append(StreamingDecoder(self.vae).decode(denormalize(self.vae, part.to(DEVICE))).float().cpu())
        return torch.cat(parts)

    def read(self, latents: Tensor) -> Videos:
        return Videos(latents, *self.read_frames(self.decode(latents)))

    @torch.no_grad()
    def read_frames(self, frames: Tensor) -> tuple[dict[str, list[str]], dict[str, Tensor]]:
        logits: dict[str, list[Tensor]] = {}
        for part in frames.split(64):
            for name, value in self.detector.network(part).items():
                logits.setdefault(name, []).append(value)
        joined = {name: torch.cat(values) for name, values in logits.items()}
        read = detectors._read(joined)
        return {name: read[name] for name in detectors.ATTRIBUTES}, joined
