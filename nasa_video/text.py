"""Prompts as text embeddings: zero-padded, with the real token counts that folding needs."""

# B prompts, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class TextContext:
    """Embeddings of a batch of prompts.

    Attributes:
        embeds: (B, L, E); zeros after the real tokens, as Wan pads.
        lengths: (B,), real tokens of each prompt.
        cut: what did not fit the encoder, one string a prompt, empty where nothing was cut.
    """

    embeds: Tensor
    lengths: Tensor
    cut: tuple[str, ...] = ()

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TextContext:
        """The same context on a device."""
        return TextContext(self.embeds.to(device, dtype), self.lengths.to(device), self.cut)


class TextEncoder(Protocol):
    """Anything that turns prompts into a :class:`TextContext`."""

    max_tokens: int

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode a batch; an empty prompt has length 0 and all-zero embeddings where the encoder allows it."""
        ...


class WordLlamaEncoder:
    """Token embeddings of wordllama (MIT, 32,000 x 256), which ships inside its package: works offline, on any CPU.

    They carry no order and no context of their own; the model that reads them learns both.
    """

    def __init__(self, max_tokens: int = 24) -> None:
        import wordllama
        from safetensors.torch import load_file
        from tokenizers import Tokenizer

        folder = Path(wordllama.__file__).parent
        self.max_tokens = max_tokens
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json"))
        # Scaled to unit variance: the rows' norms differ tenfold, and the text MLP wants inputs of order one.
        self._table = load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].float()
        self._table = self._table / self._table.std()

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts, lower-cased; (B, max_tokens, 256) float32."""
        embeds = torch.zeros(len(prompts), self.max_tokens, self._table.shape[1])
        lengths, cut = [], []
        for row, prompt in enumerate(prompts):
            text = " ".join(prompt.lower().split())
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            ids = encoding.ids[: self.max_tokens]
            embeds[row, : len(ids)] = self._table[ids]
            lengths.append(len(ids))
            cut.append(text[encoding.offsets[self.max_tokens][0] :] if len(encoding.ids) > self.max_tokens else "")
        return TextContext(embeds, torch.tensor(lengths), tuple(cut))
