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
            fits = len(encoding.ids) <= self.max_tokens
            cut.append("" if fits else text[encoding.offsets[self.max_tokens][0] :].strip())
        return TextContext(embeds, torch.tensor(lengths), tuple(cut))


class Umt5Encoder:
    """UMT5 as Wan uses it: padded to ``max_tokens``, the padding's embeddings set to zero.

    Args:
        encoder: folder of the encoder in transformers' layout, or Wan's original file.
        tokenizer: folder of its tokenizer.
    """

    def __init__(
        self,
        encoder: Path,
        tokenizer: Path,
        max_tokens: int = 512,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers import AutoTokenizer

        from nasa_video.text.umt5_checkpoint import load_umt5

        self.max_tokens = max_tokens
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
        self._model = load_umt5(encoder, dtype).to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts after diffusers' cleaning of Wan prompts; (B, max_tokens, E)."""
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        texts = [prompt_clean(prompt) for prompt in prompts]
        batch = self._tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        mask = batch.attention_mask.to(self._model.device)
        hidden = self._model(batch.input_ids.to(self._model.device), mask).last_hidden_state
        cut = []
        for text in texts:
            ids = self._tokenizer(text).input_ids
            cut.append(self._tokenizer.decode(ids[self.max_tokens - 1 : -1]) if len(ids) > self.max_tokens else "")
        return TextContext(hidden * mask.unsqueeze(-1).to(hidden.dtype), mask.sum(dim=1), tuple(cut))
