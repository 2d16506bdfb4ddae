"""The parts of a pipeline: its device, text encoder and decoder."""

# B batch, T latent frames, F pictures, C latent channels, h w latent height and width, H W picture height and width

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import StreamingDecoder, denormalize
from causvid_adapter.tiny_decoder import TinyStreamingDecoder, load_tiny_decoder
from nasa_video.errors import InputError
from nasa_video.models.presets import Components, Umt5Text, WordLlamaText
from nasa_video.text import TextEncoder, Umt5Encoder, WordLlamaEncoder
from nasa_video.text.embedding_cache import CachedEncoder, identity_of

DecoderKind = Literal["full", "tiny"]


def default_dtype(device: torch.device) -> torch.dtype:
    """Of a model that is run there, where nothing else is asked for."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device by name; None takes CUDA where there is one.

    Raises:
        InputError: there is no such device.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        available = "cpu, cuda" if torch.cuda.is_available() else "cpu"
        reason = str(error).splitlines()[0]
        raise InputError(f"device {device!r} cannot be used ({reason}); available: {available}") from error
    return chosen


def load_text_encoder(settings: WordLlamaText | Umt5Text, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    """The text encoder of a preset, on its device."""
    if isinstance(settings, WordLlamaText):
        return WordLlamaEncoder(settings.max_tokens)
    folder = settings.fetch()
    in_repository = settings.tokenizer
    tokenizer_path = in_repository[0].fetch() if in_repository else folder.parent / settings.tokenizer_folder

    def load() -> TextEncoder:
        return Umt5Encoder(folder, tokenizer_path, settings.max_tokens, device, dtype)

    return CachedEncoder(load, identity_of(folder, dtype), settings.max_tokens)


def load_decoder(
    settings: Components, kind: DecoderKind, device: torch.device
) -> Callable[[AutoencoderKLWan], Decoder]:
    """What makes the decoder of one video: the model's own, or a tiny one.

    Raises:
        InputError: the model has no tiny decoder, or there is no such kind.
        CheckpointError: its weights are broken.
    """
    if kind == "full":
        return FullDecoder
    if kind != "tiny":
        raise InputError(f"the decoder must be full or tiny, got {kind!r}")
    source = settings.tiny_decoder
    if source is None:
        raise InputError("this model has no tiny decoder; leave out --decoder")
    tiny = load_tiny_decoder(source.fetch()).to(device)

    def make(vae: AutoencoderKLWan) -> Decoder:
        stream = TinyStreamingDecoder(tiny)
        return FullDecoder(vae, stream) if source.latents == "raw" else stream

    return make


class Decoder(Protocol):
    """Turns a video's latents into pictures, chunk by chunk."""

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        """(B, T, C, h, w) in the transformer's scale -> (B, F, 3, H, W) in [-1, 1] (or beyond, without the clamp)."""
        ...


class FullDecoder:
    """The VAE's own decoder, or another (``stream``) that was trained on latents in the VAE's own scale."""

    def __init__(self, vae: AutoencoderKLWan, stream: StreamingDecoder | TinyStreamingDecoder | None = None) -> None:
        self._vae = vae
        self._stream = stream or StreamingDecoder(vae)

    def decode(self, latents: Tensor, clamp: bool = True) -> Tensor:
        return self._stream.decode(denormalize(self._vae, latents), clamp)
