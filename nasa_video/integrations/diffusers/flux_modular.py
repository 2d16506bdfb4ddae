"""FLUX's modular blocks with a place for a guider: diffusers 0.42 gives FLUX none, and no negative prompt::

pipe = guided_flux_blocks().init_pipeline("black-forest-labs/FLUX.1-schnell")
pipe.load_components(torch_dtype=torch.bfloat16)
pipe.update_components(guider=NasaGuidance(scale=0.5))
image = pipe(prompt="a fox", negative_prompt="blurry", output="images")

Kontext: ``guided_flux_blocks(FluxKontextAutoBlocks())``.
"""

# B batch, L text tokens, E text dim, P pooled dim

from __future__ import annotations

from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.modular_pipelines import FluxAutoBlocks, FluxKontextAutoBlocks
from diffusers.modular_pipelines.flux.denoise import FluxKontextLoopDenoiser, FluxLoopDenoiser
from diffusers.modular_pipelines.flux.encoders import FluxTextEncoderStep
from diffusers.modular_pipelines.modular_pipeline_utils import ComponentSpec, InputParam, OutputParam

from nasa_video.errors import InputError
from nasa_video.integrations.diffusers.guiders import NasaGuidance

NEGATIVE_FIELDS = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
GUIDER_FIELDS = {
    "encoder_hidden_states": ("prompt_embeds", "negative_prompt_embeds"),
    "pooled_projections": ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
}


def guider_spec() -> ComponentSpec:
    """The guider component; until it is replaced, its scale keeps it off."""
    return ComponentSpec(
        "guider", NasaGuidance, config=FrozenDict({"scale": 0.0}), default_creation_method="from_config"
    )


class FluxNegativeTextEncoderStep(FluxTextEncoderStep):  # type: ignore[misc]
    """Encodes the negative prompt as FLUX encodes the prompt; without one its embeddings are None."""

    @property
    def description(self) -> str:
        """For the pipeline's own documentation."""
        return "Text encoder step that generates the embeddings of the negative prompt for the guider"

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The encoders and the guider."""
        return [*super().expected_components, guider_spec()]

    @property
    def inputs(self) -> list[InputParam]:
        """The negative prompt and the settings of the encoders."""
        return [InputParam("negative_prompt"), *(own for own in super().inputs if not own.name.startswith("prompt"))]

    @property
    def intermediate_outputs(self) -> list[OutputParam]:
        """(B, L, E) and (B, P), or None."""
        return [OutputParam(name, type_hint=torch.Tensor) for name in NEGATIVE_FIELDS]

    @torch.no_grad()
    def __call__(self, components: Any, state: Any) -> Any:
        """Encode it where the guider wants it."""
        block_state = self.get_block_state(state)
        block_state.negative_prompt_embeds = block_state.negative_pooled_prompt_embeds = None
        if block_state.negative_prompt and components.guider.num_conditions > 1:
            block_state.negative_prompt_embeds, block_state.negative_pooled_prompt_embeds = self.encode_prompt(
                components,
                prompt=block_state.negative_prompt,
                prompt_2=None,
                device=components._execution_device,
                max_sequence_length=block_state.max_sequence_length,
                lora_scale=(block_state.joint_attention_kwargs or {}).get("scale"),
            )
        self.set_block_state(state, block_state)
        return components, state


class _GuidedLoop:
    """Runs the transformer of the loop block behind it under the guider."""

    @property
    def expected_components(self) -> list[ComponentSpec]:
        """The transformer and the guider."""
        return [*super().expected_components, guider_spec()]  # type: ignore[misc]

    @property
    def inputs(self) -> list[Any]:
        """Those of FLUX, the number of steps and the negative's embeddings."""
        names = ("num_inference_steps", *NEGATIVE_FIELDS)
        return [*super().inputs, *(InputParam(name) for name in names)]  # type: ignore[misc]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> Any:
        """One guided call."""
        guider = components.guider
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        (batch,) = guider.prepare_inputs_from_block_state(block_state, GUIDER_FIELDS)
        guider.prepare_models(components.transformer)
        try:
            components, block_state = super().__call__(components, block_state, i, t)  # type: ignore[misc]
        finally:
            guider.cleanup_models(components.transformer)
        batch.noise_pred = block_state.noise_pred
        block_state.noise_pred = guider([batch])[0]
        return components, block_state


class FluxGuidedLoopDenoiser(_GuidedLoop, FluxLoopDenoiser):  # type: ignore[misc]
    """FLUX's, guided."""


class FluxKontextGuidedLoopDenoiser(_GuidedLoop, FluxKontextLoopDenoiser):  # type: ignore[misc]
    """Kontext's, guided: the rows of the image that is edited are image rows like the others."""


def guided_flux_blocks(blocks: FluxAutoBlocks | FluxKontextAutoBlocks | None = None) -> Any:
    """FLUX's blocks (text and image to image) or Kontext's, with a guider and a negative prompt.

    Raises:
        InputError: these blocks have another loop.
    """
    blocks = FluxAutoBlocks() if blocks is None else blocks
    loop = blocks.sub_blocks["denoise"].sub_blocks["denoise"].sub_blocks
    if isinstance(loop["denoiser"], FluxKontextLoopDenoiser):
        loop["denoiser"] = FluxKontextGuidedLoopDenoiser()
    elif isinstance(loop["denoiser"], FluxLoopDenoiser):
        loop["denoiser"] = FluxGuidedLoopDenoiser()
    else:
        name = type(blocks).__name__
        raise InputError(f"{name} has no loop of FLUX or Kontext; give FluxAutoBlocks() or FluxKontextAutoBlocks()")
    blocks.sub_blocks.insert("negative_text_encoder", FluxNegativeTextEncoderStep(), 1)
    return blocks
