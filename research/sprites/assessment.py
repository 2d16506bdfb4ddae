"""How good a trained sprites model is: attribute accuracy on held-out captions, spread on unstated attributes, speed.

Shape legend: B batch, T latent frames, C channels, F frames, h w latent height and width, H W picture height and width.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, StreamingDecoder
from causvid_adapter.noise import SeededNoise
from causvid_adapter.vae import denormalize
from causvid_adapter.window import Window
from nasa_video.sprites.captions import full_caption, value_names
from nasa_video.sprites.detectors import BETWEEN, NONE, Detector
from nasa_video.sprites.world import ATTRIBUTES, COLOURS, FLAWS, SHAPES, sample_scenes
from nasa_video.text import TextEncoder
from nasa_video.train.distillation import shifted
from research.sprites.captions import held_out_caption
from research.sprites.stage import autocast


@dataclass(frozen=True)
class HeldOutPrompt:
    """A caption that training never saw, and the values that it states."""

    text: str
    stated: dict[str, str]


def held_out_prompts(n: int, seed: int, showing: str | None = None) -> list[HeldOutPrompt]:
    """n full captions from the held-out twentieth, of scenes drawn with this seed.

    With `showing` only those of scenes that have a texture, weather or flaw, and nothing else counts as stated.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    prompts: list[HeldOutPrompt] = []
    while len(prompts) < n:
        scenes = sample_scenes(64, generator)
        for index in range(64):
            row = scenes.row(index)
            if showing and not row[showing]:
                continue
            caption = held_out_caption(row, rng)
            if caption is not None and len(prompts) < n:
                names = _expected(value_names(row))
                counted = [showing] if showing else sorted(caption.stated)
                prompts.append(HeldOutPrompt(caption.text, {a: names[a] for a in counted}))
    return prompts


def rare_prompts(prompts: Sequence[HeldOutPrompt], at_least: int, seed: int) -> list[HeldOutPrompt]:
    """As many more as it takes until each texture, weather and flaw is stated by `at_least` prompts."""
    more = []
    for number, name in enumerate(("texture", "weather", *FLAWS)):
        missing = at_least - sum(name in prompt.stated for prompt in prompts)
        more += held_out_prompts(max(missing, 0), seed + number, showing=name)
    return more


def _expected(names: dict[str, str]) -> dict[str, str]:
    """Value names as the detector would write them: two objects' shapes and colours joined."""
    if names["count"] == "two":
        for attribute, order in (("shape", SHAPES), ("colour", COLOURS)):
            both = {names[attribute], names[attribute + "2"]}
            names[attribute] = BETWEEN.join(v for v in order if v in both)
    return names


class Studio:
    """Makes clips from prompts: an encoder, an autoencoder, and the size of their latents."""

    def __init__(
        self, vae: AutoencoderKLWan, encoder: TextEncoder, latent_size: tuple[int, int, int] = (12, 8, 8)
    ) -> None:
        self.vae, self.encoder, self.latent_size = vae, encoder, latent_size

    def stream(
        self,
        model: CausalWan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: FlowMatchSchedule,
        num_latents: int = 9,
        window_frames: int | None = None,
        sink_frames: int = 0,
        later: tuple[int, Sequence[str]] | None = None,
    ) -> Tensor:
        """Frames (B, F, 3, H, W) by the few-step chunk loop; `later` is (chunk, prompts) from that chunk on."""
        rest = (schedule, num_latents, window_frames, sink_frames)
        change, second = later or (num_latents, prompts)
        parts = [
            self._stream(model, prompts[part], seeds[part], *rest, (change, second[part]))
            for part in _batches(len(prompts), model.device)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _stream(
        self,
        model: CausalWan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        schedule: FlowMatchSchedule,
        num_latents: int,
        window_frames: int | None,
        sink_frames: int,
        later: tuple[int, Sequence[str]],
    ) -> Tensor:
        window = Window(window_frames, sink_frames, "absolute" if window_frames is None else "window")
        sampler = ChunkSampler(model, schedule, 3, window)
        noise = SeededNoise(seeds, self.latent_size, model.device)
        first = self.encoder(list(prompts)).embeds.to(model.device)
        second = self.encoder(list(later[1])).embeds.to(model.device)
        stream = sampler.stream(lambda chunk: first if chunk < later[0] else second, noise, num_frames=num_latents)
        with autocast(model.device):
            chunks = [c.float() for c in stream]
        return self.decode(torch.cat(chunks, 1))

    def whole(
        self,
        model: CausalWan,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int,
        scale: float,
        shift: float = 3.0,
    ) -> Tensor:
        """Frames (B, F, 3, H, W) by the bidirectional teacher: Euler steps with classifier-free guidance."""
        rest = (steps, scale, shift)
        parts = [self._whole(model, prompts[part], seeds[part], *rest) for part in _batches(len(prompts), model.device)]
        return torch.cat(parts)

    @torch.no_grad()
    def _whole(
        self, model: CausalWan, prompts: Sequence[str], seeds: Sequence[int], steps: int, scale: float, shift: float
    ) -> Tensor:
        x = SeededNoise(seeds, self.latent_size, model.device)(range(9), 0)
        context = self.encoder(list(prompts)).embeds.to(model.device)
        levels = shifted(torch.linspace(1, 0, steps + 1), shift).tolist()
        for level, following in pairwise(levels):
            with autocast(model.device):
                flow = model(x, 1000 * level, context).float()
                if scale != 1:
                    without = model(x, 1000 * level, torch.zeros_like(context)).float()
                    flow = without + scale * (flow - without)
            x = x + (following - level) * flow
        return self.decode(x)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, T, C, h, w) → frames."""
        parts = []
        for part in _batches(len(latents), latents.device, 16):
            with autocast(latents.device):
                parts.append(StreamingDecoder(self.vae).decode(denormalize(self.vae, latents[part])).float())
        return torch.cat(parts)


def _batches(count: int, device: torch.device, size: int = 32) -> list[slice]:
    """Slices of at most `size`, which is what a CPU's caches hold; a GPU takes eight times as many."""
    size = size if device.type == "cpu" else 8 * size
    return [slice(start, start + size) for start in range(0, count, size)]


def accuracy(detector: Detector, frames: Tensor, prompts: Sequence[HeldOutPrompt]) -> dict[str, tuple[float, int]]:
    """By attribute: the share of clips that show what the prompt states, and the number of prompts that state it."""
    found = detector.detect(frames)
    table = {}
    for attribute in ATTRIBUTES:
        pairs = [(found[attribute][i], p.stated[attribute]) for i, p in enumerate(prompts) if attribute in p.stated]
        if pairs:
            table[attribute] = (sum(a == b for a, b in pairs) / len(pairs), len(pairs))
    return table


@dataclass(frozen=True)
class Switch:
    """Two prompts that differ in one value, and what the second one asks for."""

    before: str
    after: str
    value: str


def switches(attribute: str, n: int, seed: int) -> list[Switch]:
    """n pairs of full captions of plain scenes with one object, another value of an attribute in the second."""
    rng = random.Random(f"{seed}/{attribute}")
    generator = torch.Generator().manual_seed(seed)
    plain = dict.fromkeys((*FLAWS, "count", "texture", "weather"), 0)
    scenes, values = sample_scenes(n, generator).replace(**plain), ATTRIBUTES[attribute]
    pairs = []
    for index in range(n):
        row = scenes.row(index)
        value = (row[attribute] + rng.randrange(1, len(values))) % len(values)
        words = random.Random(index)
        before = full_caption(row, words).text
        after = full_caption({**row, attribute: value}, random.Random(index)).text
        pairs.append(Switch(before, after, values[value]))
    return pairs


def switch_accuracy(
    detector: Detector, studio: Studio, model: CausalWan, schedule: FlowMatchSchedule, n: int
) -> dict[str, float]:
    """By attribute: share of videos that show the new value in their last two chunks, three after the text changed."""
    table = {}
    for attribute in ("colour", "background", "shape", "motion", "size"):
        pairs = switches(attribute, n, 4001)
        texts, seeds = [p.before for p in pairs], range(9000, 9000 + n)
        frames = studio.stream(model, texts, seeds, schedule, 21, 9, 3, (3, [p.after for p in pairs]))
        found = detector.detect(frames[:, -24:])[attribute]
        table[attribute] = sum(label == p.value for label, p in zip(found, pairs, strict=True)) / n
    return table


def spread(detector: Detector, frames: Tensor, attribute: str) -> dict[str, float]:
    """Shares of an attribute's values among clips that were not told which to show."""
    labels = Counter(detector.detect(frames)[attribute])
    values = [*ATTRIBUTES[attribute], NONE]
    return {v: labels[v] / frames.shape[0] for v in values if v in ATTRIBUTES[attribute] or labels[v]}


def data_spread(attribute: str, given: dict[str, str], n: int = 20000, seed: int = 99) -> dict[str, float]:
    """The same shares in the data, among scenes with the given values."""
    scenes = sample_scenes(n, torch.Generator().manual_seed(seed))
    keep = torch.ones(n, dtype=torch.bool)
    for name, value in given.items():
        keep &= getattr(scenes, name) == ATTRIBUTES[name].index(value)
    chosen = getattr(scenes, attribute)[keep]
    return {v: float((chosen == i).float().mean()) for i, v in enumerate(ATTRIBUTES[attribute])}


def seconds_for(action: object, repeats: int = 5) -> float:
    """Median seconds of a call."""
    assert callable(action)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
