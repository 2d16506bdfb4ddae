"""Trains a tiny few-step FLUX on a toy world, and measures what F1, F2 and F3 of NASA do to it.

    python scripts/measure_joint_attention.py [--output runs/joint_attention.json] [--seeds 0]

A picture of 8 x 8 has a shape, a colour and a background; a prompt names any of them. Guidance is asked to remove what
the prompt leaves open ("square on white", without "red"), and measured by the nearest of all possible pictures: is the
thing gone, is what the prompt says held, and how far is the picture from any that exists. One CPU thread, about ten
minutes of it a seed. Nothing here speaks about the real FLUX's pictures; see docs/joint_attention.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from nasa_video.backbones.joint import JoinedKeys, JointFormula, NegativeMass, PositiveMass, WholeOutput
from nasa_video.backbones.scope import NegativeContext
from nasa_video.guidance import Guidance, Nag, Nasa, Vsf
from nasa_video.integration.guided import guided

COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]]).float()
BACKGROUNDS = torch.tensor([-1.0, 0.0, 1.0])
TEXT_TOKENS, TEXT_DIM, PAD, BATCH = 8, 32, 0, 48
SCALES = (0.25, 0.5, 1.0, 1.5, 2.5)
SAMPLES = 24  # a question


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
        pictures, labels = [], []
        for s, mask in enumerate(shape_masks()):
            for c, colour in enumerate(COLOURS):
                for b, background in enumerate(BACKGROUNDS):
                    for y in (1, 2):
                        for x in (1, 2):
                            picture = torch.full((3, 8, 8), float(background))
                            part = picture[:, y : y + 5, x : x + 5]
                            part[:, mask] = colour[:, None]
                            pictures.append(to_tokens(picture[None])[0].flatten())
                            labels.append([s, c, b])
        return cls(torch.stack(pictures), torch.tensor(labels))

    def nearest(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (B, 3) of the nearest picture, and the distance to it per value (root mean square), (B,)."""
        distance, index = torch.cdist(tokens.flatten(1), self.pictures).min(dim=1)
        return self.labels[index], distance / self.pictures.shape[1] ** 0.5


def to_tokens(pictures: Tensor) -> Tensor:
    """(B, 3, 8, 8) -> (B, 16, 12): patches of 2 x 2."""
    return pictures.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(1, 2).flatten(2)


class Text:
    """Words as fixed random vectors: padding, shapes 1 to 4, colours 5 to 8, backgrounds 9 to 11."""

    def __init__(self) -> None:
        self.table = torch.randn(12, TEXT_DIM, generator=torch.Generator().manual_seed(0))

    def __call__(self, words: Tensor) -> tuple[Tensor, Tensor]:
        """Word numbers (B, 3), 0 where a word is left out -> (B, L, E) padded behind, and (B, E) pooled."""
        order = (words == PAD).to(torch.int8).argsort(dim=1, stable=True)
        tokens = torch.nn.functional.pad(words.gather(1, order), (0, TEXT_TOKENS - 3))
        embeds = self.table[tokens]
        real = (tokens != PAD).unsqueeze(-1)
        return embeds, (embeds * real).sum(1) / real.sum(1).clamp_min(1)


def word_numbers(labels: Tensor) -> Tensor:
    """Labels (B, 3) as words."""
    return labels + torch.tensor([1, 5, 9])


def new_model(seed: int) -> FluxTransformer2DModel:
    """FLUX of 1 double and 3 single blocks, width 64."""
    torch.manual_seed(seed)
    return FluxTransformer2DModel(
        in_channels=12, num_layers=1, num_single_layers=3, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=TEXT_DIM, pooled_projection_dim=TEXT_DIM, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def image_ids() -> Tensor:
    """Rows and columns of the 16 patches."""
    ids = torch.zeros(16, 3)
    ids[:, 1], ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return ids


def flow(model: Any, x: Tensor, t: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """The predicted noise minus data."""
    out: Tensor = model(
        hidden_states=x, encoder_hidden_states=text[0], pooled_projections=text[1], timestep=t, img_ids=image_ids(),
        txt_ids=torch.zeros(TEXT_TOKENS, 3),
    ).sample  # fmt: skip
    return out


@torch.no_grad()
def sample(model: Any, noise: Tensor, text: tuple[Tensor, Tensor], steps: int) -> Tensor:
    """Euler steps from noise to data."""
    x = noise
    for i in range(steps):
        x = x - flow(model, x, torch.full((len(x),), 1 - i / steps), text) / steps
    return x


def random_words(world: World, labels: Tensor) -> Tensor:
    """Prompts that name each property with probability 0.7, and nothing at all now and then."""
    keep = (torch.rand(labels.shape) < 0.7) & (torch.rand(len(labels), 1) < 0.95)
    return word_numbers(labels) * keep


def train(model: Any, batches: Any, steps: int, rate: float) -> None:
    """Regress the flow; ``batches()`` gives (data, noise, text)."""
    optimiser = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.05)
    started, mean = time.perf_counter(), 0.0
    for step in range(steps):
        data, noise, text = batches()
        t = torch.rand(len(data))
        mixed = torch.lerp(data, noise, t[:, None, None])
        loss = (flow(model, mixed, t, text) - (noise - data)).square().mean()
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        mean += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {mean / 100:.4f}, {time.perf_counter() - started:.0f} s", flush=True)
            mean = 0.0


def pair(world: World, words: Tensor, noise: Tensor) -> Tensor:
    """The picture that each noise (B, 16, 12) leads to: of those that the prompt allows, the one most alike."""
    names = word_numbers(world.labels)
    allowed = ((words[:, None] == names[None]) | (words[:, None] == PAD)).all(dim=2)
    centred = world.pictures - world.pictures.mean(dim=0)
    alike = noise.flatten(1) @ torch.nn.functional.normalize(centred, dim=1).T
    chosen = alike.masked_fill(~allowed, -torch.inf).argmax(dim=1)
    return world.pictures[chosen].unflatten(1, (16, 12))


def make_student(world: World, text: Text, seed: int, steps: int) -> FluxTransformer2DModel:
    """A flow along straight paths from noise to its own picture: what distillation to few steps ends with."""
    student = new_model(seed)

    def straight() -> Any:
        words = random_words(world, world.labels[torch.randint(len(world.labels), (BATCH,))])
        noise = torch.randn(BATCH, 16, 12)
        return pair(world, words, noise), noise, text(words)

    train(student, straight, steps, 2e-3)
    return student.eval().requires_grad_(False)


def questions() -> list[tuple[str, Tensor, Tensor]]:
    """(property to be removed, prompt's labels with -1 where it leaves one open, label that is unwanted)."""
    asked = []
    for open_property, name, count in ((0, "shape", 4), (1, "colour", 4), (2, "background", 3)):
        for unwanted in range(count):
            others = torch.tensor([[unwanted % 4, (unwanted + 1) % 4, unwanted % 3]])
            others[0, open_property] = -1
            asked.append((name, others, torch.tensor([open_property, unwanted])))
    return asked


def measure(
    model: Any, world: World, text: Text, guidance: Guidance | None, joint: JointFormula | None, steps: int, kind: str
) -> dict[str, float]:
    """Shares over all questions; ``kind`` of negative: "removal", "unrelated" (another shape), "empty" (padding)."""
    generator = torch.Generator().manual_seed(1)
    gone, held, distance = [], [], []
    for _, labels, (prop, unwanted) in questions():
        if kind == "unrelated" and int(prop) == 0:
            continue
        words = word_numbers(labels) * (labels >= 0)
        negative = torch.zeros(1, 3, dtype=torch.long)
        if kind == "removal":
            negative[0, prop] = word_numbers(torch.stack([unwanted] * 3)[None])[0, prop]
        elif kind == "unrelated":
            negative[0, 0] = 1 + (labels[0, 0] + 1) % 4
        embeds, pooled = text(negative)
        noise = torch.randn(SAMPLES, 16, 12, generator=generator)
        prompt_embeds, prompt_pooled = text(words)
        prompt = (prompt_embeds.expand(SAMPLES, -1, -1), prompt_pooled.expand(SAMPLES, -1))
        if guidance is None:
            found, far = world.nearest(sample(model, noise, prompt, steps))
        else:
            with guided(model, NegativeContext(embeds, pooled=pooled), guidance, joint=joint):
                found, far = world.nearest(sample(model, noise, prompt, steps))
        gone.append((found[:, prop] != unwanted).float().mean())
        held.append(((found == labels) | (labels < 0)).all(dim=1).float().mean())
        distance.append(far.mean())
    return {
        "gone": round(float(torch.stack(gone).mean()), 4),
        "held": round(float(torch.stack(held).mean()), 4),
        "distance": round(float(torch.stack(distance).mean()), 4),
    }


def methods() -> list[tuple[str, float, Guidance, JointFormula]]:
    """Everything that is compared."""
    formulas: Sequence[tuple[str, JointFormula]] = (
        ("F1", WholeOutput()), ("F2", NegativeMass()), ("F3", PositiveMass()),
    )  # fmt: skip
    runs: list[tuple[str, float, Guidance, JointFormula]] = [
        (name, scale, Nasa(scale), formula) for name, formula in formulas for scale in SCALES
    ]
    runs += [("NAG", scale, Nag(scale), WholeOutput()) for scale in (3.0, 5.0)]
    runs += [("VSF", scale, Vsf(scale, negative_padding=True), JoinedKeys()) for scale in (1.0, 2.0)]
    return runs


def main() -> None:
    """Train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/joint_attention.json"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--train-steps", type=int, default=900)
    options = parser.parse_args()
    torch.set_num_threads(1)
    world, text, rows = World.make(), Text(), []
    for seed in options.seeds:
        torch.manual_seed(seed)
        student = make_student(world, text, seed, options.train_steps)
        for steps in (4, 1):
            for kind in ("removal", "unrelated", "empty") if steps > 1 else ("removal",):
                rows.append({"seed": seed, "steps": steps, "kind": kind, "method": "none", "scale": 0.0})
                rows[-1] |= measure(student, world, text, None, None, steps, kind)
                print(rows[-1], flush=True)
                for name, scale, guidance, joint in methods():
                    rows.append({"seed": seed, "steps": steps, "kind": kind, "method": name, "scale": scale})
                    rows[-1] |= measure(student, world, text, guidance, joint, steps, kind)
                    print(rows[-1], flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
