"""What a batch is made of, drawn from (seed, step, process) alone: texts, scales, and who sees the negative."""

# B batch, L text tokens, E text dim

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nasa_video.text import TextContext, TextEncoder
from nasa_video.train.lists import draw_negative_for
from nasa_video.train.settings import Negatives


@dataclass(frozen=True)
class Texts:
    """Prompts and negatives of a batch; an empty negative is none."""

    prompts: list[str]
    negatives: list[str]
    alpha_B: Tensor
    kappa_B: Tensor


def seeded(*numbers: int | str) -> torch.Generator:
    """A CPU generator that follows from these numbers."""
    return torch.Generator().manual_seed(random.Random("/".join(map(str, numbers))).getrandbits(62))


def draw_texts(
    settings: Negatives, prompts: Sequence[str], negatives: Sequence[str], batch: int, generator: torch.Generator
) -> Texts:
    """Prompts, negatives, and a scale for each. Where there is no negative, alpha is 0."""
    rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
    chosen = [rng.choice(prompts) for _ in range(batch)]
    against = [
        "" if rng.random() < settings.empty_share or settings.placement == "nowhere"
        else draw_negative_for(prompt, negatives, rng, settings.avoid_overlap)
        for prompt in chosen
    ]  # fmt: skip
    alpha_B = _uniform(settings.alpha, batch, generator)
    alpha_B[torch.rand(batch, generator=generator) < settings.alpha_zero_share] = 0.0
    alpha_B[torch.tensor([not text for text in against])] = 0.0
    return Texts(chosen, against, alpha_B, _uniform(settings.kappa, batch, generator))


def at_scale(texts: Texts, alpha: float) -> Texts:
    """The same texts, every negative at one scale."""
    alpha_B = torch.tensor([alpha if text else 0.0 for text in texts.negatives])
    return Texts(texts.prompts, texts.negatives, alpha_B, texts.kappa_B)


def _uniform(limits: tuple[float, float], batch: int, generator: torch.Generator) -> Tensor:
    low, high = limits
    return low + (high - low) * torch.rand(batch, generator=generator)


@dataclass(frozen=True)
class Contexts:
    """Encoded texts of a batch on the device, each (B, L, E) with (B,) real tokens."""

    positive: TextContext
    negative: TextContext
    empty: TextContext
    alpha_B: Tensor
    kappa_B: Tensor

    def against(self, reached: bool) -> TextContext:
        """What a score's guidance leads away from: the negative where it reaches the score, else the empty prompt."""
        return self.negative if reached else self.empty


def encode_texts(texts: Texts, encoder: TextEncoder, device: torch.device) -> Contexts:
    """Embeddings of a batch's texts; the empty prompt is encoded as any other."""
    encoded = encoder([*texts.prompts, *texts.negatives, ""]).to(device)
    batch = len(texts.prompts)
    embeds, lengths = encoded.embeds.float(), encoded.lengths
    return Contexts(
        positive=TextContext(embeds[:batch], lengths[:batch]),
        negative=TextContext(embeds[batch:-1], lengths[batch:-1]),
        empty=TextContext(embeds[-1:].expand(batch, -1, -1), lengths[-1:].expand(batch)),
        alpha_B=texts.alpha_B.to(device),
        kappa_B=texts.kappa_B.to(device),
    )


def without_some(positive: TextContext, empty: TextContext, share: float, generator: torch.Generator) -> TextContext:
    """The prompts, some of them replaced by the empty one."""
    dropped = (torch.rand(len(positive.lengths), generator=generator) < share).to(positive.embeds.device)
    embeds = torch.where(dropped[:, None, None], empty.embeds, positive.embeds)
    return TextContext(embeds, torch.where(dropped, empty.lengths, positive.lengths))
