"""A tiny few-step FLUX and the world that it draws, for research/measure_joint_attention.py.

A picture of 8 x 8 has a shape, a colour and a background; a prompt names any of them. Few enough pictures exist that
every drawn one can be compared with all of them.
"""

# B pictures, S image tokens, C values of a patch, L text tokens, E text dim, N pictures that exist

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()
BACKGROUNDS = torch.tensor([-1.0, 0.0, 1.0])
COUNTS = (4, 4, 3)
"""Shapes, colours, backgrounds."""
TEXT_TOKENS, TEXT_DIM, PAD = 6, 32, 0
TIMES = (1.0, 0.75, 0.5, 0.25)
"""Times that the student is trained for and sampled at in four steps."""
BATCH, RATE = 40, 3e-3


def shape_masks() -> Tensor:
    """Four shapes of 5 x 5, (4, 5, 5)."""
    row = torch.arange(5)
    plus = (row[:, None] == 2) | (row[None] == 2)
    cross = (row[:, None] == row[None]) | (row[:, None] + row[None] == 4)
    bars = (row[:, None] % 2 == 0).expand(5, 5)
    return torch.stack([torch.ones(5, 5, dtype=torch.bool), plus, cross, bars])


@dataclass(frozen=True)
class World:
    """All pictures that exist, (N, 192), and the (shape, colour, background) of each, (N, 3)."""

    pictures: Tensor
    labels: Tensor

    @classmethod
    def make(cls) -> World:
        """Every shape in every colour on every background, at two places."""
        pictures, labels = [], []
        for s, mask in enumerate(shape_masks()):
            for c, colour in enumerate(COLOURS):
                for b, background in enumerate(BACKGROUNDS):
                    for x in (1, 2):
                        picture = torch.full((3, 8, 8), float(background))
                        part = picture[:, 1:6, x : x + 5]
                        part[:, mask] = colour[:, None]
                        pictures.append(to_tokens(picture[None])[0].flatten())
                        labels.append([s, c, b])
        return cls(torch.stack(pictures), torch.tensor(labels))

    def nearest(self, tokens_BSC: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, 3) of the nearest picture, and the distance to it per value (root mean square), (B,)."""
        distance, index = torch.cdist(tokens_BSC.flatten(1), self.pictures).min(dim=1)
        return self.labels[index], distance / self.pictures.shape[1] ** 0.5

    def target(self, words: Tensor, noise_BSC: Tensor) -> Tensor:
        """The picture that each noise leads to: of those that the prompt allows, the one most alike, (B, S, C)."""
        names = word_numbers(self.labels)
        allowed = ((words[:, None] == names[None]) | (words[:, None] == PAD)).all(dim=2)
        centred = self.pictures - self.pictures.mean(dim=0)
        alike = noise_BSC.flatten(1) @ torch.nn.functional.normalize(centred, dim=1).T
        chosen = alike.masked_fill(~allowed, -torch.inf).argmax(dim=1)
        return self.pictures[chosen].unflatten(1, noise_BSC.shape[1:])


def to_tokens(pictures: Tensor) -> Tensor:
    """(B, 3, 8, 8) -> (B, 16, 12): patches of 2 x 2."""
    return pictures.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)


class Text:
    """Words as fixed random vectors: padding, shapes 1 to 4, colours 5 to 8, backgrounds 9 to 11."""

    def __init__(self) -> None:
        self.table = torch.randn(12, TEXT_DIM, generator=torch.Generator().manual_seed(0))

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word numbers (B, 3), 0 where a word is left out -> (B, L, E) padded behind, unmasked, and (B, E) pooled."""
        order = (words == PAD).to(torch.int8).argsort(dim=1, stable=True)
        tokens = torch.nn.functional.pad(words.gather(1, order), (0, TEXT_TOKENS - 3))
        embeds = self.table[tokens]
        real = (tokens != PAD).unsqueeze(-1)
        return embeds, (embeds * real).sum(1) / real.sum(1).clamp_min(1)


def word_numbers(labels: Tensor) -> Tensor:
    """Labels (B, 3) as words."""
    return labels + torch.tensor([1, 5, 9])


def random_words(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Prompts that name each property with probability 0.7, and nothing at all now and then."""
    keep = torch.rand(labels.shape, generator=generator) < 0.7
    keep &= torch.rand(len(labels), 1, generator=generator) < 0.95
    return word_numbers(labels) * keep


def new_model(seed: int) -> FluxTransformer2DModel:
    """FLUX of 1 double and 3 single blocks, width 64."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def flow(model: Any, x_BSC: Tensor, t_B: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The predicted noise minus data, (B, S, C)."""
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    out: Tensor = model(
        hidden_states=x_BSC, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=t_B, img_ids=ids,
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
    ).sample  # fmt: skip
    return out


@torch.no_grad()
def sample(model: Any, noise_BSC: Tensor, text: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """Euler steps from noise to data."""
    x = noise_BSC
    for i in range(steps):
        x = x - flow(model, x, torch.full((len(x),), 1 - i / steps), text) / steps
    return x


def loss_at(model: Any, world: World, text: Text, seed: int, step: int) -> Tensor:
    """Mean square error of one batch's flow; all of it follows from (seed, step), so that training can be resumed."""
    g = torch.Generator().manual_seed(1_000_003 * seed + step)
    labels = world.labels[torch.randint(len(world.labels), (BATCH,), generator=g)]
    words = random_words(labels, g)
    noise = torch.randn(BATCH, 16, 12, generator=g)
    t = torch.tensor(TIMES)[torch.randint(len(TIMES), (BATCH,), generator=g)]
    data = world.target(words, noise)
    return (flow(model, torch.lerp(data, noise, t[:, None, None]), t, text(words)) - (noise - data)).square().mean()


def train(
    world: World, text: Text, seed: int, steps: int, path: Path, enough: Callable[[], bool]
) -> FluxTransformer2DModel | None:
    """The student of a seed: a flow along straight paths from noise to its own picture, as distillation ends with.

    Goes on from ``path`` and keeps its state there; None where ``enough()`` stopped it before the end.
    """
    model = new_model(seed)
    optimiser = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, RATE, total_steps=steps, pct_start=0.05)
    parts: dict[str, Any] = {"model": model, "optimiser": optimiser, "schedule": schedule}
    first, started, mean = 0, time.process_time(), 0.0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        first = saved["step"]
        for name, part in parts.items():
            part.load_state_dict(saved[name])
    for step in range(first, steps):
        loss = loss_at(model, world, text, seed, step)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        mean += loss.item()
        stop = enough()
        if step % 100 == 99:
            print(f"seed {seed}, step {step + 1}: loss {mean / 100:.4f}, {time.process_time() - started:.0f} s of CPU")
            mean = 0.0
        if step % 100 == 99 or stop or step == steps - 1:
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, path)
        if stop:
            return None
    return model.eval().requires_grad_(False)
