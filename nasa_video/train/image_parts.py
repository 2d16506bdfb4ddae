"""The networks of image training: loaded from a pipeline in diffusers' layout, or tiny ones of the same classes."""

# B batch, C channels, h w latent height and width, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from nasa_video.errors import InputError
from nasa_video.text import TextContext, TextEncoder
from nasa_video.text.embedding_cache import CachedEncoder
from nasa_video.train.clip_loss import ClipJudge, load_clip, tiny_clip
from nasa_video.train.fleet import whole
from nasa_video.train.player import Player
from nasa_video.train.settings import ImageSettings

DENOISERS: dict[str, tuple[str, Any]] = {
    "sd": ("unet", UNet2DConditionModel),
    "pixart": ("transformer", PixArtTransformer2DModel),
}


@dataclass(frozen=True)
class ImageParts:
    """What a run starts from.

    Attributes:
        alphas: (1000,), the cumulative products of the teacher's noise schedule.
        latent_size: (C, h, w).
        decoder: an autoencoder for the CLIP loss and contact sheets; None draws none.
    """

    student: nn.Module
    teacher: nn.Module
    alphas: Tensor
    encoder: TextEncoder
    latent_size: tuple[int, int, int]
    decoder: Any = None
    judge: ClipJudge | None = None


def load_image_parts(settings: ImageSettings, device: torch.device) -> ImageParts:
    """Read everything that a config names.

    Raises:
        InputError: a part cannot be had, or the teacher predicts something else.
    """
    low = torch.bfloat16 if settings.run.precision == "bf16" and device.type == "cuda" else torch.float32
    name, denoiser = DENOISERS[settings.family]
    place = settings.teacher
    scheduler = _load(DDPMScheduler.load_config, place, subfolder="scheduler")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction != settings.prediction:
        raise InputError(f"{place} predicts {prediction}, the config says {settings.prediction}; correct the config")
    teacher = _load(denoiser.from_pretrained, place, subfolder=name, torch_dtype=low)
    student = _load(denoiser.from_pretrained, settings.student or place, subfolder=name, torch_dtype=torch.float32)
    decoder: Any = None
    if settings.clip is not None:
        decoder = _load(AutoencoderTiny.from_pretrained, settings.clip.decoder, torch_dtype=low)
    elif settings.run.sheet_samples:
        decoder = _load(AutoencoderKL.from_pretrained, place, subfolder="vae", torch_dtype=low)
    judge = None if settings.clip is None else _load(load_clip, settings.clip.model)
    side = settings.size // 8
    encoder = _text_encoder(settings, device, low)
    alphas = DDPMScheduler.from_config(scheduler).alphas_cumprod
    return ImageParts(student, teacher, alphas, encoder, (4, side, side), decoder, judge)


def _load(read: Callable[..., Any], place: str, **options: Any) -> Any:
    try:
        return read(place, **options)
    except Exception as error:  # the hub client and the loaders raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        what = "/".join(part for part in (place, options.get("subfolder")) if part)
        raise InputError(
            f"{what} could not be loaded; download it where there is a network and set HF_HOME, or name a folder in "
            f"the config ({type(error).__name__}: {reason})"
        ) from error


def _text_encoder(settings: ImageSettings, device: torch.device, dtype: torch.dtype) -> TextEncoder:
    made = {"sd": ClipTextEncoder, "pixart": T5TextEncoder}[settings.family]

    def load() -> TextEncoder:
        encoder: TextEncoder = _load(made, settings.teacher, max_tokens=settings.max_tokens, device=device, dtype=dtype)
        return encoder

    identity = f"{made.__name__}|{settings.teacher}|{dtype}"
    return CachedEncoder(load, identity, settings.max_tokens) if settings.run.text_cache else load()


class ClipTextEncoder:
    """Stable Diffusion's text encoder; its padding carries meaning, so that every token counts as real."""

    def __init__(self, place: str, *, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        self.max_tokens = max_tokens
        self._tokenizer = CLIPTokenizer.from_pretrained(place, subfolder="tokenizer")
        self._model = CLIPTextModel.from_pretrained(place, subfolder="text_encoder", dtype=dtype).to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts; (B, max_tokens, E)."""
        tokens = self._tokenizer(
            list(prompts), padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        embeds = self._model(tokens.input_ids.to(self._model.device))[0]
        return TextContext(embeds, torch.full((len(prompts),), self.max_tokens))


class T5TextEncoder:
    """PixArt-alpha's text encoder; the model masks the padding out."""

    def __init__(self, place: str, *, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import T5EncoderModel, T5Tokenizer

        self.max_tokens = max_tokens
        self._tokenizer = T5Tokenizer.from_pretrained(place, subfolder="tokenizer")
        self._model = T5EncoderModel.from_pretrained(place, subfolder="text_encoder", dtype=dtype).to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts in lower case, as PixArt's pipeline does; (B, max_tokens, E)."""
        texts = [prompt.lower().strip() for prompt in prompts]
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        embeds = self._model(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
        lengths = tokens.attention_mask.sum(1)
        mask = torch.arange(self.max_tokens, device=lengths.device)[None] < lengths[:, None]
        return TextContext(embeds * mask[..., None], lengths)


def true_denoiser(settings: ImageSettings) -> Any:
    """The published architecture: PixArt-alpha XL/2, Stable Diffusion 1.5, or 2.1 (by the width of its text)."""
    if settings.family == "pixart":
        side = settings.size // 8
        return PixArtTransformer2DModel(
            sample_size=side, caption_channels=settings.text_dim, use_additional_conditions=side == 128
        )
    if settings.text_dim == 1024:
        heads = {"attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}
        return UNet2DConditionModel(cross_attention_dim=1024, sample_size=64, **heads)
    return UNet2DConditionModel(cross_attention_dim=settings.text_dim, sample_size=64)


def tiny_image_parts(settings: ImageSettings) -> ImageParts:
    """Networks of the true classes with two attention layers and random weights; the true text width and length."""
    from nasa_video.train.dry_run import HashEncoder

    torch.manual_seed(settings.run.seed)
    student, teacher = _tiny_denoiser(settings), _tiny_denoiser(settings)
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_decoder_blocks=(1, 1, 1, 1),
        num_encoder_blocks=(1, 1, 1, 1),
    ).eval()  # fmt: skip
    encoder = HashEncoder(settings.max_tokens, settings.text_dim, full=settings.family == "sd")
    alphas = DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    judge = None if settings.clip is None else tiny_clip()
    return ImageParts(student, teacher, alphas, encoder, (4, 8, 8), decoder, judge)


def _tiny_denoiser(settings: ImageSettings) -> Any:
    if settings.family == "pixart":
        return PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, num_layers=2, cross_attention_dim=16, norm_num_groups=1,
            caption_channels=settings.text_dim, sample_size=8, use_additional_conditions=False,
        )  # fmt: skip
    return UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=settings.text_dim, use_linear_projection=settings.text_dim == 1024,
    )  # fmt: skip


def export_denoiser(folder: Path, family: str, player: Player) -> None:
    """Write the averaged student in diffusers' layout, for ``image --weights``; every process calls this."""
    with player.averaged() as model:
        tensors = whole(dict(model.state_dict()), keep=player.fleet.leads)
    if player.fleet.leads:
        inner = folder / DENOISERS[family][0]
        inner.mkdir(parents=True, exist_ok=True)
        model.save_config(inner)  # type: ignore[operator]
        save_file({n: v.contiguous() for n, v in tensors.items()}, inner / "diffusion_pytorch_model.safetensors")
