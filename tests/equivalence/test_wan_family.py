"""Models of Wan's shape in diffusers' own pipelines: our layers are theirs, and a negative prompt changes the video."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import torch
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from nasa_video import guided
from nasa_video.backbones.base import BACKBONES, Backbone, GuidedProcessor, NegativeContext, register_backbone
from nasa_video.backbones.wan import WanBackbone
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend, TextKeys
from nasa_video.guidance.methods import AttentionGuidance, GuidedAttention
from nasa_video.guidance.state import PromptKeys
from nasa_video.integrations.diffusers.guided import make_backbone

SIZES: dict[str, Any] = {
    "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16,
    "out_channels": 16, "text_dim": tiny.TEXT_DIM, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Unchanged(AttentionGuidance):
    """Guidance that acts and gives back the positive branch: our layers must then be diffusers' own."""

    name: ClassVar[str] = "unchanged"

    def __call__(self, q: Tensor, positive: Any, negatives: Sequence[Any], attend: Any) -> GuidedAttention:
        z = attend(q, positive)
        return GuidedAttention(z, z, torch.zeros(()))


def pipeline(name: str, transformer: Any, scheduler: Any) -> Any:
    encoder = tiny.t5_text(UMT5EncoderModel, UMT5Config)
    pipe = getattr(diffusers, name)(
        tokenizer=tiny.t5_tokenizer(),
        text_encoder=encoder,
        vae=tiny.wan_vae(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def anyflow() -> Any:
    model = diffusers.AnyFlowTransformer3DModel(**SIZES)
    return pipeline("AnyFlowPipeline", model, diffusers.FlowMapEulerDiscreteScheduler())


def anyflow_far() -> Any:
    model = diffusers.AnyFlowFARTransformer3DModel(**SIZES, chunk_partition=(1, 1))
    return pipeline("AnyFlowFARPipeline", model, diffusers.FlowMapEulerDiscreteScheduler())


def helios() -> Any:
    model = diffusers.HeliosTransformer3DModel(**SIZES, rope_dim=(4, 4, 4))
    return pipeline("HeliosPipeline", model, diffusers.HeliosScheduler(stages=1, use_dynamic_shifting=True))


def skyreels() -> Any:
    model = diffusers.SkyReelsV2Transformer3DModel(**SIZES)
    return pipeline("SkyReelsV2Pipeline", model, diffusers.UniPCMultistepScheduler(use_flow_sigmas=True))


FAMILY: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "anyflow": (anyflow, {"num_frames": 5}),
    "anyflow-far": (anyflow_far, {"num_frames": 5}),
    "helios": (helios, {"num_frames": 9, "num_latent_frames_per_chunk": 3, "history_sizes": [4, 2, 1]}),
    "skyreels": (skyreels, {"num_frames": 5}),
}


def draw(pipe: Any, call: dict[str, Any], **more: Any) -> Tensor:
    settings = {"guidance_scale": 1.0, "num_inference_steps": 2, "height": 32, "width": 32, "max_sequence_length": 16}
    generator = torch.Generator().manual_seed(1)
    done = pipe(prompt="a fox", output_type="latent", generator=generator, **{**settings, **call, **more})
    return torch.as_tensor(done.frames)


@pytest.mark.parametrize("kind", FAMILY)
def test_a_model_of_wans_shape_is_guided_in_its_own_pipeline(kind: str) -> None:
    torch.manual_seed(0)
    make, call = FAMILY[kind]
    pipe = make()
    plain = draw(pipe, call)
    before = [block.attn2.processor for block in pipe.transformer.blocks]
    with guided(pipe, "blurry", Unchanged()) as scope:
        assert torch.equal(draw(pipe, call), plain)
    assert scope.effect is not None
    assert scope.effect.relative_change == 0
    for method in ("nasa:0.6", "nasa-centred:0.6", "nag:5", "vsf:1.5"):
        with guided(pipe, "blurry", method) as scope:
            changed = draw(pipe, call)
        assert scope.effect is not None
        assert scope.effect.relative_change > 0.05
        assert not torch.allclose(changed, plain, rtol=1e-3, atol=1e-3)
    assert [block.attn2.processor for block in pipe.transformer.blocks] == before
    assert torch.equal(draw(pipe, call), plain)


@pytest.mark.parametrize("kind", FAMILY)
def test_classifier_free_guidance_beside_it_is_not_guided(kind: str) -> None:
    """The rows, or the pass, of the pipeline's own negative stay as they are."""
    torch.manual_seed(0)
    make, call = FAMILY[kind]
    pipe = make()
    call = {**call, "num_inference_steps": 1, "negative_prompt": "ugly", "guidance_scale": 3.0}
    seen: list[Tensor] = []
    # AnyFlow-FAR's passes that only fill its cache give no output.
    pipe.transformer.register_forward_hook(lambda m, a, out: None if out[0] is None else seen.append(out[0].clone()))

    def first_calls() -> list[Tensor]:
        seen.clear()
        draw(pipe, call)
        return list(seen[0].chunk(2)) if len(seen[0]) == 2 else [seen[1], seen[0]]  # unconditional, conditional

    plain = first_calls()
    with guided(pipe, "blurry", "nasa:0.6"):
        unconditional, conditional = first_calls()
    torch.testing.assert_close(unconditional, plain[0])
    assert not torch.allclose(conditional, plain[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel", "HeliosTransformer3DModel"]
)
def test_other_descendants_are_recognised(name: str) -> None:
    model = getattr(diffusers, name)(**SIZES)
    assert isinstance(make_backbone(model, Unchanged(), SdpaAttend(), None), WanBackbone)  # type: ignore[arg-type]


def test_what_is_not_of_its_shape_is_refused_with_the_way_out() -> None:
    model = diffusers.SanaTransformer2DModel(num_layers=1, num_attention_heads=1, attention_head_dim=8,
                                             num_cross_attention_heads=1, cross_attention_head_dim=8,
                                             cross_attention_dim=8, caption_channels=8, sample_size=4)  # fmt: skip
    with pytest.raises(InputError, match="register_backbone"), guided(model, torch.zeros(1, 4, 8)):
        pass


def test_a_processor_that_is_not_the_models_own_is_not_replaced() -> None:
    pipe = skyreels()

    class Other:
        def __call__(self, *_: Any, **__: Any) -> Any: ...

    pipe.transformer.blocks[0].attn2.set_processor(Other())
    with pytest.raises(InputError, match="Other does more"), guided(pipe, "blurry"):
        pass


class OwnModel(nn.Module):
    """A user's: one layer that attends to text by its own processor."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(4, 8)
        self.processor: Any = OwnProcessor()

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.processor(self, x, text)  # type: ignore[no-any-return]


class OwnProcessor:
    def __call__(self, model: OwnModel, x: Tensor, text: Tensor) -> Tensor:
        return SdpaAttend()(x, own_keys(model, text))


class OwnGuidedProcessor(GuidedProcessor):
    def __call__(self, model: OwnModel, x: Tensor, text: Tensor) -> Tensor:
        return self.state.guide(self.layer, x, own_keys(model, text))  # type: ignore[no-any-return]


def own_keys(model: OwnModel, text: Tensor) -> TextKeys:
    k, v = model.text(text)[:, :, None].chunk(2, dim=-1)
    return TextKeys(k, v)


def test_a_backbone_of_ones_own_registers_in_a_few_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nasa_video.backbones.base.BACKBONES", [*BACKBONES])

    @register_backbone
    class OwnBackbone(Backbone):
        @classmethod
        def fits(cls, model: nn.Module) -> bool:
            return isinstance(model, OwnModel)

        def find_layers(self) -> list[Any]:
            return [self.model]

        def make_processor(self, layer: int, before: Any) -> OwnGuidedProcessor:
            return OwnGuidedProcessor(layer, self.state)

        def keys_of(self, negative: NegativeContext) -> PromptKeys:
            return PromptKeys((own_keys(self.model, negative.embeds),))

    torch.manual_seed(0)
    model, x, text, negative = OwnModel(), torch.randn(2, 3, 1, 4), torch.randn(2, 5, 4), torch.randn(1, 5, 4)
    plain = model(x, text)
    with guided(model, negative, "nasa:0.5") as scope:
        other = model(x, text)
    minus = SdpaAttend()(x, own_keys(model, negative.expand(2, 5, 4)))
    torch.testing.assert_close(other, plain - 0.5 * minus)
    assert scope.effect is not None
    assert torch.equal(model(x, text), plain)
