"""The clamped CLIP loss of SwiftBrush v2 (arXiv 2408.14176): pictures should show their prompts, but not only that."""

# B batch, H W height and width, E feature dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nn_f
from torch import Tensor

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipJudge:
    """Cosine similarity of pictures and prompts by a frozen CLIP.

    Args:
        model: transformers' CLIPModel.
        tokenize: prompts to token ids (B, tokens) and their mask.
    """

    def __init__(self, model: Any, tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]]) -> None:
        self.model = model.eval().requires_grad_(False)
        self._tokenize = tokenize

    def to(self, device: torch.device) -> ClipJudge:
        """The same judge on a device."""
        self.model.to(device)
        return self

    def similarity(self, pictures: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of pictures (B, 3, H, W) in [-1, 1]; differentiable in the pictures."""
        size = self.model.config.vision_config.image_size
        small = nn_f.interpolate(pictures.float(), (size, size), mode="bicubic", antialias=True)
        mean, deviation = (small.new_tensor(row).reshape(1, 3, 1, 1) for row in (_MEAN, _DEVIATION))
        pixels = ((small + 1) / 2 - mean) / deviation
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        with torch.no_grad():
            ids, mask = (x.to(pixels.device) for x in self._tokenize(prompts))
            said = self.model.text_projection(self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
        return nn_f.cosine_similarity(seen.float(), said.float(), dim=-1)


def clamped_loss(similarity_B: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - cosine): beyond the margin CLIP asks for nothing, so that pictures are not spoilt."""
    return (margin - similarity_B).clamp_min(0).mean()


def load_clip(name: str) -> ClipJudge:
    """A published CLIP."""
    from transformers import CLIPModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(name)

    def tokenize(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        batch = tokenizer(list(prompts), padding=True, truncation=True, max_length=77, return_tensors="pt")
        return batch.input_ids, batch.attention_mask

    return ClipJudge(CLIPModel.from_pretrained(name), tokenize)


def tiny_clip() -> ClipJudge:
    """A random CLIP for dry runs; words become numbers by their letters."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63, "bos_token_id": 62}
    vision = {**sizes, "image_size": 16, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))

    def tokenize(prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids = torch.full((len(prompts), 16), 63)
        for row, prompt in enumerate(prompts):
            for column, word in enumerate(prompt.split()[:15]):
                ids[row, column] = sum(word.encode()) % 60
        return ids, torch.ones_like(ids)

    return ClipJudge(model, tokenize)
