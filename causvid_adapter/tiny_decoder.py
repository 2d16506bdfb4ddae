"""A tiny streaming decoder for Wan latents, in the format of TAEHV's weights (``taew2_1``, MIT, 11 M parameters).

Forty times fewer parameters than Wan's VAE, and it looks back one latent frame only: for previews and small cards.
Layout and names of the weights follow github.com/madebyollin/taehv, whose checkpoints carry ``decoder.N.…``.
"""

# B batch, T frames at the current rate, C channels, h w latent height and width, F pictures, H W their height and width

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from causvid_adapter.checkpoint import describe, load_weights, read_state_dict, unwrap
from causvid_adapter.errors import CheckpointError, ShapeError

# (width, frames made of one) of the three stages, and the width after them.
STAGES = ((256, 1), (128, 2), (64, 2))
LAST_WIDTH = 64
_BLOCKS = 3
# Wan's first latent frame holds one picture; this decoder makes four of each, so the first three are dropped.
_DROPPED = 3


class _SoftClamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class MemoryBlock(nn.Module):
    """A residual block that sees the frame before: the past is concatenated to the input's channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(2 * width, width, 3, padding=1)]
        for _ in range(2):
            layers += [nn.ReLU(), nn.Conv2d(width, width, 3, padding=1)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x_BTCHW: Tensor, past_BCHW: Tensor | None) -> Tensor:
        """(B, T, C, H, W); ``past_BCHW`` is the frame before the first, None at the video's start."""
        past = torch.zeros_like(x_BTCHW[:, 0]) if past_BCHW is None else past_BCHW
        before = torch.cat([past.unsqueeze(1), x_BTCHW[:, :-1]], dim=1)
        both = torch.cat([x_BTCHW, before], dim=2)
        return F.relu(_framewise(self.conv, both) + x_BTCHW)


class GrowTime(nn.Module):
    """Makes ``factor`` frames of each."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.conv = nn.Conv2d(width, width * factor, 1, bias=False)

    def forward(self, x_BTCHW: Tensor) -> Tensor:
        """(B, T, C, H, W) -> (B, T * factor, C, H, W)."""
        return rearrange(_framewise(self.conv, x_BTCHW), "b t (f c) h w -> b (t f) c h w", f=self.factor)


class TinyDecoder(nn.Module):
    """The decoder's layers, numbered as in the published weights."""

    def __init__(self, latent_channels: int = 16) -> None:
        super().__init__()
        layers: list[nn.Module] = [_SoftClamp(), nn.Conv2d(latent_channels, STAGES[0][0], 3, padding=1), nn.ReLU()]
        widths = [width for width, _ in STAGES[1:]] + [LAST_WIDTH]
        for (width, factor), after in zip(STAGES, widths, strict=True):
            layers += [MemoryBlock(width) for _ in range(_BLOCKS)]
            layers += [nn.Upsample(scale_factor=2), GrowTime(width, factor)]
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(LAST_WIDTH, 3, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    def forward(self, latents: Tensor, memory: list[Tensor | None]) -> Tensor:
        """(B, T, C, h, w) -> (B, 4 T, 3, 8 h, 8 w), about 0 to 1; ``memory`` holds the last frame each block saw."""
        x: Tensor = latents
        block = 0
        for layer in self.decoder:
            if isinstance(layer, MemoryBlock):
                past, memory[block] = memory[block], x[:, -1]
                x = layer(x, past)
                block += 1
            else:
                x = layer(x) if isinstance(layer, GrowTime) else _framewise(layer, x)
        return x


class TinyStreamingDecoder:
    """Decodes chunk by chunk; the same interface and frame counts as :class:`~causvid_adapter.StreamingDecoder`.

    The latents are in the transformer's scale: this decoder was trained on normalised ones.
    """

    def __init__(self, decoder: TinyDecoder) -> None:
        self.decoder = decoder
        self.reset()

    def reset(self) -> None:
        """Forget the video so far."""
        self._memory: list[Tensor | None] = [None] * (_BLOCKS * len(STAGES))
        self._first = True

    @torch.no_grad()
    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """(B, T, C, h, w) -> (B, F, 3, H, W) in [-1, 1]; F is 4 T, or 4 T - 3 when these are the video's first.

        Raises:
            ShapeError: there are no latents.
        """
        if latents.ndim != 5 or latents.shape[1] == 0:
            raise ShapeError(f"latents must be (B, T, C, h, w) with T >= 1, got {tuple(latents.shape)}")
        weight = next(self.decoder.parameters())
        frames: Tensor = self.decoder(latents.to(weight.device, weight.dtype), self._memory) * 2 - 1
        if self._first:
            frames, self._first = frames[:, _DROPPED:], False
        return frames.clamp(-1.0, 1.0) if clamp else frames


def load_tiny_decoder(path: Path) -> TinyDecoder:
    """Read the decoder of a TAEHV checkpoint (``.pth`` or safetensors); its encoder is left out.

    Raises:
        CheckpointError: the file is broken or of another model.
    """
    state = unwrap(read_state_dict(path))
    own = {name: value for name, value in state.items() if name.startswith("decoder.")}
    first = own.get("decoder.1.weight")
    if first is None or first.ndim != 4:
        raise CheckpointError(f"{path} is no tiny decoder (taew2_1): it looks like {describe(state)}")
    decoder = TinyDecoder(latent_channels=first.shape[1])
    load_weights(decoder, own, path, "the tiny decoder (taew2_1)")
    return decoder.eval().requires_grad_(False)


def _framewise(layer: nn.Module, x_BTCHW: Tensor) -> Tensor:
    batch = x_BTCHW.shape[0]
    y: Tensor = layer(x_BTCHW.flatten(0, 1))
    frames: Tensor = y.unflatten(0, (batch, -1))
    return frames
