"""Stage one: one transformer that learns to denoise whole clips and chunk by chunk.

It is the multi-step model, the teacher of the distillation (bidirectional) and the start of the student (causal).

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from causvid_adapter import CausalWan
from nasa_video.text import TextEncoder
from nasa_video.train.attention import compile_blocks
from nasa_video.train.distillation import shifted, stratified
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.state import TrainState
from research.sprites.attention import trainable
from research.sprites.dataset import ClipBatch, Draw, LatentClips, text_a_chunk
from research.sprites.scenes import CLIP_CHUNKS
from research.sprites.stage import autocast, matrix_optimiser, run_steps


@dataclass(frozen=True)
class FlowTraining:
    """Settings of the base's training.

    `model` holds arguments of diffusers' `WanTransformer3DModel`; `batch_size` is that of one process. `shift` moves
    the noise levels drawn in training towards pure noise. Shares: of batches trained bidirectionally, of batches whose
    clips turn into another scene, of causal clips with a clean prefix, of captions left empty; `short_share` of all
    batches hold first chunks alone, as many more of them as take the same work, and of these clips `easy_share` show
    one plain sprite without flaws at first, falling to none at 70 % of the run; `hard_share` of all clips that do not
    switch show what is hardest to draw, told in full. The first latent frame stands for one
    picture instead of four and is the hardest to learn; `first_frame_weight` is what it counts. Cells that a sprite
    covers count `sprite_weight` more, falling to nothing over the last 40 % of the run: a weight that depends on the
    data bends the denoiser away from the mean, towards more sprite, and distribution matching would carry that on.
    """

    model: dict[str, Any] = field(default_factory=dict)
    iterations: int = 3000
    batch_size: int = 48
    frames_per_chunk: int = 3
    matrix_rate: float = 2e-3
    other_rate: float = 2e-3
    average_decay: float = 0.998
    shift: float = 3.0
    sprite_weight: float = 2.5
    first_frame_weight: float = 3.0
    short_share: float = 0.6
    easy_share: float = 0.6
    hard_share: float = 0.25
    bidirectional_share: float = 0.45
    switched_share: float = 0.25
    clean_prefix_share: float = 0.5
    empty_share: float = 0.1
    checkpoint_every: int = 100
    sheet_every: int = 400


@dataclass(frozen=True)
class NoisyBatch:
    """One draw of noise levels: sigma (B, T) in [0, 1], frames that count (B, T), and the mask's chunk or None."""

    sigma: Tensor
    counted: Tensor
    frames_per_chunk: int | None


def draw_noise_levels(
    settings: FlowTraining, batch: int, frames: int, bidirectional: bool, generator: torch.Generator
) -> NoisyBatch:
    """Bidirectional: one level a clip. Causal: one a chunk, with a clean prefix in some clips that is not counted."""
    counted = torch.ones(batch, frames)
    if bidirectional:
        u = stratified(batch, generator)
        return NoisyBatch(shifted(u, settings.shift)[:, None].expand(batch, frames), counted, None)
    chunks = frames // settings.frames_per_chunk
    sigma = shifted(torch.rand(batch, chunks, generator=generator), settings.shift)
    prefix = torch.randint(1, chunks, (batch,), generator=generator)
    prefix[torch.rand(batch, generator=generator) >= settings.clean_prefix_share] = 0
    clean = torch.arange(chunks)[None] < prefix[:, None]
    sigma = sigma.masked_fill(clean, 0.0).repeat_interleave(settings.frames_per_chunk, 1)
    counted = (~clean).float().repeat_interleave(settings.frames_per_chunk, 1)
    return NoisyBatch(sigma, counted, settings.frames_per_chunk)


def flow_loss(
    model: CausalWan,
    batch: ClipBatch,
    context: Tensor,
    noise: Tensor,
    levels: NoisyBatch,
    settings: FlowTraining,
    sprite_weight: float,
) -> Tensor:
    """Weighted mean squared error of the predicted flow, noise - x0; the weights of every clip sum to the same."""
    sigma = levels.sigma[:, :, None, None, None].to(batch.latents)
    noisy = (1 - sigma) * batch.latents + sigma * noise
    timestep = levels.sigma.to(noisy.device) * 1000
    if levels.frames_per_chunk is None:
        timestep = timestep[:, 0]  # one embedding a clip is cheaper than one a token
    with autocast(noisy.device):
        flow: Tensor = model(noisy, timestep, context, frames_per_chunk=levels.frames_per_chunk)
    counted = levels.counted.clone()
    counted[:, 0] *= settings.first_frame_weight
    weight = (1 + sprite_weight * batch.coverage) * counted[:, :, None, None, None].to(batch.latents)
    # else a big sprite counts more than a small one, and where a caption leaves the size open the model draws big ones
    weight = weight / weight.sum((1, 2, 3, 4), keepdim=True)
    error = (flow.float() - (noise - batch.latents)).square()
    return (weight * error).sum() / (error.shape[0] * error.shape[2])


@dataclass(frozen=True)
class FlowDraw:
    """One iteration's clips, whole or first chunks, and the embeddings of their captions (captions, L, E)."""

    draw: Draw
    whole: bool
    bidirectional: bool
    embeds: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class FlowDraws(Dataset[FlowDraw]):
    """What the iterations of one process are made of, by step; it follows from the seed and the step alone.

    Args:
        settings: of the training.
        clips: whole clips.
        short: first chunks of clips.
        encoder: of the captions.
        seed: of the run.
        context: whose process draws.
    """

    settings: FlowTraining
    clips: LatentClips
    short: LatentClips
    encoder: TextEncoder
    seed: int
    context: DistributedContext

    def number(self, step: int) -> int:
        """Of a process's iteration, which no other process has."""
        return self.context.stream(step)

    def __getitem__(self, step: int) -> FlowDraw:
        settings = self.settings
        seed = self.seed * 7_000_003 + self.number(step)
        # the kind of batch is the same in every process, so that nobody waits
        kinds = torch.rand(3, generator=torch.Generator().manual_seed(self.seed * 3_000_017 + step)).tolist()
        whole = kinds[2] >= settings.short_share
        if whole:
            switching = kinds[0] < settings.switched_share
            draw = self.clips.draw(settings.batch_size, seed, switching, hard=settings.hard_share)
        else:
            easy = settings.easy_share * max(0.0, 1 - step / (0.7 * settings.iterations))
            size = settings.batch_size * CLIP_CHUNKS
            draw = self.short.draw(size, seed, easy=easy, hard=settings.hard_share)
        draw = draw.with_some_empty(settings.empty_share, random.Random(seed))
        bidirectional = kinds[1] < settings.bidirectional_share or not whole  # one chunk: both are the same
        return FlowDraw(draw, whole, bidirectional, self.encoder(draw.captions).embeds.numpy())


def new_transformer(model: dict[str, Any], device: torch.device) -> CausalWan:
    """A causal Wan with fresh weights; the last projection starts at zero, so that the first flow is zero."""
    transformer = WanTransformer3DModel(**model).to(device)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    return trainable(transformer)


def train_flow(
    settings: FlowTraining,
    clips: LatentClips,
    short: LatentClips,
    encoder: TextEncoder,
    folder: Path,
    seed: int,
    context: DistributedContext,
    report: Report | None = None,
    show: Callable[[CausalWan, int], None] | None = None,
    start_from: Path | None = None,
) -> CausalWan:
    """Trains the base and returns its average; resumes from `folder`/base.pt.

    Args:
        clips: whole clips.
        short: first chunks of clips.
        start_from: a safetensors file of weights to begin with, in place of fresh ones.
        show: called now and then with the averaged model and the step, to draw samples or place weights.
    """
    torch.manual_seed(seed)
    device = context.device
    model = new_transformer(settings.model, device)
    if start_from is not None:
        model.transformer.load_state_dict({name: value.float() for name, value in load_file(start_from).items()})
    averaged = new_transformer(settings.model, device).eval().requires_grad_(False)
    compile_blocks(model)
    optimiser = matrix_optimiser(settings.matrix_rate, settings.other_rate)
    state = TrainState(model, optimiser, context, settings.average_decay)
    clips, short = clips.to(device), short.to(device)
    draws = FlowDraws(settings, clips, short, encoder, seed, context)

    def iterate(step: int, drawn: FlowDraw) -> dict[str, float]:
        number = seed * 1_000_003 + draws.number(step)
        generator = torch.Generator().manual_seed(number)
        batch = (clips if drawn.whole else short).take(drawn.draw)
        text = text_a_chunk(drawn.embeds, batch.latents, drawn.whole)
        size, frames = batch.latents.shape[:2]
        noise = torch.randn(batch.latents.shape, generator=torch.Generator(device).manual_seed(number), device=device)
        levels = draw_noise_levels(settings, size, frames, drawn.bidirectional, generator)
        sprite_weight = settings.sprite_weight * min(1.0, (1 - step / settings.iterations) / 0.4)
        loss = flow_loss(model, batch, text, noise, levels, settings, sprite_weight)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = state.step(step / settings.iterations)
        name = "causal" if not drawn.bidirectional else "bidirectional" if drawn.whole else "first chunk"
        return {name: float(loss.detach()), "gradient": norm}

    def show_average(step: int) -> None:
        if show is not None:
            state.copy_average_to(averaged)
            show(averaged, step)

    run_steps({"state": state}, iterate, settings, folder / "base.pt", context, report, draws, show_average)
    state.copy_average_to(averaged)
    return averaged
