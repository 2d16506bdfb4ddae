"""Stage three: the student learns to read in its start noise what a prompt leaves open.

The noise stands for a value of everything (`nasa_video.training.choices`). A frozen copy of the student gets a caption
that says it all, the student what a user may say; at the same noise both are to do the same. So a prompt of one word
shows as many backgrounds, motions and flaws as the data has, each as well as if it had been asked for, and no clip and
no teacher is needed. There are two more losses: every token of an early block names the values, since an error in
latents hardly tells what was not read (docs/variety.md), and later blocks are to compute what the copy's do.

Shape legend: B batch, T latent frames of a chunk, C channels, h w latent height and width, D width of the transformer.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nn_f
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.captions import caption_for_reading, leaves_open, random_caption
from nasa_video.sprites.world import CLIP_CHUNKS, sample_scenes
from nasa_video.text import TextEncoder
from nasa_video.training.autoencoder import autocast
from nasa_video.training.checkpoint import Average
from nasa_video.training.choices import CHOICES, CHUNK_LATENTS, NoiseChoices
from nasa_video.training.distill import rollout
from nasa_video.training.journal import Journal
from nasa_video.training.optimiser import MatrixOptimiser, block_matrix, warm_then_linear
from nasa_video.training.parallel import Team
from nasa_video.training.stage import Stage


@dataclass(frozen=True)
class ReadingTraining:
    """Settings of the reading.

    `batch_size` are first chunks of one process. Over the first `early` iterations only blocks up to `read_block` run
    and learn, `early_factor` times as fast: every token after it is to name the values, with weight `read_weight`.
    `whole_share` of the iterations after that are about a later chunk of longer clips, a third as many, `later_share`
    about a later step of the sampler than the first. The blocks from `read_block` on count `block_weight`.
    """

    iterations: int = 900
    early: int = 300
    early_factor: float = 2.5
    batch_size: int = 32
    matrix_rate: float = 1.6e-3
    other_rate: float = 1e-3
    head_rate: float = 3e-3
    average_decay: float = 0.98
    later_share: float = 0.3
    whole_share: float = 0.4
    read_block: int = 2
    read_weight: float = 0.2
    block_weight: float = 0.3
    checkpoint_every: int = 50
    sheet_every: int = 200


@dataclass(frozen=True)
class ReadingDraw:
    """One iteration: the student's and the copy's captions, embedded, and the scenes' values (B,) by name.

    `left_open` says which of them the noise decided. `timesteps` are those of the sampler up to the one that counts,
    `noise` (B, T or more, C, h, w) is that of the chunk that counts and of those before it.
    """

    timesteps: tuple[float, ...]
    seed: int
    embeds: NDArray[np.float32]
    told_embeds: NDArray[np.float32]
    values: dict[str, NDArray[np.int64]]
    left_open: dict[str, NDArray[np.bool_]]
    noise: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ReadingDraws(Dataset[ReadingDraw]):
    """Draws by iteration: they follow from the seed and the iteration alone."""

    settings: ReadingTraining
    samplers: Sequence[tuple[float, ...]]
    choices: NoiseChoices
    encoder: TextEncoder
    seed: int
    team: Team

    def __getitem__(self, step: int) -> ReadingDraw:
        # the steps are the same in the whole team, so that nobody waits
        plan = random.Random(self.seed * 5_000_011 + step)
        early = step <= self.settings.early
        timesteps = plan.choice([steps for steps in self.samplers if len(steps) > 1])
        last = plan.randrange(1, len(timesteps)) if not early and plan.random() < self.settings.later_share else 0
        whole = not early and plan.random() < self.settings.whole_share
        frames = CHUNK_LATENTS * (plan.randint(2, CLIP_CHUNKS) if whole else 1)
        number = (self.seed * 11_000_003 + step) * self.team.size + self.team.rank
        generator, rng = torch.Generator().manual_seed(number), random.Random(number)
        size = max(1, self.settings.batch_size // CLIP_CHUNKS) if whole else self.settings.batch_size
        scenes = sample_scenes(size, generator)
        captions = [caption_for_reading(scenes.row(i), rng) for i in range(size)]
        noise = torch.randn(size, frames, *self.choices.directions.shape[2:], generator=generator)
        scenes = self.choices.settle(noise, scenes, captions)
        open_names = [leaves_open(caption.stated) for caption in captions]
        told = [random_caption(scenes.row(i), rng, full=True).text for i in range(size)]
        return ReadingDraw(
            timesteps[: last + 1],
            number,
            self.encoder([caption.text for caption in captions]).embeds.numpy(),
            self.encoder(told).embeds.numpy(),
            {name: getattr(scenes, name).numpy() for name in CHOICES},
            {name: np.array([name in names for names in open_names]) for name in CHOICES},
            noise.numpy(),
        )


class Reading(Stage[ReadingDraw]):
    """The student, its frozen copy, and one iteration."""

    PARTS = ("student", "head", "optimiser", "head_optimiser", "average")

    def __init__(
        self,
        settings: ReadingTraining,
        samplers: Sequence[tuple[float, ...]],
        student: CausalWan,
        latent_size: tuple[int, int, int],
        encoder: TextEncoder,
        seed: int,
        team: Team,
    ) -> None:
        self.settings, self.team, self.device = settings, team, student.device
        self.draws = ReadingDraws(settings, samplers, NoiseChoices(latent_size), encoder, seed, team)
        self.told = student.eval().requires_grad_(False)
        self.student = copy.deepcopy(student).requires_grad_(True)
        width = student.transformer.config.num_attention_heads * student.transformer.config.attention_head_dim
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(CHOICES.values()))).to(self.device)
        self.optimiser = MatrixOptimiser(
            self.student, block_matrix, settings.matrix_rate, settings.other_rate, betas=(0.9, 0.95)
        )
        self.head_optimiser = torch.optim.AdamW(self.head.parameters(), lr=settings.head_rate)
        self.average = Average(self.student, settings.average_decay)
        self._seen: dict[CausalWan, dict[int, Tensor]] = {self.told: {}, self.student: {}}
        for model, seen in self._seen.items():
            for layer in range(settings.read_block, model.num_layers):
                model.transformer.blocks[layer].register_forward_hook(_keep(seen, layer))
        self._first_blocks = {model: _first_blocks(model, settings.read_block + 1) for model in self._seen}

    def iterate(self, step: int, drawn: ReadingDraw) -> dict[str, float]:
        """One update."""
        settings = self.settings
        if step <= settings.early:
            values = self._early(drawn)
            scale = settings.early_factor * warm_then_linear(step / settings.early, flat=0.7)
        else:
            values = self._whole(drawn)
            progress = (step - settings.early) / (settings.iterations - settings.early)
            scale = warm_then_linear(progress, flat=0.5)
        weights = {"flow": 1.0, "blocks": settings.block_weight, "read": settings.read_weight}
        loss = torch.stack([weights[name] * value for name, value in values.items() if name in weights]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        self.team.average_gradients(self.student)
        gradient = self.optimiser.step(scale)
        if "read" in values:
            self.team.average_gradients(self.head)
            self.head_optimiser.step()
            self.head_optimiser.zero_grad()
        self.average.update(self.student)
        return {name: float(value.detach()) for name, value in values.items()} | {"gradient": gradient}

    def _early(self, drawn: ReadingDraw) -> dict[str, Tensor]:
        """Errors after the first blocks, at the sampler's first step."""
        x, t = torch.from_numpy(drawn.noise).to(self.device), drawn.timesteps[0]
        with torch.no_grad(), autocast(self.device):
            self._first_blocks[self.told](x, t, torch.from_numpy(drawn.told_embeds).to(self.device))
        with autocast(self.device):
            self._first_blocks[self.student](x, t, torch.from_numpy(drawn.embeds).to(self.device))
        tokens, goal = (self._seen[model][self.settings.read_block] for model in (self.student, self.told))
        return {"blocks": _relative_error(tokens, goal), **self._read(tokens, drawn)}

    def _whole(self, drawn: ReadingDraw) -> dict[str, Tensor]:
        """Errors of the flow and of the blocks, at the step of the sampler that was drawn."""
        context = torch.from_numpy(drawn.embeds).to(self.device)
        told_context = torch.from_numpy(drawn.told_embeds).to(self.device)
        generator = torch.Generator(self.device).manual_seed(drawn.seed)
        schedule = FlowMatchSchedule(1.0, drawn.timesteps)
        noise, t = torch.from_numpy(drawn.noise).to(self.device), drawn.timesteps[0]
        before, x = noise[:, :-CHUNK_LATENTS], noise[:, -CHUNK_LATENTS:]
        if before.shape[1]:
            last = len(drawn.timesteps) - 1
            with torch.no_grad():
                before = rollout(self.told, told_context, before, drawn.timesteps, last, CHUNK_LATENTS, generator)

        def flow_of(model: CausalWan, text: Tensor) -> Tensor:
            """Of the last chunk, after a clean beginning."""
            levels = torch.cat((torch.zeros_like(before[:, :, 0, 0, 0]), torch.full_like(x[:, :, 0, 0, 0], t)), 1)
            with autocast(self.device):
                flow: Tensor = model(torch.cat((before, x), 1), levels, text, frames_per_chunk=CHUNK_LATENTS)
            return flow[:, -CHUNK_LATENTS:].float()

        with torch.no_grad():
            wanted = flow_of(self.told, told_context)
            for following in drawn.timesteps[1:]:
                fresh = torch.randn(x.shape, generator=generator, device=self.device)
                x, t = schedule.add_noise(schedule.to_x0(x, wanted, t), fresh, following), following
                wanted = flow_of(self.told, told_context)
        flow = flow_of(self.student, context)
        seen, goal = self._seen[self.student], self._seen[self.told]
        blocks = torch.stack([_relative_error(seen[layer], goal[layer]) for layer in seen]).mean()
        values = {"flow": nn_f.mse_loss(flow, wanted), "blocks": blocks}
        first = len(drawn.timesteps) == 1 and not before.shape[1]
        return values | self._read(seen[self.settings.read_block], drawn) if first else values

    def _read(self, tokens: Tensor, drawn: ReadingDraw) -> dict[str, Tensor]:
        """Cross-entropy of the head over what the noise decided, and the share of it that is named rightly.

        Every token (B, S, D) is to name it: read off their mean, the first block's input would do.
        """
        logits = self.head(tokens.float()).split(list(CHOICES.values()), 2)
        total, right, count = torch.zeros((), device=self.device), torch.zeros((), device=self.device), 0
        for (name, values), answer in zip(drawn.values.items(), logits, strict=True):
            decided = torch.from_numpy(drawn.left_open[name]).to(self.device)
            wanted = torch.from_numpy(values).to(self.device)[:, None].expand(answer.shape[:2])
            errors = nn_f.cross_entropy(answer.transpose(1, 2), wanted, reduction="none").mean(1)
            total = total + (errors * decided).sum() / len(decided)
            right = right + ((answer.argmax(2) == wanted).float().mean(1) * decided).sum()
            count += int(decided.sum())
        return {"read": total, "right": right / max(count, 1)}


def _first_blocks(model: CausalWan, number: int) -> CausalWan:
    """A model that shares all weights and ends after some blocks."""
    shallow, transformer = copy.copy(model), copy.copy(model.transformer)
    transformer._modules = {**model.transformer._modules, "blocks": model.transformer.blocks[:number]}
    shallow._modules = {**model._modules, "transformer": transformer}
    return shallow


def _keep(seen: dict[int, Tensor], layer: int) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, tokens: Tensor) -> None:
        seen[layer] = tokens

    return hook


def _relative_error(tokens: Tensor, goal: Tensor) -> Tensor:
    """Mean squared error of tokens (B, S, D) by the goal's variance over all of them."""
    goal = goal.float()
    return (tokens.float() - goal).square().mean() / goal.var((0, 1)).mean()


def train_reading(
    settings: ReadingTraining,
    samplers: Sequence[tuple[float, ...]],
    student: CausalWan,
    latent_size: tuple[int, int, int],
    encoder: TextEncoder,
    folder: Path,
    seed: int,
    journal: Journal,
    team: Team,
    show: Callable[[CausalWan, int], None] | None = None,
) -> CausalWan:
    """Teaches a student of these `samplers`' timesteps to read, and returns its average.

    Resumes from `folder`/reading.pt.
    """
    torch.manual_seed(seed)
    averaged = copy.deepcopy(student).eval().requires_grad_(False)
    stage = Reading(settings, samplers, student, latent_size, encoder, seed, team)
    return stage.run(settings, averaged, folder / "reading.pt", journal, show)
