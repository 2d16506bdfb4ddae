"""The networks of image training: loaded from a pipeline in diffusers' layout, or tiny ones of the same classes.

The clamped CLIP loss is that of SwiftBrush v2 (arXiv 2408.14176).
"""

# B batch, C channels, h w latent height and width, H W image height and width, L text tokens, E feature dim

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nn_f
from diffusers import AutoencoderKL, AutoencoderTiny, DDPMScheduler, PixArtTransformer2DModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from nasa_video.errors import InputError
from nasa_video.text import TextContext, TextEncoder
from nasa_video.text.embedding_cache import CachedEncoder
from nasa_video.train.distributed import whole
from nasa_video.train.settings import ImageSettings
from nasa_video.train.state import TrainState

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
    def load() -> TextEncoder:
        made: TextEncoder = _load(
            ImageTextEncoder, settings.teacher, family=settings.family, max_tokens=settings.max_tokens, device=device,
            dtype=dtype,
        )  # fmt: skip
        return made

    identity = f"{settings.family}|{settings.teacher}|{dtype}"
    return CachedEncoder(load, identity, settings.max_tokens) if settings.run.text_cache else load()


class ImageTextEncoder:
    """Stable Diffusion's CLIP or PixArt-alpha's T5, with the padding as each model takes it.

    Stable Diffusion's padding carries meaning: every token counts as real. PixArt masks it out, and takes its prompts
    in lower case.
    """

    def __init__(self, place: str, *, family: str, max_tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

        self.max_tokens, self._masked = max_tokens, family == "pixart"
        tokenizer, model = (T5Tokenizer, T5EncoderModel) if self._masked else (CLIPTokenizer, CLIPTextModel)
        self._tokenizer = tokenizer.from_pretrained(place, subfolder="tokenizer")
        self._model = model.from_pretrained(place, subfolder="text_encoder", dtype=dtype).to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode prompts; (B, max_tokens, E)."""
        texts = [prompt.lower().strip() for prompt in prompts] if self._masked else list(prompts)
        tokens = self._tokenizer(
            texts, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        ).to(self._model.device)
        if not self._masked:
            return TextContext(self._model(tokens.input_ids)[0], torch.full((len(texts),), self.max_tokens))
        mask = tokens.attention_mask
        embeds = self._model(tokens.input_ids, attention_mask=mask)[0]
        return TextContext(embeds * mask[..., None], mask.sum(1))


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


def export_denoiser(folder: Path, family: str, state: TrainState) -> None:
    """Write the averaged student in diffusers' layout, for ``image --weights``; every process calls this."""
    with state.averaged() as model:
        tensors = whole(dict(model.state_dict()), keep=state.context.leads)
    if state.context.leads:
        inner = folder / DENOISERS[family][0]
        inner.mkdir(parents=True, exist_ok=True)
        model.save_config(inner)  # type: ignore[operator]
        save_file({n: v.contiguous() for n, v in tensors.items()}, inner / "diffusion_pytorch_model.safetensors")


_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class ClipJudge:
    """Cosine similarity of images and prompts by a frozen CLIP.

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

    def similarity(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Cosines (B,) of images (B, 3, H, W) in [-1, 1]; differentiable in the images."""
        size = self.model.config.vision_config.image_size
        small = nn_f.interpolate(images.float(), (size, size), mode="bicubic", antialias=True)
        mean, deviation = (small.new_tensor(row).reshape(1, 3, 1, 1) for row in (_MEAN, _DEVIATION))
        pixels = ((small + 1) / 2 - mean) / deviation
        seen = self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output)
        with torch.no_grad():
            ids, mask = (x.to(pixels.device) for x in self._tokenize(prompts))
            said = self.model.text_projection(self.model.text_model(input_ids=ids, attention_mask=mask).pooler_output)
        return nn_f.cosine_similarity(seen.float(), said.float(), dim=-1)


def clamped_loss(similarity_B: Tensor, margin: float) -> Tensor:
    """Mean of max(0, margin - cosine): beyond the margin CLIP asks for nothing, so that images are not spoilt."""
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
