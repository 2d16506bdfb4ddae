"""What a run takes, and what is refused before it starts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise, StreamingDecoder
from causvid_adapter.window import Window
from nasa_video.bench.random_model import RandomText
from nasa_video.errors import InputError
from nasa_video.guidance.methods import ClassifierFree
from nasa_video.models.free_memory import available
from nasa_video.models.memory_estimate import Fit, Run, cache_frames, estimate, fitting_sizes, require
from nasa_video.models.part_sizes import transformer_sizes, vae_sizes
from nasa_video.models.placement import is_quantised
from nasa_video.models.presets import find_preset
from nasa_video.video.pipeline import VideoPipeline

CAUSVID = find_preset("causvid")


def causvid(**changes: object) -> Run:
    with torch.device("meta"):
        vae = dict(AutoencoderKLWan().config)
    assert CAUSVID.components.config is not None
    return replace(Run(CAUSVID.components.config, vae, CAUSVID.sampler, 832, 480, 21), **changes)  # type: ignore[arg-type]


def test_causvid_has_the_history_and_text_keys_that_the_facts_say() -> None:
    needs = estimate(causvid())
    assert needs.history == 2 * 30 * 32_760 * 1536 * 2  # 6.04 GB
    assert estimate(causvid(caches=2)).history == 2 * needs.history
    assert estimate(causvid(text_tokens=512)).text_keys == 2 * 30 * 512 * 1536 * 2
    assert needs.weights == pytest.approx(2 * 1.42e9 + 4 * 127e6, rel=0.01)
    kept = needs.weights + needs.history + needs.text_keys + needs.features
    assert needs.phases == {
        "reading the prompts": needs.weights,
        "a pass of the model": kept + needs.denoiser,
        "decoding": kept + needs.decoder,
    }
    assert needs.peak == kept + max(needs.denoiser, needs.decoder)
    assert estimate(causvid(overlapped=True)).peak == kept + needs.denoiser + needs.decoder
    assert estimate(causvid(text_encoder=90_000_000_000)).peak == needs.weights + 90_000_000_000


@pytest.mark.parametrize(
    ("frames", "window", "sink"), [(3, None, 0), (21, None, 0), (21, 9, 3), (6, 9, 3), (None, 6, 0)]
)
def test_the_history_is_what_the_cache_allocates(
    new_wan: Callable[..., WanTransformer3DModel], frames: int | None, window: int | None, sink: int
) -> None:
    model = CausalWan(new_wan())
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000]), 3, Window(window, sink))
    caches = []
    model.new_cache = lambda *sizes: caches.append(CausalWan.new_cache(model, *sizes)) or caches[0]  # type: ignore[method-assign]
    context = torch.zeros(1, 1, 10)
    for _ in sampler.stream(context, SeededNoise([0], (4, 4, 6)), num_frames=frames or 30):
        pass
    expected = cache_frames(frames, 3, Window(window)) * 6 * 2 * 2 * 48 * 4
    assert caches[0].num_bytes == expected


def test_a_window_makes_any_length_cost_the_same_and_no_window_does_not() -> None:
    windowed = CAUSVID.sampler.model_copy(update={"window_frames": 12, "sink_frames": 3})
    long, short = (estimate(causvid(sampler=windowed, latent_frames=n)).peak for n in (30_000, 21))
    assert long == short
    assert estimate(causvid(latent_frames=30_000)).history > 1000 * estimate(causvid(latent_frames=21)).history


def test_weights_and_features_are_those_of_the_real_models(
    new_wan: Callable[..., WanTransformer3DModel], new_vae: Callable[..., AutoencoderKLWan]
) -> None:
    wan, vae = new_wan(num_layers=5), new_vae()
    run = causvid(transformer=dict(wan.config), vae=dict(vae.config), width=64, height=48, dtype=torch.float32)
    real = sum(p.numel() for module in (wan, vae) for p in module.parameters())
    assert estimate(run).weights == 4 * real
    assert estimate(run, loaded=True).weights == 0
    decoder = StreamingDecoder(vae)
    for _ in range(3):
        decoder.decode(torch.zeros(1, 3, 4, 6, 8))
    kept = sum(f.numel() for f in decoder._features if isinstance(f, torch.Tensor))
    assert vae_sizes(run.vae).features_per_pixel * 64 * 48 == kept
    assert estimate(run).features == 4 * kept


IMAGE = {"image_dim": 12, "added_kv_proj_dim": 48, "pos_embed_seq_len": 6}


@pytest.mark.parametrize("settings", [{}, IMAGE, {"cross_attn_norm": False, "out_channels": 8, "ffn_dim": 56}])
def test_counted_sizes_are_those_of_the_transformer(new_wan: Callable[..., Any], settings: dict[str, Any]) -> None:
    wan = new_wan(num_layers=1, **settings)
    block, matrices = wan.blocks[0], [m.weight for n, m in wan.named_modules() if is_quantised(n, m)]
    sizes = transformer_sizes(wan.config)
    assert sizes.block == sum(p.numel() for p in block.parameters())
    assert sizes.outside + sizes.block == sum(p.numel() for p in wan.parameters())
    assert (sizes.matrices, sizes.rows) == (sum(w.numel() for w in matrices), sum(w.shape[0] for w in matrices))


def test_what_fits_fits_and_the_next_larger_does_not() -> None:
    run, free = causvid(), 8_000_000_000
    fit = fitting_sizes(run, free, loaded=True)
    assert fit.size is not None
    width, height = fit.size
    assert width % 16 == 0
    assert height % 16 == 0
    assert abs(width / height - 832 / 480) < 0.2
    assert estimate(replace(run, width=width, height=height), loaded=True).peak <= free
    assert estimate(replace(run, width=width + 16, height=height), loaded=True).peak > free
    assert fit.latent_frames is None, "decoding alone takes more than what is free"
    assert fitting_sizes(run, 12_000_000_000, loaded=True).latent_frames == 12
    assert fitting_sizes(run, 1000) == Fit(None, None)


def test_a_size_beyond_reason_is_refused_at_once() -> None:
    run = replace(causvid(), width=100_000_000, height=80_000_000)
    started = time.perf_counter()
    with pytest.raises(InputError, match=r"what fits: --width \d+ --height \d+"):
        require(run, 12_000_000_000, "cuda", loaded=True)
    assert time.perf_counter() - started < 5


def test_a_refusal_says_what_for_how_much_is_free_and_what_fits() -> None:
    with pytest.raises(InputError) as caught:
        require(causvid(), 12_000_000_000, "cuda", loaded=True)
    text = str(caught.value)
    assert "832 x 480 needs 14.6 GB beside the weights" in text
    assert "6.04 GB for keys and values of earlier frames" in text
    assert "12.0 GB are free" in text
    assert "--width" in text
    assert "--frames 45" in text
    with pytest.raises(InputError, match="no size of this model"):
        require(causvid(), 1000, "cpu")
    require(causvid(), None, "mps")
    require(causvid(), 100_000_000_000, "cuda")


def test_free_memory_of_this_machine_is_known_on_linux() -> None:
    free = available(torch.device("cpu"))
    assert free is None or 0 < free < 1 << 50
    assert available(torch.device("meta")) is None


def test_a_pipeline_refuses_before_it_encodes_or_generates(
    new_wan: Callable[..., WanTransformer3DModel],
    new_vae: Callable[..., AutoencoderKLWan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = RandomText(8, 10)
    preset = CAUSVID.model_copy(update={"sampler": CAUSVID.sampler.model_copy(update={"window_frames": 3})})
    pipeline = VideoPipeline(CausalWan(new_wan()), new_vae(), text, preset)
    monkeypatch.setattr("nasa_video.video.pipeline.available", lambda device: 150_000)
    monkeypatch.setattr(RandomText, "__call__", lambda *_: pytest.fail("encoded before it was checked"))
    sizes = {"width": 64, "height": 32, "frames": 9}
    with pytest.raises(InputError, match=r"not enough memory on cpu: 64 x 32 needs .* what fits"):
        pipeline.stream("a ball", guidance=ClassifierFree(2.0), negative="blurry", **sizes)  # type: ignore[arg-type]
    monkeypatch.undo()
    chunks = pipeline.stream("a ball", negative="blurry", **sizes)  # type: ignore[arg-type]
    assert next(chunks).frames.shape == (9, 32, 64, 3)
