"""Wan's VAE from diffusers' folder or from the original ``Wan2.1_VAE.pth``."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers
from safetensors import SafetensorError

from causvid_adapter.checkpoint import describe, load_weights, read_state_dict, unwrap
from causvid_adapter.errors import CheckpointError


def load_vae(path: Path, dtype: torch.dtype = torch.float32) -> AutoencoderKLWan:
    """The autoencoder on the CPU, not trainable.

    A file's sizes are read off its weights; what weights do not show (the order of the stages, the latents' mean and
    deviation) is Wan 2.1's.

    Raises:
        CheckpointError: the folder or file is broken, or of another model.
    """
    if path.is_dir():
        try:
            vae = AutoencoderKLWan.from_pretrained(path, local_files_only=True, torch_dtype=dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise CheckpointError(f"{path} is no folder of a Wan VAE: {str(error).strip().splitlines()[0]}") from error
        return vae.eval().requires_grad_(False)  # type: ignore[no-any-return]
    state = unwrap(read_state_dict(path))
    if "decoder.middle.0.residual.0.gamma" in state:
        state = convert_wan_vae_to_diffusers(state)
    if "decoder.conv_in.weight" not in state:
        raise CheckpointError(f"{path} is no Wan VAE: it looks like {describe(state)}")
    vae = AutoencoderKLWan(
        base_dim=state["encoder.conv_in.weight"].shape[0], z_dim=state["post_quant_conv.weight"].shape[0]
    )
    load_weights(vae, state, path, "Wan 2.1's VAE")
    # Not by diffusers' own .to(), which warns of a list of exceptions that is empty here.
    return torch.nn.Module.to(vae, dtype).eval().requires_grad_(False)  # type: ignore[no-any-return]
