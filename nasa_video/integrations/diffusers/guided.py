"""Guidance for any supported diffusers model or classic pipeline, in one line::

with guided(pipe, "blurry, low quality", Nasa(scale=0.5)):
    image = pipe("a fox in a suit", num_inference_steps=1, guidance_scale=0).images[0]
"""

# B batch, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)
from diffusers.modular_pipelines import ModularPipeline
from torch import Tensor, nn

from causvid_adapter import CausalWan
from nasa_video.backbones.bidirectional_wan import WanBackbone
from nasa_video.backbones.flux import FluxBackbone
from nasa_video.backbones.joint import JointFormula, default_joint
from nasa_video.backbones.scope import Backbone, NegativeContext
from nasa_video.backbones.unet import LegacyBackbone
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, make_attend
from nasa_video.guidance.methods import AttentionGuidance, Guidance, Nasa, parse_guidance
from nasa_video.guidance.state import Effect, EffectMeter
from nasa_video.guidance.terms import Negative
from nasa_video.integrations.diffusers.pipeline_scope import PipelineScope

OneNegative = str | Negative | NegativeContext | Tensor
Negatives = OneNegative | Sequence[OneNegative] | None
COMPONENTS = ("transformer", "transformer_2", "unet")
TWO_PASSES = (CausalWan, FluxTransformer2DModel, WanTransformer3DModel, WanVACETransformer3DModel)
"""Models whose pipelines run classifier-free guidance as two calls; the others' double the batch."""


class GuidedScope:
    """What ``guided`` gives: the effect so far."""

    def __init__(self, meter: EffectMeter) -> None:
        self.meter = meter

    @property
    def effect(self) -> Effect | None:
        """Mean effect over the guided layers and calls; None when nothing was guided."""
        return self.meter.effect


@contextmanager
def guided(
    model_or_pipeline: DiffusionPipeline | nn.Module,
    negatives: Negatives,
    guidance: Guidance | None = None,
    *,
    attend: Attend | None = None,
    joint: JointFormula | None = None,
    doubled_batch: bool = False,
) -> Iterator[GuidedScope]:
    """Guide a model's text attention away from the negatives inside the scope.

    Args:
        model_or_pipeline: a PixArt, UNet, FLUX, Wan or :class:`~causvid_adapter.CausalWan` model, or a classic
            diffusers pipeline with one; compiled and LoRA-adapted ones too.
        negatives: a text, a :class:`~nasa_video.Negative` (with a weight), an encoded
            :class:`~nasa_video.backbones.scope.NegativeContext`, embeddings (B, L, E), or several of them. A bare model
            has no text encoder and takes encoded ones only. Nothing, or an empty text: unguided.
        guidance: :class:`~nasa_video.Nasa` (default), Nag, Vsf or, for Wan, CentredNasa; None is Nasa().
        attend: the attention kernel; PyTorch's by default.
        joint: what guidance means in joint attention, see :mod:`nasa_video.backbones.joint`; FLUX only.
        doubled_batch: a bare model is called with [unconditional; conditional] batches: guide the second half only.
            Pipelines are asked.

    Raises:
        InputError: nothing here can be guided, or not in this way; the message says why and what can.
    """
    guidance = Nasa() if guidance is None else parse_guidance(guidance)
    meter = EffectMeter()
    given = _read_negatives(negatives)
    if not isinstance(guidance, AttentionGuidance):
        raise InputError(
            "classifier-free guidance is the pipeline's own: pass it negative_prompt and guidance_scale. guided() "
            "takes Nasa, CentredNasa, Nag and Vsf, which act in attention and may be combined with it"
        )
    if isinstance(model_or_pipeline, ModularPipeline):
        raise InputError(
            "a Modular Pipeline takes a guider: pipe.update_components(guider=NasaGuidance(scale=0.5)) from "
            "nasa_video.integrations.diffusers.guiders"
        )
    denoisers = _find_denoisers(model_or_pipeline)
    attend = make_attend() if attend is None else attend
    backbones = [make_backbone(model, guidance, attend, meter, joint) for model in denoisers.values()]
    if not given or not guidance.active:
        yield GuidedScope(meter)
        return
    if isinstance(model_or_pipeline, DiffusionPipeline):
        two_passes = isinstance(_unwrap(next(iter(denoisers.values()))), TWO_PASSES)
        scope = PipelineScope(model_or_pipeline, denoisers, backbones, given, guidance.schedule, two_passes=two_passes)
        with scope.open():
            yield GuidedScope(meter)
        return
    with _guided_model(backbones[0], given, guidance, doubled_batch):
        yield GuidedScope(meter)


@contextmanager
def _guided_model(
    backbone: Backbone, negatives: Sequence[Negative | NegativeContext], guidance: AttentionGuidance, doubled: bool
) -> Iterator[None]:
    encoded = [negative for negative in negatives if isinstance(negative, NegativeContext)]
    if len(encoded) < len(negatives):
        raise InputError(
            "a bare model has no text encoder: give its pipeline instead, or encoded negatives (NegativeContext)"
        )
    if guidance.schedule.over_steps:
        raise InputError("a bare model does not know its step: leave the schedule's steps alone, or guide its pipeline")
    backbone.steering.doubled = doubled
    backbone.use(encoded)
    with backbone.install():
        yield


def make_backbone(
    model: nn.Module,
    guidance: AttentionGuidance,
    attend: Attend,
    meter: EffectMeter,
    joint: JointFormula | None = None,
) -> Backbone:
    """The way to guide a model, by its class.

    Raises:
        InputError: none is known.
    """
    model = _unwrap(model)
    if isinstance(model, FluxTransformer2DModel):
        return FluxBackbone(model, guidance, attend, meter, default_joint(guidance) if joint is None else joint)
    if joint is not None:
        raise InputError(f"{type(model).__name__} has cross-attention, no joint attention: leave out joint=")
    if isinstance(model, PixArtTransformer2DModel | UNet2DConditionModel):
        return LegacyBackbone(model, guidance, attend, meter)
    if isinstance(model, WanTransformer3DModel | WanVACETransformer3DModel | CausalWan):
        return WanBackbone(model, guidance, attend, meter)
    raise InputError(
        f"no way to guide a {type(model).__name__} is known; PixArt, UNet2DConditionModel (Stable Diffusion, SDXL), "
        "FLUX and Wan models can be guided"
    )


def _unwrap(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # type: ignore[no-any-return]


def _find_denoisers(target: DiffusionPipeline | nn.Module) -> dict[str, nn.Module]:
    if isinstance(target, nn.Module):
        return {"": target}
    if not isinstance(target, DiffusionPipeline):
        raise InputError(f"guided() takes a diffusers pipeline or a model, got {type(target).__name__}")
    found = {name: part for name in COMPONENTS if (part := getattr(target, name, None)) is not None}
    if not found or not hasattr(target, "encode_prompt"):
        raise InputError(f"{type(target).__name__} has no text-guided denoiser that could be guided")
    return found


def _read_negatives(negatives: Negatives) -> list[Negative | NegativeContext]:
    if negatives is None:
        return []
    several = [negatives] if isinstance(negatives, OneNegative) else list(negatives)
    read: list[Negative | NegativeContext] = []
    for one in several:
        if isinstance(one, str):
            read += [Negative(one)] if one.strip() else []
        else:
            read.append(NegativeContext(one) if isinstance(one, Tensor) else one)
    return read
