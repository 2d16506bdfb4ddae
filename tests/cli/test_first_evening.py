"""What a user tries first with weights of their own: pull, check, generate without a network, in every layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_server import Hub, serving
from safetensors.torch import save_file
from tiny_wan import any_wan, preset_file, write_generator, write_transformer, write_wan22_vae

from nasa_video.files.source import read_frames
from nasa_video.models.stored import MODELS_FOLDER

Run = Callable[..., Any]
SMALL = ("--width", "32", "--height", "16", "--frames", "9")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(Hub(), tmp_path / "cache", monkeypatch) as hub:
        yield hub


def test_what_was_pulled_runs_without_a_network(nasa_video: Run, parts: Path, hub: Hub, tmp_path: Path) -> None:
    hub.add("me/wan", parts)
    published = tmp_path / "published"
    published.mkdir()
    write_generator("self-forcing", published)
    hub.add("me/generator", published)
    text = {"kind": "umt5", "repo": "me/wan", "folder": "text_encoder", "max_tokens": 16}
    preset = preset_file(
        tmp_path, parts, False,
        transformer={"repo": "me/generator", "file": "model.pt"}, vae={"repo": "me/wan", "folder": "vae"},
        text_encoder=text,
    )  # fmt: skip
    assert len(nasa_video("models", "check", preset, "--json").json["missing"]) == 4
    done = nasa_video("models", "pull", preset, "--yes", "--mirror", hub.url)
    assert done.status == 0, done.stderr
    assert nasa_video("models", "check", preset, "--json").json["missing"] == []
    seen = len(hub.requests)
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": hub.url}
    command = [sys.executable, "-m", "nasa_video", "generate", "a fox", "--neg", "blurry", "--model", preset]
    ran = subprocess.run([*command, "-o", "a.mp4"], env=os.environ | offline, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert len(read_frames("a.mp4")) == 9
    assert len(hub.requests) == seen, "nothing was asked of the network"


def test_a_hub_id_is_planned_before_its_weights_come(
    nasa_video: Run, parts: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_transformer(tmp_path / "published")
    hub.add("me/causal", tmp_path / "published")
    hub.add("me/causal", parts)
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: 1_000_000)
    words = ("generate", "a fox", "--neg", "blurry", "--model", "me/causal", *SMALL, "-o", "a.mp4")
    done = nasa_video(*words)
    assert done.status == 1
    assert "not enough memory on cpu" in done.stderr
    fetched = {
        request.split("/")[-1] for request in hub.requests if request.startswith("GET") and "/resolve/" in request
    }
    assert fetched <= {"config.json"}, "nothing but configs was downloaded"
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: 10_000_000_000)
    done = nasa_video(*words)
    assert done.status == 0, done.stderr
    # The same weights, in a folder.
    for name in ("vae", "text_encoder", "tokenizer"):
        (tmp_path / "published" / name).symlink_to(parts / name)
    done = nasa_video(*words[:5], str(tmp_path / "published"), *SMALL, "-o", "b.mp4")
    assert done.status == 0, done.stderr
    assert np.array_equal(read_frames("a.mp4"), read_frames("b.mp4"))


def test_wans_original_folder_serves_where_it_is(
    nasa_video: Run, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(any_wan(), tmp_path / "generator.safetensors")
    made = {}
    for layout in ("diffusers", "original"):
        root = tmp_path / layout
        if layout == "diffusers":
            (root / "Wan-AI").mkdir(parents=True)
            (root / "Wan-AI" / "Wan2.1-T2V-1.3B-Diffusers").symlink_to(parts)
        else:
            # As the public code wants it: wan_models/Wan2.1-T2V-1.3B with Wan's own files.
            folder = root / "Wan2.1-T2V-1.3B"
            (folder / "google").mkdir(parents=True)
            for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"):
                (folder / name).symlink_to(parts / name)
            (folder / "google" / "umt5-xxl").symlink_to(parts / "tokenizer")
        monkeypatch.setenv(MODELS_FOLDER, str(root))
        words = ("generate", "a fox", "--model", "generator.safetensors", *SMALL, "-o", f"{layout}.mp4")
        done = nasa_video(*words)
        assert done.status == 0, done.stderr
        made[layout] = read_frames(f"{layout}.mp4").astype(int)
    assert np.abs(made["diffusers"] - made["original"]).max() <= 2  # the original's text encoder rounds elsewhere


def test_wan_22_with_its_own_vae_makes_a_video(
    nasa_video: Run, parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "models" / "Wan-AI"
    folder.mkdir(parents=True)
    (folder / "Wan2.1-T2V-1.3B-Diffusers").symlink_to(parts)
    write_wan22_vae(folder / "Wan2.2-TI2V-5B-Diffusers" / "vae")
    monkeypatch.setenv(MODELS_FOLDER, str(folder.parent))
    save_file(any_wan(in_channels=48, out_channels=48), tmp_path / "wan22.safetensors")
    sizes = ("--width", "64", "--height", "32", "--frames", "21")
    words = ("generate", "a fox", "--neg", "blurry", "--model", "wan22.safetensors", *sizes, "-o", "a.mp4", "--json")
    done = nasa_video(*words)
    assert done.status == 0, done.stderr
    assert done.json["effect"]["relative_change"] > 0.01
    assert read_frames("a.mp4").shape == (21, 32, 64, 3)


def test_a_lora_is_the_same_in_every_naming(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files: dict[str, dict[str, torch.Tensor]] = {"comfy": {}, "kohya": {}, "diffusers": {}, "peft": {}}
    for block in range(3):
        for wan, name in (("self_attn.q", "attn1.to_q"), ("cross_attn.v", "attn2.to_v")):
            down, up = torch.randn(4, 96, generator=generator), torch.randn(96, 4, generator=generator) * 0.1
            for naming, stem in (
                ("comfy", f"diffusion_model.blocks.{block}.{wan}"),
                ("kohya", f"lora_unet_blocks_{block}_{wan.replace('.', '_')}"),
            ):
                files[naming] |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
                files[naming][f"{stem}.alpha"] = torch.tensor(4.0)
            files["diffusers"][f"transformer.blocks.{block}.{name}.lora_A.weight"] = down
            files["diffusers"][f"transformer.blocks.{block}.{name}.lora_B.weight"] = up
            for side, value in (("A", down), ("B", up)):
                files["peft"][f"base_model.model.model.blocks.{block}.{wan}.lora_{side}.default.weight"] = value
    preset = preset_file(tmp_path, parts, False, transformer=write_generator("causvid", tmp_path))
    made = {"none": ()} | {naming: ("--lora", f"{naming}.safetensors:0.8") for naming in files}
    for naming, state in files.items():
        save_file({name: value.clone() for name, value in state.items()}, f"{naming}.safetensors")
    videos = {}
    for naming, option in made.items():
        done = nasa_video("generate", "a fox", *option, "--model", preset, "-o", f"{naming}.mp4")
        assert done.status == 0, done.stderr
        videos[naming] = read_frames(f"{naming}.mp4").astype(int)
    for naming in files:
        assert np.abs(videos[naming] - videos["comfy"]).max() <= 1
    assert np.abs(videos["comfy"] - videos["none"]).mean() > 0.2


def test_offloaded_is_resident_through_the_command_line(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    preset = preset_file(tmp_path, parts, False, transformer=write_generator("causvid", tmp_path))
    words = ("generate", "a fox", "--neg", "blurry", "--model", preset, "--frames", "21")
    for name, option in (("resident", "--no-offload"), ("offloaded", "--offload")):
        done = nasa_video(*words, option, "-o", f"{name}/")
        assert done.status == 0, done.stderr
    pictures = sorted(path.name for path in Path("resident").glob("*.png"))
    assert len(pictures) == 21
    assert all(Path("resident", n).read_bytes() == Path("offloaded", n).read_bytes() for n in pictures)
