"""On a CUDA device: resumed, offloaded, decoded beside and compiled videos are the plain one, and the plan holds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nasa_video import Nasa, VideoPipeline
from nasa_video.bench.random_model import RandomText, random_generator, random_vae
from nasa_video.models.memory_estimate import estimate
from nasa_video.models.memory_plan import PlanRequest, make_plan
from nasa_video.models.part_sizes import transformer_config, vae_config
from nasa_video.models.placement import Placement
from nasa_video.models.presets import find_preset
from nasa_video.video.engine import InitialLatents

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SETTINGS: dict[str, Any] = {"frames": 57, "negative": "red", "guidance": Nasa(0.5), "seed": 3}


@pytest.fixture
def load(model_folder: Path) -> Callable[..., VideoPipeline]:
    def load(**options: Any) -> VideoPipeline:
        return VideoPipeline.from_pretrained(str(model_folder), device="cuda", dtype=torch.float32, **options)

    return load


def frames_of(pipeline: VideoPipeline, **changes: Any) -> np.ndarray[Any, Any]:
    return np.concatenate([chunk.frames for chunk in pipeline.stream("a red star", **{**SETTINGS, **changes})])


@pytest.mark.parametrize("ahead", [0, 1])
@pytest.mark.parametrize("rollout", [0, 33])
def test_latents_from_disk_go_on_to_the_same_frames(
    load: Callable[..., VideoPipeline], ahead: int, rollout: int
) -> None:
    pipeline = load(decode_ahead=ahead)
    chunks = list(pipeline.stream("a red star", rollout=rollout, **SETTINGS))
    prefix = torch.cat([chunk.latents for chunk in chunks[:3]], dim=1).cpu()
    resumed = frames_of(pipeline, start=InitialLatents(prefix, shown_context=9), rollout=rollout)
    assert np.array_equal(resumed, np.concatenate([chunk.frames for chunk in chunks]))


def test_offloaded_is_resident(load: Callable[..., VideoPipeline]) -> None:
    assert np.array_equal(frames_of(load(placement=Placement(offload=True))), frames_of(load()))


@pytest.mark.parametrize("kind", ["on", "graphs"])
def test_compiled_is_eager(load: Callable[..., VideoPipeline], kind: str) -> None:
    eager, compiled = frames_of(load()), frames_of(load(compiled=kind))
    # Fused kernels round elsewhere.
    assert np.abs(eager.astype(int) - compiled).mean() < 1


@pytest.mark.parametrize("size", [(416, 240), (832, 480)])
def test_the_plan_is_within_a_tenth_of_the_peak_at_true_size(size: tuple[int, int]) -> None:
    preset = find_preset("causvid")
    config, vae = transformer_config(preset), vae_config(preset, 16)
    assert config is not None
    steps = {1: (1000.0,)}
    preset = preset.model_copy(
        update={"sampler": preset.sampler.model_copy(update={"steps": steps, "default_steps": 1})}
    )
    model = random_generator(config, dtype=torch.bfloat16, device="cuda")
    text = RandomText(preset.components.text_encoder.max_tokens, config["text_dim"])
    pipeline = VideoPipeline(model, random_vae(vae, device="cuda"), text, preset)
    torch.cuda.reset_peak_memory_stats()
    for _ in pipeline.stream("a red fox in the snow", width=size[0], height=size[1], frames=33):
        pass
    request = PlanRequest(*size, frames=33, prompts=())
    plan = make_plan(preset, torch.device("cuda"), torch.bfloat16, request)
    assert plan is not None
    planned = estimate(replace(plan.run, text_encoder=0)).peak
    assert planned == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.1)
