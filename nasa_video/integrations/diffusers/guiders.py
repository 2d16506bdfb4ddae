"""Guiders that bring NASA, NAG and VSF to diffusers' Modular Pipelines (diffusers 0.42)::

    pipe.update_components(guider=NasaGuidance(scale=0.8))
    image = pipe(prompt="a fox", negative_prompt="blurry", output="images")

The pipeline's own text encoder encodes the negative; the guider takes its embeddings out of the unconditional place,
guides the attention layers while the denoiser runs, and takes the guidance off again. One pass a step, unlike every
other guider. Works where a pipeline has a guider (Wan and Wan 2.2 with VACE, SDXL); for FLUX, which has none, see
``nasa_video.integrations.diffusers.flux_modular``.
"""

# B batch, L text tokens, E text dim, P pooled dim

from __future__ import annotations

import dataclasses
import inspect
from contextlib import ExitStack
from typing import Any, ClassVar

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.utils import logging
from torch import Tensor, nn

from nasa_video.backbones.base import Backbone, NegativeContext
from nasa_video.errors import InputError
from nasa_video.guidance.attention import make_attend
from nasa_video.guidance.methods import AttentionGuidance, CentredNasa, Nag, Nasa, Vsf
from nasa_video.guidance.state import Effect, EffectMeter
from nasa_video.integrations.diffusers.guided import make_backbone

logger = logging.get_logger(__name__)

EMBEDS = ("encoder_hidden_states", "prompt_embeds")
POOLED = ("pooled_projections", "text_embeds", "pooled_prompt_embeds")


class AttentionGuidanceGuider(BaseGuidance):  # type: ignore[misc]
    """Base of the guiders that act in attention: one conditional batch, and the negative's embeddings beside it.

    ``num_conditions`` tells the text encoder that a negative is wanted; the denoiser still runs once.
    """

    _input_predictions = ["pred_cond"]  # noqa: RUF012  (diffusers wants a list)
    method_class: ClassVar[type[AttentionGuidance]]

    def __init__(self, *settings: Any, **config: Any) -> None:
        # To diffusers it is never disabled: modular Wan (0.42.1) cannot encode a prompt without a negative.
        super().__init__(self.config.start, self.config.stop, enabled=True)
        self.guidance_scale = self.config.guidance_scale
        self.meter = EffectMeter()
        self._wanted = self._on = self.config.enabled
        self._negative: tuple[Tensor | None, Tensor | None] = (None, None)
        self._backbones: dict[int, tuple[nn.Module, Backbone, Tensor]] = {}
        self._installed = ExitStack()
        self._told = False
        self.method()  # Fails now for a setting that it cannot take.

    def method(self) -> AttentionGuidance:
        """The guidance with the settings of this guider's config."""
        fields = (field.name for field in dataclasses.fields(self.method_class))
        return self.method_class(**{name: self.config[name] for name in fields if name in self.config})

    @property
    def effect(self) -> Effect | None:
        """Mean effect since the first step of the last run; None when nothing was guided."""
        return self.meter.effect

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The conditional batch; the unconditional one's embeddings are kept for :meth:`prepare_models`."""
        self._read_negative(data)
        return [self._prepare_batch(data, 0, self._input_predictions[0])]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, where the fields are named by their place in the block state."""
        pairs = {
            name: tuple(getattr(data, one, None) for one in place)
            for name, place in input_fields.items()
            if isinstance(place, tuple)
        }
        self._read_negative(pairs)
        return [self._prepare_batch_from_block_state(input_fields, data, 0, self._input_predictions[0])]

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Guide the denoiser for its next call; it comes off in cleanup_models, and when the call fails."""
        self._count_prepared += 1
        self._installed.close()
        if self._step == 0:
            self.meter.reset()
        embeds, pooled = self._negative
        if embeds is None or not self._acts() or _says_nothing(embeds):
            return
        backbone = self._backbone(denoiser, embeds, pooled)
        self._tell_of_padding(backbone)
        self._installed.enter_context(backbone.install())
        handle = denoiser.register_forward_hook(lambda *_: self._installed.close(), always_call=True)
        self._installed.callback(handle.remove)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        """Take the guidance off."""
        self._installed.close()

    def disable(self) -> None:
        """Switch off; said aloud, because diffusers' SDXL loop does it to every guider of an LCM UNet."""
        logger.warning("attention guidance is switched off: the negative prompt has no effect until enable()")
        self._on = False

    def enable(self) -> None:
        """Switch on again, unless the config has it off: diffusers' SDXL loop enables every guider."""
        self._on = self._wanted

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """What the one pass predicted."""
        (batch,) = data
        return self.forward(pred_cond=batch.noise_pred)

    def forward(self, pred_cond: Tensor) -> GuiderOutput:
        """Guidance has happened inside the denoiser."""
        return GuiderOutput(pred=pred_cond, pred_cond=pred_cond, pred_uncond=None)

    @property
    def is_conditional(self) -> bool:
        """There is no other batch."""
        return True

    @property
    def num_conditions(self) -> int:
        """Prompts to be encoded."""
        return 2

    def _acts(self) -> bool:
        if not self._on or not self.method().active:
            return False
        if self._num_inference_steps is None:
            return True
        first, last = (int(share * self._num_inference_steps) for share in (self._start, self._stop))
        return bool(first <= self._step < last)

    def _backbone(self, denoiser: nn.Module, embeds: Tensor, pooled: Tensor | None) -> Backbone:
        """The denoiser's backbone with the negative's keys, made once a prompt."""
        _, backbone, known = self._backbones.get(id(denoiser), (None, None, None))
        # A config may have been changed between two runs: the first step makes everything again.
        if backbone is None or self._step == 0:
            backbone, known = make_backbone(denoiser, self.method(), make_attend(), self.meter), None
        # Streams of joint attention are dropped when guidance comes off.
        if known is not embeds or backbone.joint:
            backbone.use([NegativeContext(embeds, pooled=pooled)])
            self._backbones[id(denoiser)] = (denoiser, backbone, embeds)
        return backbone

    def _read_negative(self, data: dict[str, Any]) -> None:
        """The unconditional embeddings of a batch, by the names that pipelines have for them."""
        if not any(name in data for name in EMBEDS):
            raise InputError(
                f"this pipeline names its text embeddings otherwise than {' or '.join(EMBEDS)} ({', '.join(data)}), so "
                "that the negative prompt would have no effect; use the classic pipeline with guided(...)"
            )
        self._negative = (_second(data, EMBEDS), _second(data, POOLED))

    def _tell_of_padding(self, backbone: Backbone) -> None:
        """Once: the negative's padding cannot be left out where the pipeline does not say which tokens it is."""
        if self._told or backbone.guidance.negative_padding or backbone.zero_padded:
            return
        self._told = True
        logger.warning(
            "negative_padding=False has no effect here: this pipeline does not say which tokens of the negative prompt "
            "are padding, so that all of them take part; set negative_padding=True to say so"
        )


def guider_of(method: type[AttentionGuidance], name: str, about: str, **defaults: Any) -> Any:
    """The guider class of a method: its settings are arguments and config, beside those that all guiders have.

    Args:
        name: of the class, which must be an attribute of the module that calls, so that diffusers can load it again.
        about: the first lines of its documentation.
        defaults: where they are not the method's own.
    """
    own = sorted(
        (field for field in dataclasses.fields(method) if field.metadata), key=lambda field: field.kw_only is True
    )
    values = {field.name: defaults.get(field.name, field.default) for field in own}
    values |= {"guidance_scale": 1.0, "start": 0.0, "stop": 1.0, "enabled": True}
    rows = "\n".join(f"        {field.name}: {field.metadata['help']}." for field in own)

    def __init__(self: Any, *settings: Any, **config: Any) -> None:
        AttentionGuidanceGuider.__init__(self)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(key, kind, default=value) for key, value in values.items()]
    __init__.__signature__ = inspect.Signature([inspect.Parameter("self", kind), *parameters])  # type: ignore[attr-defined]
    members = {
        "__doc__": f"""{about}

    Args:
{rows}
        guidance_scale: only what pipelines of LCM models embed as their guidance scale.
        start, stop: shares of the steps between which it acts.
        enabled: whether it acts at all.
    """,
        "__init__": register_to_config(__init__),
        "__module__": inspect.stack()[1].frame.f_globals["__name__"],
        "method_class": method,
    }
    return type(name, (AttentionGuidanceGuider,), members)


NasaGuidance = guider_of(
    Nasa,
    "NasaGuidance",
    """Negative-Away Steer Attention for one-step and few-step models, https://huggingface.co/papers/2412.02687 (eq. 9).

    Scale 0 is unguided. The paper's: 0.1 (SD 1.5), 0.2 (SD 2.1), 0.5 (PixArt), up to 1 on SDXL-DMD2.""",
)
CentredNasaGuidance = guider_of(
    CentredNasa,
    "CentredNasaGuidance",
    """NASA that leaves alone what all prompts have in common; models of Wan's shape only.""",
)
NagGuidance = guider_of(
    Nag,
    "NagGuidance",
    """Normalized Attention Guidance, https://huggingface.co/papers/2505.21179.

    Scale 1 is unguided. The paper's (scale, alpha): Flux, Wan (5, 0.25); SDXL (3, 0.5).""",
    scale=5.0,
)
VsfGuidance = guider_of(
    Vsf,
    "VsfGuidance",
    """Value Sign Flip, https://huggingface.co/papers/2508.10931.

    Scale 0 is unguided. Modular SDXL and FLUX pipelines do not say which tokens are padding, so that only Wan can leave
    the negative's padding out: ``negative_padding=True`` elsewhere.""",
)


def _second(data: dict[str, Any], names: tuple[str, ...]) -> Tensor | None:
    """The unconditional value of the first of these names that has one."""
    for name in names:
        pair = data.get(name)
        if isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor):
            return pair[1]
    return None


def _says_nothing(embeds: Tensor) -> bool:
    """No negative prompt was given: SDXL then passes zeros, Wan one end-of-sequence token before its zeros."""
    return bool(embeds[:, 1:].eq(0).all())
