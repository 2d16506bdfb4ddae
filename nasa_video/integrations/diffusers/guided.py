"""Guidance for any supported diffusers model or classic pipeline, in one line::

with guided(pipe, "blurry, low quality", "nasa:0.5"):
    image = pipe("a fox in a suit", num_inference_steps=1, guidance_scale=0).images[0]
"""

# B batch, L text tokens, E text dim

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.modular_pipelines import ModularPipeline
from torch import Tensor, nn

from nasa_video.backbones import flux, unet, wan  # noqa: F401  (they register themselves)
from nasa_video.backbones.base import Backbone, NegativeContext, find_backbone
from nasa_video.backbones.joint import JointFormula
from nasa_video.errors import InputError
from nasa_video.guidance.attention import Attend, make_attend
from nasa_video.guidance.methods import METHODS, AttentionGuidance, Guidance, Nasa, parse_guidance
from nasa_video.guidance.state import Effect, EffectMeter
from nasa_video.guidance.terms import Negative, as_negatives
from nasa_video.integrations.diffusers.pipeline_scope import PipelineScope, unwrap

OneNegative = str | Negative | NegativeContext | Tensor
Negatives = OneNegative | Sequence[OneNegative] | None
COMPONENTS = ("transformer", "transformer_2", "unet")


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
    guidance: Guidance | str | None = None,
    *,
    attend: Attend | None = None,
    joint: JointFormula | None = None,
    doubled_batch: bool = False,
) -> Iterator[GuidedScope]:
    """Guide a model's text attention away from the negatives inside the scope.

    Args:
        model_or_pipeline: a PixArt, UNet, FLUX or :class:`~causvid_adapter.CausalWan` model or one of Wan's shape, or
            a classic diffusers pipeline with one; compiled and LoRA-adapted ones too.
        negatives: a text (commas separate terms, ``term:0.4`` weighs one, quotes keep one together), a
            :class:`~nasa_video.Negative`, an encoded :class:`~nasa_video.backbones.base.NegativeContext`, embeddings
            (B, L, E), or several of them. A bare model has no text encoder and takes encoded ones only. Nothing, or an
            empty text: unguided.
        guidance: a method such as :class:`~nasa_video.Nasa`, or its spelling such as ``"nag:5,alpha=0.3"``; None is
            Nasa().
        attend: the attention kernel; PyTorch's by default.
        joint: what guidance means in joint attention, see :mod:`nasa_video.backbones.joint`; FLUX only.
        doubled_batch: a bare model is called with [unconditional; conditional] batches: guide the second half only.
            Pipelines are asked.

    Raises:
        InputError: nothing here can be guided, or not in this way; the message says why and what can.
    """
    method = Nasa() if guidance is None else parse_guidance(guidance)
    meter = EffectMeter()
    given = _read_negatives(negatives)
    if method is not None and not isinstance(method, AttentionGuidance):
        able = ", ".join(own.__name__ for own in METHODS.values() if issubclass(own, AttentionGuidance))
        raise InputError(
            "classifier-free guidance is the pipeline's own: pass it negative_prompt and guidance_scale. guided() "
            f"takes {able}, which act in attention and may be combined with it"
        )
    if isinstance(model_or_pipeline, ModularPipeline):
        raise InputError(
            "a Modular Pipeline takes a guider: pipe.update_components(guider=NasaGuidance(scale=0.5)) from "
            "nasa_video.integrations.diffusers.guiders"
        )
    denoisers = _find_denoisers(model_or_pipeline)
    attend = make_attend() if attend is None else attend
    backbones = [make_backbone(model, method or Nasa(), attend, meter, joint) for model in denoisers.values()]
    if not given or method is None or not method.active:
        yield GuidedScope(meter)
        return
    if isinstance(model_or_pipeline, DiffusionPipeline):
        scope = PipelineScope(model_or_pipeline, denoisers, backbones, given).open()
    else:
        scope = _guided_model(backbones[0], given, doubled_batch)
    with scope:
        yield GuidedScope(meter)


@contextmanager
def _guided_model(backbone: Backbone, negatives: Sequence[Negative | NegativeContext], doubled: bool) -> Iterator[None]:
    encoded = [negative for negative in negatives if isinstance(negative, NegativeContext)]
    if len(encoded) < len(negatives):
        raise InputError(
            "a bare model has no text encoder: give its pipeline instead, or encoded negatives (NegativeContext)"
        )
    if backbone.guidance.schedule.over_steps:
        raise InputError("a bare model does not know its step: leave the schedule's steps alone, or guide its pipeline")
    backbone.state.doubled = doubled
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
    """The way to guide a model, compiled or not.

    Raises:
        InputError: none is known.
    """
    model = unwrap(model)
    backbone: Any = find_backbone(model)
    if backbone.joint:
        return backbone(model, guidance, attend, meter, joint)  # type: ignore[no-any-return]
    if joint is not None:
        raise InputError(f"{type(model).__name__} has cross-attention, no joint attention: leave out joint=")
    return backbone(model, guidance, attend, meter)  # type: ignore[no-any-return]


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
    several = [negatives] if isinstance(negatives, Tensor | NegativeContext) else negatives
    if not isinstance(several, Sequence) or isinstance(several, str):
        return list(as_negatives(several))
    read: list[Negative | NegativeContext] = []
    for one in several:
        if isinstance(one, Tensor | NegativeContext):
            read.append(NegativeContext(one) if isinstance(one, Tensor) else one)
        else:
            read += as_negatives([one])
    return read
