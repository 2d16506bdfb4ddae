"""Agreement with numbers measured once by running the public CausVid and Self-Forcing code; see data/README.md."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, load_generator
from causvid_adapter.noise import GivenNoise
from causvid_adapter.window import Window

DATA = Path(__file__).parent / "data"
META = json.loads((DATA / "meta.json").read_text())
WEIGHTS = load_file(DATA / "causvid_generator.safetensors")
CAUSVID = load_file(DATA / "causvid_reference.safetensors")
SELF_FORCING = load_file(DATA / "self_forcing_reference.safetensors")
TOLERANCE = 1e-5

Distance = Callable[[Tensor, Tensor], float]


class RecordedNoise:
    """The renoise of the reference, (chunk, step, B, frames, C, H, W)."""

    def __init__(self, renoise: Tensor, frames_per_chunk: int) -> None:
        self.renoise = renoise
        self.frames_per_chunk = frames_per_chunk

    def __call__(self, frames: range, step: int) -> Tensor:
        return self.renoise[frames.start // self.frames_per_chunk, step - 1]


@pytest.fixture
def model() -> CausalWan:
    return load_generator(DATA / "causvid_generator.safetensors", META["config"])


def causvid_sampler(model: CausalWan) -> ChunkSampler:
    return ChunkSampler(model, FlowMatchSchedule(META["timestep_shift"], META["steps"]), META["frames_per_chunk"])


def causvid_noise() -> GivenNoise:
    return GivenNoise(CAUSVID["noise"], RecordedNoise(CAUSVID["rollout.renoise"], META["frames_per_chunk"]))


def test_masked_pass_with_a_timestep_a_frame(model: CausalWan, distance: Distance) -> None:
    flow = model(
        CAUSVID["noise"],
        CAUSVID["masked.timestep"],
        CAUSVID["prompt_embeds"],
        frames_per_chunk=META["frames_per_chunk"],
    )
    assert distance(flow, CAUSVID["masked.flow"]) < TOLERANCE


def test_rollout_latents_and_first_flow_of_the_second_chunk(model: CausalWan, distance: Distance) -> None:
    flows: list[Tensor] = []
    model.register_forward_hook(lambda module, given, flow: flows.append(flow))
    latents = torch.cat(list(causvid_sampler(model).stream(CAUSVID["prompt_embeds"], causvid_noise())), dim=1)
    assert distance(latents, CAUSVID["rollout.latents"]) < TOLERANCE
    calls_of_a_chunk = len(META["steps"]) + 1
    assert distance(flows[calls_of_a_chunk], CAUSVID["rollout.chunk1_step0_flow"]) < TOLERANCE


def test_caches_at_the_end_of_the_rollout(model: CausalWan, distance: Distance) -> None:
    frames, size = CAUSVID["rollout.latents"].shape[1], META["frames_per_chunk"]
    cache = model.new_cache(*CAUSVID["noise"].shape[-2:])
    for chunk in CAUSVID["rollout.latents"].split(size, dim=1):
        model(chunk, 0.0, CAUSVID["prompt_embeds"], cache=cache)
        cache.commit()
    assert cache.frames_held == frames
    assert distance(cache.history(0)[0], CAUSVID["rollout.kv0_k"]) < TOLERANCE
    assert distance(cache.history(model.num_layers - 1)[1], CAUSVID["rollout.kv_last_v"]) < TOLERANCE


def test_self_forcing_with_a_rolling_window_and_a_sink(model: CausalWan, distance: Distance) -> None:
    meta, size = META["self_forcing"], META["frames_per_chunk"]
    schedule = FlowMatchSchedule(meta["timestep_shift"], meta["steps"], warp=True)
    assert schedule.timesteps == pytest.approx(meta["warped_timesteps"], abs=1e-3)
    sampler = ChunkSampler(model, schedule, size, Window(meta["local_attn_size"], meta["sink_size"]))
    noise = GivenNoise(SELF_FORCING["noise"], RecordedNoise(SELF_FORCING["renoise"], size))
    latents = torch.cat(list(sampler.stream(SELF_FORCING["prompt_embeds"], noise)), dim=1)
    assert distance(latents, SELF_FORCING["latents"]) < TOLERANCE


def wrapped(name: str) -> str:
    """A name as FSDP, activation checkpointing and compile leave it."""
    name = name.replace("model.", "model._fsdp_wrapped_module._orig_mod.", 1)
    return name.replace("blocks.1.", "blocks.1._checkpoint_wrapped_module._fsdp_wrapped_module.")


def save_causvid(folder: Path) -> Path:
    torch.save({"generator": WEIGHTS}, folder / "model.pt")
    return folder / "model.pt"


def save_self_forcing(folder: Path) -> Path:
    stale = {name: value + 1 for name, value in WEIGHTS.items()}
    ema = {wrapped(name): value for name, value in WEIGHTS.items()}
    torch.save({"generator": stale, "generator_ema": ema, "step": 600}, folder / "self_forcing_dmd.pt")
    return folder / "self_forcing_dmd.pt"


def save_old_format(folder: Path) -> Path:
    torch.save({"generator": WEIGHTS}, folder / "old.pt", _use_new_zipfile_serialization=False)
    return folder / "old.pt"


def save_flat(folder: Path) -> Path:
    save_file({name.removeprefix("model."): value for name, value in WEIGHTS.items()}, folder / "flat.safetensors")
    return folder / "flat.safetensors"


def save_misnamed(folder: Path) -> Path:
    return save_flat(folder).rename(folder / "safetensors.pt")


def save_diffusers_names(folder: Path) -> Path:
    transformer = load_generator(DATA / "causvid_generator.safetensors", META["config"]).transformer
    save_file(transformer.state_dict(), folder / "diffusers.safetensors")
    return folder / "diffusers.safetensors"


def save_folder(folder: Path) -> Path:
    load_generator(DATA / "causvid_generator.safetensors", META["config"]).transformer.save_pretrained(folder / "wan")
    return folder / "wan"


def save_pipeline_folder(folder: Path) -> Path:
    transformer = load_generator(DATA / "causvid_generator.safetensors", META["config"]).transformer
    transformer.save_pretrained(folder / "pipeline" / "transformer")
    return folder / "pipeline"


@pytest.mark.parametrize(
    "save",
    [
        save_causvid,
        save_self_forcing,
        save_old_format,
        save_flat,
        save_misnamed,
        save_diffusers_names,
        save_folder,
        save_pipeline_folder,
    ],
)
def test_every_format_loads_to_the_same_model(
    save: Callable[[Path], Path], tmp_path: Path, model: CausalWan, distance: Distance
) -> None:
    loaded = load_generator(save(tmp_path), META["config"])
    inputs = (CAUSVID["noise"], CAUSVID["masked.timestep"], CAUSVID["prompt_embeds"])
    flow = loaded(*inputs, frames_per_chunk=META["frames_per_chunk"])
    assert torch.equal(flow, model(*inputs, frames_per_chunk=META["frames_per_chunk"]))
    assert distance(flow, CAUSVID["masked.flow"]) < TOLERANCE
