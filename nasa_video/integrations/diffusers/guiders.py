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

from contextlib import ExitStack
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import BaseGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.utils import logging
from torch import Tensor, nn

from nasa_video.backbones.scope import Backbone, NegativeContext
from nasa_video.guidance.attention import make_attend
from nasa_video.guidance.methods import AttentionGuidance, Nag, Nasa, Vsf
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

    def __init__(self, start: float = 0.0, stop: float = 1.0, enabled: bool = True) -> None:
        # To diffusers it is never disabled: modular Wan (0.42.1) cannot encode a prompt without a negative.
        super().__init__(start, stop, enabled=True)
        self.meter = EffectMeter()
        self._wanted = self._on = enabled
        self._negative: tuple[Tensor | None, Tensor | None] = (None, None)
        self._backbones: dict[int, tuple[nn.Module, Backbone, Tensor]] = {}
        self._installed = ExitStack()
        self._told = False

    def method(self) -> AttentionGuidance:
        """The guidance with the settings of this guider's config."""
        raise NotImplementedError

    @property
    def effect(self) -> Effect | None:
        """Mean effect since the first step of the last run; None when nothing was guided."""
        return self.meter.effect

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The conditional batch; the unconditional one's embeddings are kept for :meth:`prepare_models`."""
        self._negative = (_second(data, EMBEDS), _second(data, POOLED))
        return [self._prepare_batch(data, 0, self._input_predictions[0])]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The same, where the fields are named by their place in the block state."""
        pairs = {
            name: tuple(getattr(data, one, None) for one in place)
            for name, place in input_fields.items()
            if isinstance(place, tuple)
        }
        self._negative = (_second(pairs, EMBEDS), _second(pairs, POOLED))
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
        self._tell_of_padding(denoiser)
        known = self._backbones.get(id(denoiser))
        # A config may have been changed between two runs: the first step makes everything anew.
        backbone = (
            known[1]
            if known is not None and self._step != 0
            else make_backbone(denoiser, self.method(), make_attend(), self.meter)
        )
        if known is None or known[1] is not backbone or known[2] is not embeds:
            backbone.use([NegativeContext(embeds, pooled=pooled)])
            self._backbones[id(denoiser)] = (denoiser, backbone, embeds)
        elif pooled is not None:  # streams of joint attention are dropped when it comes off
            backbone.use([NegativeContext(embeds, pooled=pooled)])
        return backbone

    def _tell_of_padding(self, denoiser: nn.Module) -> None:
        """Once: the negative's padding cannot be left out where the pipeline does not say which tokens it is."""
        own = getattr(denoiser, "_orig_mod", denoiser)
        if self._told or self.method().negative_padding or "Wan" in type(own).__name__:
            return
        self._told = True
        logger.warning(
            "negative_padding=False has no effect here: this pipeline does not say which tokens of the negative prompt "
            "are padding, so that all of them take part; set negative_padding=True to say so"
        )


class NasaGuidance(AttentionGuidanceGuider):
    """Negative-Away Steer Attention for one-step and few-step models, https://huggingface.co/papers/2412.02687 (eq. 9).

    Args:
        scale: NASA scale; 0 is unguided. The paper's: 0.1 (SD 1.5), 0.2 (SD 2.1), 0.5 (PixArt), up to 1 on SDXL-DMD2.
        negative_padding: whether the negative's padding tokens take part where the model attends to padding.
        guidance_scale: only what pipelines of LCM models embed as their guidance scale.
        start, stop: shares of the steps between which it acts.
        enabled: whether it acts at all.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        scale: float = 1.0,
        negative_padding: bool = True,
        guidance_scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.method()

    def method(self) -> Nasa:
        """NASA with this config."""
        return Nasa(self.config.scale, negative_padding=self.config.negative_padding)


class NagGuidance(AttentionGuidanceGuider):
    """Normalized Attention Guidance, https://huggingface.co/papers/2505.21179.

    Args:
        scale: phi + 1; 1 is unguided. The paper's (scale, alpha): Flux, Wan (5, 0.25); SDXL (3, 0.5).
        tau: how far a token's norm may grow.
        alpha: share of the guided output.
        negative_padding, guidance_scale, start, stop, enabled: as in :class:`NasaGuidance`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        scale: float = 5.0,
        tau: float = 2.5,
        alpha: float = 0.25,
        negative_padding: bool = True,
        guidance_scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.method()

    def method(self) -> Nag:
        """NAG with this config."""
        return Nag(self.config.scale, self.config.tau, self.config.alpha, negative_padding=self.config.negative_padding)


class VsfGuidance(AttentionGuidanceGuider):
    """Value Sign Flip, https://huggingface.co/papers/2508.10931.

    Args:
        scale: strength of the flipped values; 0 is unguided.
        bias: added to the scores of the negative's keys.
        negative_padding: modular SDXL and FLUX pipelines do not say which tokens are padding, so that only Wan can
            leave it out; True elsewhere.
        guidance_scale, start, stop, enabled: as in :class:`NasaGuidance`.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        scale: float = 1.0,
        bias: float = 0.0,
        negative_padding: bool = False,
        guidance_scale: float = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        self.guidance_scale = guidance_scale
        self.method()

    def method(self) -> Vsf:
        """VSF with this config."""
        return Vsf(self.config.scale, self.config.bias, negative_padding=self.config.negative_padding)


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
