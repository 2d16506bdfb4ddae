"""What `guided` refuses and why; odd attention layers; the other Wan models."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanVACEPipeline, WanVACETransformer3DModel
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from PIL import Image
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from causvid_adapter import CausalWan
from nasa_video import ClassifierFree, Nag, Nasa, Negative, ScaleSchedule, guided
from nasa_video.backbones.base import NegativeContext, ScopedState
from nasa_video.backbones.unet import GuidedLegacyAttention
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import AttentionGuidance, GuidedAttention
from nasa_video.guidance.state import PromptKeys


@dataclass(frozen=True)
class Unchanged(AttentionGuidance):
    name: ClassVar[str] = "unchanged"

    def __call__(self, q: Tensor, positive: Any, negatives: Sequence[Any], attend: Any) -> GuidedAttention:
        z = attend(q, positive)
        return GuidedAttention(z, z, torch.zeros(()))


@pytest.mark.parametrize(
    "settings",
    [
        {"residual_connection": True, "rescale_output_factor": 2.5},
        {"norm_num_groups": 4},
        {"cross_attention_norm": "layer_norm"},
        {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
        {"qk_norm": "layer_norm"},
        {"spatial_norm_dim": 5},
    ],
    ids=lambda s: next(iter(s)),
)
@pytest.mark.parametrize("grid", [False, True])
@torch.no_grad()
def test_legacy_layer_is_diffusers_own(settings: dict[str, Any], grid: bool) -> None:
    torch.manual_seed(0)
    if "spatial_norm_dim" in settings and not grid:
        pytest.skip("spatial norms are for maps")
    attn = Attention(32 if "spatial_norm_dim" in settings else 16, 12, heads=2, dim_head=8, **settings)
    for parameter in attn.parameters():
        parameter.data = torch.randn(parameter.shape) / 3
    channels = attn.query_dim
    x = torch.randn(3, channels, 4, 5) if grid else torch.randn(3, 20, channels)
    text, mask = torch.randn(3, 7, 12), torch.where(torch.rand(3, 1, 7) > 0.4, 0.0, -10000.0)
    temb = torch.randn(3, 5, 4, 5) if "spatial_norm_dim" in settings else None
    plain = attn(x, encoder_hidden_states=text, attention_mask=mask, temb=temb)
    steering = ScopedState(SdpaAttend(), 1, Unchanged(), negatives=[(PromptKeys(()), 1.0)])  # type: ignore[arg-type]
    steering.negatives = []
    attn.set_processor(GuidedLegacyAttention(0, steering, AttnProcessor2_0()))
    assert torch.equal(attn(x, encoder_hidden_states=text, attention_mask=mask, temb=temb), plain)
    from nasa_video.backbones.unet import project_text

    steering.negatives = [(PromptKeys((project_text(attn, text[:1], None),)), 1.0)]
    torch.testing.assert_close(attn(x, encoder_hidden_states=text, attention_mask=mask, temb=temb), plain)


def refused(match: str, target: Any, negatives: Any, guidance: Any = None, **options: Any) -> None:
    with pytest.raises(InputError, match=match), guided(target, negatives, guidance, **options):
        pass


def test_refusals_name_the_way_out() -> None:
    pipe = tiny.sd_pipe()
    refused("negative_prompt and guidance_scale", pipe, "blurry", ClassifierFree())
    refused("bare model", pipe.unet, "blurry")
    refused("no way to guide a Linear", nn.Linear(2, 2), "blurry")
    refused("takes a diffusers pipeline", object(), "blurry")
    refused("joint", pipe, "blurry", joint=object())
    refused("does not know its step", pipe.unet, torch.zeros(1, 4, 32), Nasa(schedule=ScaleSchedule(last_step=0.5)))
    with guided(pipe, "blurry", Nasa(0.5)):
        refused("guided already", pipe, "ugly")
    refused("must be", pipe, torch.zeros(4, 32))
    refused("a list of negatives must hold", pipe, ["blurry", 3])
    refused("a negative must be a text", pipe, 3)
    refused("guidance must be one of nasa,", pipe, "blurry", "nasal")
    refused("guidance must be a method or its spelling", pipe, "blurry", 0.5)
    refused("negative_prompt and guidance_scale", pipe, "blurry", "cfg:3")
    refused("register_backbone", nn.Linear(2, 2), "blurry")
    with pytest.raises(InputError, match="itself"), guided(pipe, "A  Fox", Nasa(0.5)):
        tiny.draw(pipe, "sd", "a fox")
    with pytest.raises(InputError, match="cannot be shared"), guided(pipe, torch.zeros(2, 16, 32), Nasa(0.5)):
        tiny.draw(pipe, "sd", "a fox", num_images_per_prompt=3)


def test_methods_and_negatives_may_be_spelled() -> None:
    pipe = tiny.sd_pipe()
    with guided(pipe, [Negative("blurry", 0.4), "ugly"], Nag(5.0, tau=2.0)):
        expected = tiny.draw(pipe, "sd")
    with guided(pipe, "blurry:0.4, ugly", "nag:5,tau=2"):
        assert torch.equal(tiny.draw(pipe, "sd"), expected)
    plain = tiny.draw(pipe, "sd")
    for nothing in ({"guidance": "none"}, {"guidance": "nasa:0"}, {"negatives": ""}, {"negatives": None}):
        with guided(pipe, **{"negatives": "blurry", "guidance": "nasa:0.5", **nothing}) as scope:
            assert torch.equal(tiny.draw(pipe, "sd"), plain)
        assert scope.effect is None


def test_what_takes_guidance_off_inside_the_scope_is_said() -> None:
    pipe = tiny.sd_pipe()
    with guided(pipe, "blurry", "nasa:0.5"):
        pipe.enable_attention_slicing()
        with pytest.raises(InputError, match="changed inside guided"):
            tiny.draw(pipe, "sd")


def test_an_encoder_that_is_gone_is_said() -> None:
    """A prompt may be encoded first, and the encoder freed."""
    pipe = tiny.sd_pipe()
    embeds, negative = (pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a fox", "blurry"))
    with guided(pipe, "blurry", "nasa:0.5"):
        expected = tiny.draw(pipe, "sd", "a fox")
    pipe.text_encoder = None
    with guided(pipe, negative, "nasa:0.5"):
        assert torch.equal(tiny.draw(pipe, "sd", None, prompt_embeds=embeds), expected)
    with pytest.raises(InputError, match=r"no text encoder any more.*NegativeContext"), guided(pipe, "blurry"):
        tiny.draw(pipe, "sd", None, prompt_embeds=embeds)


def test_keys_follow_a_lora_that_is_switched_off() -> None:
    from peft import LoraConfig

    pipe = tiny.sd_pipe()
    with guided(pipe, "blurry", "nasa:0.5"):
        expected = tiny.draw(pipe, "sd")
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_v"], init_lora_weights=False))
    with guided(pipe, "blurry", "nasa:0.5"):
        assert not torch.allclose(tiny.draw(pipe, "sd"), expected)
        pipe.disable_lora()
        torch.testing.assert_close(tiny.draw(pipe, "sd"), expected)


def test_batches_whose_rows_cannot_be_told_are_refused() -> None:
    """Three parts a sample, of which the last two are unconditional."""
    from diffusers import StableDiffusionXLInstructPix2PixPipeline

    base = tiny.sdxl_pipe(in_channels=8)
    names = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "unet", "scheduler")
    parts = {name: base.components[name] for name in names}
    pipe = StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    call = {"image": Image.new("RGB", (16, 16), "red"), "num_inference_steps": 1, "width": 16, "height": 16}
    with pytest.raises(InputError, match="3 rows for 1 samples"), guided(pipe, "blurry", "nasa:0.5"):
        pipe("a fox", guidance_scale=3.0, **call)
    with guided(pipe, "blurry", "nasa:0.5") as scope:
        pipe("a fox", guidance_scale=1.0, image_guidance_scale=1.0, **call)
    assert scope.effect is not None


def test_classifier_free_guidance_that_ends_early_leaves_all_samples_guided() -> None:
    """Diffusers' documented callback cuts the unconditional half off between two steps, also with two samples."""
    pipe = tiny.sd_pipe()

    def cut(pipe: Any, step: int, time: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"].chunk(2)[-1]}

    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "num_images_per_prompt": 2}
    call |= {"callback_on_step_end": cut, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    shares: list[int] = []
    with guided(pipe, "blurry", Counting(seen=shares)):
        tiny.draw(pipe, "sd", **call)
    assert set(shares) == {2}


@dataclass(frozen=True)
class Counting(Unchanged):
    """Notes how many samples each layer guides."""

    seen: list[int] = field(default_factory=list, kw_only=True)

    def __call__(self, q: Tensor, positive: Any, negatives: Sequence[Any], attend: Any) -> GuidedAttention:
        self.seen.append(len(q))
        return super().__call__(q, positive, negatives, attend)


def test_ip_adapters_are_not_dropped() -> None:
    from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0

    pipe = tiny.sd_pipe()
    layer = next(m for n, m in pipe.unet.named_modules() if n.endswith("attn2"))
    layer.set_processor(IPAdapterAttnProcessor2_0(8, 32))
    refused("IP-Adapter", pipe, "blurry")


def test_models_without_text_are_refused() -> None:
    from diffusers import UNet2DConditionModel

    plain = UNet2DConditionModel(
        block_out_channels=(4,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        norm_num_groups=2,
    )
    refused("no text cross-attention", plain, torch.zeros(1, 4, 32))


def test_bare_unet_with_a_doubled_batch() -> None:
    torch.manual_seed(0)
    unet = tiny.unet().requires_grad_(False)
    x, text, negative = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32), NegativeContext(torch.randn(1, 5, 32))
    plain = unet(x, 10, text).sample
    with guided(unet, negative, Nasa(0.6)):
        both = unet(x, 10, text).sample
    with guided(unet, negative, Nasa(0.6), doubled_batch=True):
        half = unet(x, 10, text).sample
    torch.testing.assert_close(half, torch.cat([plain[:1], both[1:]]), rtol=1e-4, atol=1e-5)


def test_runs_in_one_scope_are_independent() -> None:
    """Settings of the text encoding may change between two runs of one scope."""
    pipe = tiny.flux_pipe()
    with guided(pipe, "blurry", Nasa(0.5)):
        first = tiny.draw(pipe, "flux")
        longer = tiny.draw(pipe, "flux", max_sequence_length=20)
        assert torch.equal(tiny.draw(pipe, "flux"), first)
    with guided(pipe, "blurry", Nasa(0.5)):
        assert torch.equal(tiny.draw(pipe, "flux", max_sequence_length=20), longer)


def test_causal_wan_takes_embeddings() -> None:
    torch.manual_seed(0)
    causal = CausalWan(tiny.wan_transformer().requires_grad_(False))
    x, text = torch.randn(1, 3, 16, 2, 2), torch.randn(1, 8, 32)
    negative = torch.zeros(1, 8, 32)
    negative[:, :3] = torch.randn(1, 3, 32)
    plain = causal(x, 500.0, text)
    with guided(causal, negative, Nasa(0.5)) as scope:
        other = causal(x, 500.0, text)
    assert scope.effect is not None
    assert not torch.allclose(other, plain)
    assert torch.equal(causal(x, 500.0, text), plain)


def test_image_to_video_keeps_the_image_branch() -> None:
    """With the text's weights zeroed, nothing is left to guide: the image branch is not touched."""
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    base = tiny.wan_pipe(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    vision = CLIPVisionModelWithProjection(
        CLIPVisionConfig(hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32,
                         intermediate_size=16, patch_size=16)
    ).eval()  # fmt: skip
    parts = {k: v for k, v in base.components.items() if k in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = WanImageToVideoPipeline(
        **parts,
        image_encoder=vision,
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
        transformer=base.transformer,
        transformer_2=None,
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"image": Image.new("RGB", (16, 16), "red"), **tiny.CALLS["wan"]}
    run = lambda: pipe(  # noqa: E731
        prompt="a fox", output_type="latent", generator=torch.Generator().manual_seed(1), **call
    )[0]
    plain = run()
    with guided(pipe, "blurry", Nasa(0.5)):
        assert not torch.allclose(run(), plain)
    assert torch.equal(run(), plain)
    for block in pipe.transformer.blocks:
        for part in (block.attn2.to_v,):
            part.weight.data.zero_()
            part.bias.data.zero_()
    plain = run()
    with guided(pipe, "blurry", Nasa(0.5)):
        torch.testing.assert_close(run(), plain)


def test_vace_guides_its_own_blocks_too() -> None:
    base = tiny.wan_pipe()
    torch.manual_seed(0)
    vace = WanVACETransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16,
        text_dim=32, freq_dim=16, ffn_dim=32, num_layers=3, vace_layers=[0, 2], vace_in_channels=96,
    ).eval()  # fmt: skip
    parts = {k: v for k, v in base.components.items() if k in ("tokenizer", "text_encoder", "vae", "scheduler")}
    pipe = WanVACEPipeline(**parts, transformer=vace)
    pipe.set_progress_bar_config(disable=True)
    run = lambda: pipe(  # noqa: E731
        prompt="a fox", output_type="latent", generator=torch.Generator().manual_seed(1), **tiny.CALLS["wan"]
    )[0]
    plain = run()
    processors = dict(vace.attn_processors)
    with guided(pipe, "blurry", Nasa(0.5)):
        changed = [name for name, own in vace.attn_processors.items() if own is not processors[name]]
        assert not torch.allclose(run(), plain)
    assert len(changed) == 5
    assert sum("vace" in name for name in changed) == 2
    assert torch.equal(run(), plain)


@pytest.mark.parametrize("kind", ["sd", "pixart", "flux"])
def test_offloaded_weights(kind: str) -> None:
    """Weights that are only there while their layer runs (accelerate's sequential offload)."""
    from accelerate import cpu_offload

    pipe = tiny.PIPES[kind]()
    with guided(pipe, "blurry", Nasa(0.5)):
        here = tiny.draw(pipe, kind)
    cpu_offload(tiny.denoiser(pipe), torch.device("cpu"))
    assert next(tiny.denoiser(pipe).parameters()).device.type == "meta"
    with guided(pipe, "blurry", Nasa(0.5)):
        torch.testing.assert_close(tiny.draw(pipe, kind), here, rtol=1e-4, atol=1e-5)
