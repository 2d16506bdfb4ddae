"""The tiny decoder: its weights' names, its memory, and the whole video from its parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from causvid_adapter import CheckpointError
from causvid_adapter.tiny_decoder import TinyDecoder, TinyStreamingDecoder, load_tiny_decoder


@pytest.fixture(scope="module")
def decoder() -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(latent_channels=4).eval().requires_grad_(False)


def by_hand(state: dict[str, Tensor], latents: Tensor) -> Tensor:
    """Frame after frame and layer after layer, from the published layout: (T, C, h, w) in, frames out."""

    def conv(name: str, x: Tensor) -> Tensor:
        weight = state[f"decoder.{name}.weight"]
        return F.conv2d(x, weight, state.get(f"decoder.{name}.bias"), padding=weight.shape[-1] // 2)

    frames = [F.relu(conv("1", torch.tanh(z[None] / 3) * 3)) for z in latents]
    for start, factor in ((3, 1), (9, 2), (15, 2)):
        for block in range(start, start + 3):
            seen, new = torch.zeros_like(frames[0]), []
            for x in frames:
                y = F.relu(conv(f"{block}.conv.0", torch.cat([x, seen], dim=1)))
                y = conv(f"{block}.conv.4", F.relu(conv(f"{block}.conv.2", y)))
                new.append(F.relu(y + x))
                seen = x
            frames = new
        grown = [conv(f"{start + 4}.conv", F.interpolate(x, scale_factor=2)) for x in frames]
        frames = [conv(str(start + 5), part) for x in grown for part in x.chunk(factor, dim=1)]
    pictures = torch.cat([conv("22", F.relu(x)) for x in frames])
    return pictures[3:]


def test_it_computes_the_published_layout(decoder: TinyDecoder) -> None:
    latents = torch.randn(1, 3, 4, 2, 3)
    made = TinyStreamingDecoder(decoder).decode(latents, clamp=False)
    expected = by_hand(decoder.state_dict(), latents[0]) * 2 - 1
    assert made.shape == (1, 9, 3, 16, 24)
    torch.testing.assert_close(made[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_are_the_whole(decoder: TinyDecoder, chunk: int) -> None:
    latents = torch.randn(2, 6, 4, 2, 2)
    whole = TinyStreamingDecoder(decoder).decode(latents)
    stream = TinyStreamingDecoder(decoder)
    parts = torch.cat([stream.decode(part) for part in latents.split(chunk, dim=1)], dim=1)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    stream.reset()
    torch.testing.assert_close(stream.decode(latents), whole)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_published_files_load_without_their_encoder(decoder: TinyDecoder, tmp_path: Path, suffix: str) -> None:
    state = {name: value.clone() for name, value in decoder.state_dict().items()}
    file = state | {"encoder.0.weight": torch.zeros(64, 3, 3, 3)}
    path = tmp_path / f"taew2_1{suffix}"
    if suffix == ".pth":
        torch.save(file, path)
    else:
        save_file(file, path)
    loaded = load_tiny_decoder(path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in state.items())


def test_the_published_size_is_reached() -> None:
    # 11.3 M parameters with the encoder, as published; the decoder alone is most of it.
    assert 8e6 < sum(p.numel() for p in TinyDecoder(16).parameters()) < 11.3e6


def test_other_files_are_named(tmp_path: Path) -> None:
    torch.save({"decoder.conv_in.weight": torch.zeros(2, 2, 3, 3, 3)}, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="no tiny decoder"):
        load_tiny_decoder(tmp_path / "vae.pth")
    torch.save({"decoder.1.weight": torch.zeros(256, 4, 3, 3)}, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match="does not fit the tiny decoder"):
        load_tiny_decoder(tmp_path / "half.pth")
