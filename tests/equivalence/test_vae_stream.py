"""Frames coded as they come are those of the whole video."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from causvid_adapter import ShapeError, StreamingDecoder, StreamingEncoder, denormalize, normalize

NewVae = Callable[..., AutoencoderKLWan]

KINDS: dict[str, dict[str, Any]] = {
    "wan 2.1": {},
    "patches": {"patch_size": 2, "in_channels": 12, "out_channels": 12},
    "residual": {"patch_size": 2, "in_channels": 12, "out_channels": 12, "is_residual": True, "decoder_base_dim": 6},
}
FRAMES = 6
SIZE = (4, 4)
"""Latent rows and columns: below 16 points PyTorch's convolution of a single frame rounds in another order."""


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest, new_vae: NewVae) -> AutoencoderKLWan:
    return new_vae(**KINDS[request.param])


def latents(frames: int = FRAMES, batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, 4, *SIZE, generator=torch.Generator().manual_seed(0))


def pictures(frames: int, vae: AutoencoderKLWan) -> Tensor:
    scale = 8 * (vae.config.patch_size or 1)
    return (
        torch.rand(1, frames, 3, SIZE[0] * scale, SIZE[1] * scale, generator=torch.Generator().manual_seed(0)) * 2 - 1
    )


@torch.no_grad()
def whole_decode(vae: AutoencoderKLWan, x: Tensor) -> Tensor:
    return vae.decode(x.transpose(1, 2)).sample.transpose(1, 2)


@torch.no_grad()
def whole_encode(vae: AutoencoderKLWan, frames: Tensor) -> Tensor:
    return vae.encode(frames.transpose(1, 2)).latent_dist.mode().transpose(1, 2)


@pytest.mark.parametrize("chunk", [1, 2, 3, FRAMES])
def test_streamed_decode_is_the_whole_decode_to_the_bit(vae: AutoencoderKLWan, chunk: int) -> None:
    x = latents(batch=2)
    expected = whole_decode(vae, x)
    decoder = StreamingDecoder(vae)
    pieces = [decoder.decode(part) for part in x.split(chunk, dim=1)]
    assert [piece.shape[1] for piece in pieces] == [4 * chunk - 3] + [4 * chunk] * (FRAMES // chunk - 1)
    assert torch.equal(torch.cat(pieces, dim=1), expected)
    assert expected.std() > 0.1


def test_a_decoder_starts_anew_after_reset_and_two_do_not_disturb_each_other(vae: AutoencoderKLWan) -> None:
    x = latents()
    expected = whole_decode(vae, x)
    first, second = StreamingDecoder(vae), StreamingDecoder(vae)
    begun = first.decode(x[:, :2])
    second.decode(x[:, 3:])
    whole_decode(vae, x[:, 1:])
    assert torch.equal(torch.cat([begun, first.decode(x[:, 2:])], dim=1), expected)
    second.reset()
    assert torch.equal(second.decode(x), expected)


@pytest.mark.parametrize("groups", [[1, 4, 4, 4], [5, 8], [9, 4], [13]])
def test_streamed_encode_is_the_whole_encode_to_the_bit(vae: AutoencoderKLWan, groups: list[int]) -> None:
    frames = pictures(13, vae)
    encoder = StreamingEncoder(vae)
    pieces = [encoder.encode(part) for part in frames.split(groups, dim=1)]
    assert torch.equal(torch.cat(pieces, dim=1), whole_encode(vae, frames))


def test_the_encoder_names_the_frame_counts_that_it_takes(new_vae: NewVae) -> None:
    vae = new_vae()
    encoder = StreamingEncoder(vae)
    for frames in (0, 2, 4):
        with pytest.raises(ShapeError, match=rf"1 \+ 4 k frames here, got {frames}"):
            encoder.encode(pictures(9, vae)[:, :frames])
    encoder.encode(pictures(1, vae))
    for frames in (0, 1, 5):
        with pytest.raises(ShapeError, match=f"4 k frames here, got {frames}"):
            encoder.encode(pictures(9, vae)[:, :frames])


@pytest.mark.parametrize("shape", [(1, 0, 4, 2, 3), (3, 4, 2, 3)])
def test_the_decoder_refuses_what_is_no_video(new_vae: NewVae, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="T >= 1"):
        StreamingDecoder(new_vae()).decode(torch.zeros(shape))


def test_normalized_latents_come_back_and_have_the_scale_of_the_config(new_vae: NewVae) -> None:
    vae = new_vae(latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 4.0, 8.0])
    x = latents()
    assert torch.allclose(normalize(vae, x)[:, :, 3], (x[:, :, 3] - 3) / 8)
    assert torch.allclose(denormalize(vae, normalize(vae, x)), x, atol=1e-6)
    assert normalize(vae, x.bfloat16()).dtype == torch.bfloat16
