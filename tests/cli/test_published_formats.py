"""Small checkpoints in the true formats of CausVid, Self-Forcing, LongLive and Wan, through the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_wan import any_wan, preset_file, write_generator

from nasa_video.files.source import read_frames
from nasa_video.models.presets import configs_dir

Run = Callable[..., Any]


@pytest.mark.parametrize("form", ["causvid", "self-forcing", "flat", "krea"])
def test_every_published_form_makes_the_same_video(nasa_video: Run, parts: Path, tmp_path: Path, form: str) -> None:
    made = {}
    for name in ("causvid", form):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        preset = preset_file(folder, parts, original=form != "causvid", transformer=write_generator(name, folder))
        done = nasa_video("generate", "a fox", "--neg", "blurry", "--model", preset, "-o", f"{name}.mp4", "--json")
        assert done.status == 0, done.stderr
        assert done.json["effect"]["relative_change"] > 0.01
        made[name] = read_frames(f"{name}.mp4")
    assert (made["causvid"] == made[form]).all()


def test_wans_original_files_are_diffusers_layout(parts: Path) -> None:
    from causvid_adapter.vae_checkpoint import load_vae
    from nasa_video.text import Umt5Encoder

    folder, file = load_vae(parts / "vae"), load_vae(parts / "Wan2.1_VAE.pth")
    for name, value in folder.state_dict().items():
        assert torch.equal(value, file.state_dict()[name]), name
    texts = ["a red fox", ""]
    one = Umt5Encoder(parts / "text_encoder", parts / "tokenizer", 16)(texts)
    two = Umt5Encoder(parts / "models_t5_umt5-xxl-enc-bf16.pth", parts / "tokenizer", 16)(texts)
    torch.testing.assert_close(one.embeds, two.embeds, rtol=1e-5, atol=1e-5)
    assert torch.equal(one.lengths, two.lengths)
    assert one.embeds[0, int(one.lengths[0]) :].abs().max() == 0


def test_a_lora_acts_with_its_scale_and_comes_back_with_from(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for block in range(3):
        for name in ("q", "k", "v", "o"):
            for attention in ("self_attn", "cross_attn"):
                key = f"diffusion_model.blocks.{block}.{attention}.{name}"
                lora[f"{key}.lora_down.weight"] = torch.randn(4, 96, generator=generator)
                lora[f"{key}.lora_up.weight"] = torch.randn(96, 4, generator=generator) * 0.1
    save_file(lora, tmp_path / "style.safetensors")
    preset = preset_file(tmp_path, parts, original=False, transformer=write_generator("causvid", tmp_path))
    for output, option in (
        ("plain", []),
        ("full", ["--lora", "style.safetensors"]),
        ("half", ["--lora", "style.safetensors:0.5"]),
    ):
        assert nasa_video("generate", "a fox", *option, "--model", preset, "-o", f"{output}.mp4").status == 0
    videos = {name: read_frames(f"{name}.mp4").astype(int) for name in ("plain", "full", "half")}
    assert abs(videos["full"] - videos["plain"]).mean() > 0.2
    assert (videos["full"] != videos["half"]).any()
    nasa_video("generate", "--from", "half.mp4", "-o", "again.mp4")
    assert Path("again.mp4").read_bytes() == Path("half.mp4").read_bytes()


def test_a_presets_own_lora_is_part_of_it(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    state = {
        f"base_model.model.model.blocks.0.cross_attn.v.lora_{side}.default.weight": torch.randn(shape)
        for side, shape in (("A", (4, 96)), ("B", (96, 4)))
    }
    torch.save({"generator_lora": state}, tmp_path / "lora.pt")
    source = write_generator("causvid", tmp_path)
    for name, loras in (("with", [{"path": str(tmp_path / "lora.pt")}]), ("without", [])):
        preset = preset_file(tmp_path, parts, original=False, transformer=source, loras=loras)
        assert nasa_video("generate", "a fox", "--model", preset, "-o", f"{name}.mp4").status == 0
    assert (read_frames("with.mp4") != read_frames("without.mp4")).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "none.safetensors"], "LoRA file none.safetensors does not exist"),
        (["--lora", "none.safetensors:x"], "no scale"),
        (["--lora", "style.safetensors:nan"], "from -10 to 10"),
        (["--lora", "style.safetensors"], "holds no LoRA weights"),
    ],
)
def test_a_lora_that_cannot_be_used_is_refused(
    nasa_video: Run, parts: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "style.safetensors")
    preset = preset_file(tmp_path, parts, original=False, transformer=write_generator("causvid", tmp_path))
    done = nasa_video("generate", "a fox", *options, "--model", preset, "-o", "a.mp4")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())


def test_swapped_parts_are_named(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    swapped = preset_file(tmp_path, parts, original=True, transformer={"path": str(parts / "Wan2.1_VAE.pth")})
    assert "looks like a Wan VAE" in " ".join(nasa_video("generate", "x", "--model", swapped).stderr.split())
    source = write_generator("causvid", tmp_path)
    other = preset_file(tmp_path, parts, original=True, transformer=source, vae=source)
    assert "no Wan VAE: it looks like a Wan transformer" in " ".join(
        nasa_video("generate", "x", "--model", other).stderr.split()
    )


def test_the_tiny_decoder_makes_as_many_frames_from_the_same_latents(
    nasa_video: Run, parts: Path, tmp_path: Path
) -> None:
    from causvid_adapter.tiny_decoder import TinyDecoder

    torch.manual_seed(0)
    weights = TinyDecoder(16).state_dict()
    weights["decoder.22.weight"] *= 40  # untrained layers shrink what goes through them: make it visible
    weights["decoder.22.bias"] += 0.5
    torch.save(weights, tmp_path / "taew2_1.pth")
    source = write_generator("causvid", tmp_path)
    tiny = {"path": str(tmp_path / "taew2_1.pth")}
    for name, latents in (("normalized", "normalized"), ("raw", "raw")):
        preset = preset_file(tmp_path, parts, True, transformer=source, tiny_decoder={**tiny, "latents": latents})
        done = nasa_video("generate", "a fox", "--decoder", "tiny", "--model", preset, "-o", f"{name}.mp4", "--json")
        assert done.json["frames"] == 9
    assert nasa_video("generate", "a fox", "--model", preset, "-o", "full.mp4").status == 0
    videos = {name: read_frames(f"{name}.mp4").astype(int) for name in ("normalized", "raw", "full")}
    assert len({video.shape for video in videos.values()}) == 1
    assert abs(videos["normalized"] - videos["raw"]).mean() > 1
    assert nasa_video("generate", "--from", "raw.mp4", "-o", "again.mp4").status == 0
    assert Path("again.mp4").read_bytes() == Path("raw.mp4").read_bytes()
    assert nasa_video("generate", "--from", "raw.mp4", "--decoder", "full", "-o", "other.mp4").status == 0
    assert np.array_equal(read_frames("other.mp4"), videos["full"])
    without = preset_file(tmp_path, parts, True, transformer=source)
    for option, message in (("tiny", "has no tiny decoder"), ("huge", "must be full or tiny")):
        done = nasa_video("generate", "a fox", "--decoder", option, "--model", without)
        assert message in done.stderr


@pytest.fixture
def wan_folder(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The published VAE, text encoder and tokenizer, where NASA_VIDEO_MODELS says."""
    folder = tmp_path / "models" / "Wan-AI"
    folder.mkdir(parents=True)
    (folder / "Wan2.1-T2V-1.3B-Diffusers").symlink_to(parts)
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(folder.parent))
    return folder


@pytest.mark.parametrize("form", ["flat.safetensors", "generator.pt"])
def test_any_causal_wan_runs_from_its_file_alone(nasa_video: Run, wan_folder: Path, tmp_path: Path, form: str) -> None:
    path = tmp_path / form
    if path.suffix == ".pt":
        torch.save({"generator": {f"model.{name}": value for name, value in any_wan().items()}}, path)
    else:
        save_file(any_wan(), path)
    check = nasa_video("models", "check", str(path), "--width", "32", "--height", "16", "--json")
    assert check.status == 0, check.stderr
    # Two heads of 128 and three layers, read off the tensors.
    assert check.json["memory"]["history"] == 21 * 2 * 2 * 3 * 256 * 4
    sizes = ("--width", "32", "--height", "16", "--frames", "9")
    done = nasa_video("generate", "a fox", "--neg", "blurry", "--model", str(path), *sizes, "-o", "a.mp4", "--json")
    assert done.status == 0, done.stderr
    assert done.json["frames"] == 9
    assert done.json["effect"]["relative_change"] > 0.01
    assert nasa_video("generate", "--from", "a.mp4", "-o", "b.mp4").status == 0
    assert Path("a.mp4").read_bytes() == Path("b.mp4").read_bytes()


def test_14b_and_wan_22_are_known_by_their_tensors(tmp_path: Path) -> None:
    from nasa_video.models.part_sizes import vae_config
    from nasa_video.models.presets import find_preset

    save_file(any_wan(in_channels=48, out_channels=48), tmp_path / "wan22.safetensors")
    preset = find_preset(tmp_path / "wan22.safetensors")
    assert preset.components.vae.repo == "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    assert (preset.video.width, preset.video.height) == (1280, 704)
    assert vae_config(preset, 48)["scale_factor_spatial"] == 16
    assert preset.components.tiny_decoder is None
    krea = find_preset("krea-14b").components.config
    assert krea is not None
    assert (krea["num_attention_heads"], krea["num_layers"], krea["ffn_dim"]) == (40, 40, 13824)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"in_channels": 36}, "image-to-video generator"),
        ({"in_channels": 20, "out_channels": 20}, "works on 20 latent channels, the published VAEs on 16 or 48"),
    ],
)
def test_a_generator_that_this_loop_cannot_feed_is_refused(
    nasa_video: Run, tmp_path: Path, widths: dict[str, int], message: str
) -> None:
    save_file(any_wan(**widths), tmp_path / "other.safetensors")
    done = nasa_video("generate", "a fox", "--model", str(tmp_path / "other.safetensors"), "-o", "a.mp4")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())


def test_a_checkpoint_that_is_none_is_named(nasa_video: Run, parts: Path, tmp_path: Path) -> None:
    done = nasa_video("generate", "a fox", "--model", str(parts / "Wan2.1_VAE.pth"))
    assert "no Wan generator: it looks like a Wan VAE" in " ".join(done.stderr.split())
    assert "no such file" in nasa_video("generate", "a fox", "--model", "none.safetensors").stderr


@pytest.mark.parametrize("form", ["causvid", "self-forcing"])
def test_training_starts_from_a_published_form(nasa_video: Run, parts: Path, tmp_path: Path, form: str) -> None:
    """NASA-T by adapters, as configs/train has it: from a generator of this form, against a teacher of Wan's."""
    source = write_generator(form, tmp_path)
    preset = preset_file(tmp_path, parts, original=True, transformer=source)
    shipped = yaml.safe_load((configs_dir() / "train" / f"nasa-t-{form}.yaml").read_text())
    shipped |= {"student": preset, "teacher": source, "step_counts": [2], "latent_frames": 6, "fake_warmup": 0}
    for name in ("student_lora", "fake_lora"):
        shipped[name] |= {"rank": 2, "scaling": 2}
    shipped["run"] |= {"iterations": 2, "accumulate": 1, "shard": False, "sheet_samples": 1}
    shipped["student_optimiser"]["rate"] = 1e-2
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(shipped))
    (tmp_path / "prompts.txt").write_text("a red fox\na cat\n")
    (tmp_path / "negatives.txt").write_text("fog\nrain\n")
    lists = ("--prompts", "prompts.txt", "--negatives", "negatives.txt")
    done = nasa_video("train", "own.yaml", "-o", "run", *lists, "--cpu")
    assert done.status == 0, done.stderr
    assert Path("run/sheets/000002.png").exists()
    for output, model in (("before", preset), ("after", "run/model")):
        done = nasa_video("generate", "a fox", "--neg", "fog", "--model", model, "-o", f"{output}.mp4")
        assert done.status == 0, done.stderr
    assert (read_frames("before.mp4") != read_frames("after.mp4")).any()
