"""Tiny real pipelines of diffusers' own classes with random weights, built without a network.

Words are letters and a few whole words; every prompt of lower-case letters encodes.
"""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    LCMScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

TEXT_DIM = 32


def clip_tokenizer(length: int = 16) -> CLIPTokenizer:
    letters = list(string.ascii_lowercase + ",")
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=length)


def clip_text(cls: type = CLIPTextModel, dim: int = TEXT_DIM) -> Any:
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=dim,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return cls(config).eval()


def t5_tokenizer() -> T5Tokenizer:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocab += [(letter, -3.0) for letter in string.ascii_lowercase + ","]
    return T5Tokenizer(vocab, extra_ids=0)


def t5_text(cls: type = T5EncoderModel, config: type = T5Config) -> Any:
    sizes = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    return cls(config(vocab_size=40, **sizes)).eval()


def vae(channels: int = 4) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=2,
        layers_per_block=1,
        **({"use_quant_conv": False, "use_post_quant_conv": False, "shift_factor": 0.1} if channels == 16 else {}),
    ).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    settings: dict[str, Any] = {
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "sample_size": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": TEXT_DIM,
        "attention_head_dim": 4,
        "norm_num_groups": 4,
    }
    return UNet2DConditionModel(**{**settings, **changes}).eval()


def sdxl_unet(**changes: Any) -> UNet2DConditionModel:
    return unet(
        cross_attention_dim=2 * TEXT_DIM,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_DIM,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        **changes,
    )


def pixart_transformer() -> PixArtTransformer2DModel:
    model = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=16,
        caption_channels=TEXT_DIM,
        sample_size=8,
        norm_num_groups=1,
        use_additional_conditions=False,
    )
    return model.eval()


def flux_transformer(**changes: Any) -> FluxTransformer2DModel:
    settings: dict[str, Any] = {
        "in_channels": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
        "joint_attention_dim": TEXT_DIM,
        "pooled_projection_dim": TEXT_DIM,
        "axes_dims_rope": (4, 2, 2),
    }
    return FluxTransformer2DModel(**{**settings, **changes}).eval()


def wan_transformer(**changes: Any) -> WanTransformer3DModel:
    settings: dict[str, Any] = {
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 16,
        "out_channels": 16,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 32,
        "num_layers": 2,
    }
    return WanTransformer3DModel(**{**settings, **changes}).eval()


def pixart_pipe(seed: int = 0) -> PixArtAlphaPipeline:
    torch.manual_seed(seed)
    return _quiet(PixArtAlphaPipeline(t5_tokenizer(), t5_text(), vae(), pixart_transformer(), DDPMScheduler()))


def sd_pipe(seed: int = 0, **changes: Any) -> StableDiffusionPipeline:
    torch.manual_seed(seed)
    pipe = StableDiffusionPipeline(
        vae(), clip_text(), clip_tokenizer(), unet(**changes), _lcm(), None, None, requires_safety_checker=False
    )
    return _quiet(pipe)


def sdxl_pipe(seed: int = 0, **changes: Any) -> StableDiffusionXLPipeline:
    torch.manual_seed(seed)
    pipe = StableDiffusionXLPipeline(
        vae(),
        clip_text(),
        clip_text(CLIPTextModelWithProjection),
        clip_tokenizer(),
        clip_tokenizer(),
        sdxl_unet(**changes),
        _lcm(),
        add_watermarker=False,
    )
    return _quiet(pipe)


def flux_pipe(seed: int = 0) -> FluxPipeline:
    torch.manual_seed(seed)
    pipe = FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        vae(16),
        clip_text(),
        clip_tokenizer(),
        t5_text(),
        t5_tokenizer(),
        flux_transformer(),
    )
    return _quiet(pipe)


def wan_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    ).eval()


def wan_pipe(seed: int = 0, **changes: Any) -> WanPipeline:
    torch.manual_seed(seed)
    pipe = WanPipeline(
        t5_tokenizer(),
        t5_text(UMT5EncoderModel, UMT5Config),
        wan_vae(),
        FlowMatchEulerDiscreteScheduler(shift=7.0),
        wan_transformer(**changes),
    )
    return _quiet(pipe)


def _lcm() -> LCMScheduler:
    return LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


CALLS: dict[str, dict[str, Any]] = {
    "pixart": {
        "num_inference_steps": 2,
        "guidance_scale": 0,
        "height": 16,
        "width": 16,
        "max_sequence_length": 12,
        "use_resolution_binning": False,
        "clean_caption": False,
    },
    "sd": {"num_inference_steps": 2, "guidance_scale": 0, "height": 16, "width": 16},
    "sdxl": {"num_inference_steps": 2, "guidance_scale": 0, "height": 16, "width": 16},
    "flux": {"num_inference_steps": 2, "guidance_scale": 0, "height": 16, "width": 16, "max_sequence_length": 12},
    "wan": {"num_inference_steps": 2, "guidance_scale": 1, "height": 16, "width": 16, "num_frames": 5},
}
PIPES = {"pixart": pixart_pipe, "sd": sd_pipe, "sdxl": sdxl_pipe, "flux": flux_pipe, "wan": wan_pipe}


def draw(pipe: Any, kind: str, prompt: str | list[str] = "a fox", seed: int = 7, **changes: Any) -> torch.Tensor:
    """Latents of one run."""
    return pipe(  # type: ignore[no-any-return]
        prompt, output_type="latent", generator=torch.Generator().manual_seed(seed), **{**CALLS[kind], **changes}
    )[0]


def denoiser(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer
