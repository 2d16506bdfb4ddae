"""``nasa-video train`` from files on a disk to a model that the other commands take; nothing is stubbed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderTiny, PixArtTransformer2DModel, UNet2DConditionModel
from transformers import CLIPConfig, CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

Run = Callable[..., Any]
OPTIMISERS = {name: {"rate": 1e-3} for name in ("student_optimiser", "fake_optimiser")}


def write_config(path: Path, prompts: str, negatives: str, **settings: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for name, text in (("prompts", prompts), ("negatives", negatives)):
        (path.parent / f"{name}.txt").write_text(text)
    run = {
        "iterations": 2, "batch_size": 2, "precision": "fp32", "checkpoint_every": 1, "sheet_every": 1,
        "sheet_samples": 2, "draw_every": 1,
    }  # fmt: skip
    data = {
        "title": "tiny",
        "prompts": {"kind": "file", "path": str(path.parent / "prompts.txt")},
        "negatives": {
            "placement": "student+teacher", "texts": {"kind": "file", "path": str(path.parent / "negatives.txt")},
        },
        "run": run,
        **OPTIMISERS,
        **settings,
    }  # fmt: skip
    path.write_text(yaml.safe_dump(data))
    return path


def curves(run: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in Path(run, "curves.jsonl").read_text().splitlines()]


def tensorboard(run: str, name: str) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(f"{run}/tensorboard")
    board.Reload()
    assert {event.step for event in board.Images("samples")} >= {1, 2}
    return {event.step: event.value for event in board.Scalars(name)}


@pytest.mark.slow
def test_a_video_model_from_its_folder(nasa_video: Run, model_folder: Path, tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "own.yaml", "a red ball\na blue star\n# left out\n", "blurry\nsnow, dark background\n",
        kind="video", student=str(model_folder), teacher={"path": str(model_folder / "transformer")},
        step_counts=[1, 2], latent_frames=6, fake_updates=1,
    )  # fmt: skip
    done = nasa_video("train", str(config), "-o", "run", "--cpu", "--json")
    assert done.status == 0, done.stderr
    assert done.json == {"model": "run/model", "iterations": 2}
    assert Path("run/prompts.txt").read_text() == "a red ball\na blue star\n"
    assert Path("run/negatives.txt").read_text() == "blurry\nsnow, dark background\n"
    assert Path("run/curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(Path("run/sheets").glob("*.png"))] == ["000001.png", "000002.png"]
    assert "without: " in Path("run/sheets/000002.txt").read_text()
    first = curves("run")
    assert [row["step"] for row in first] == [1, 2]
    assert tensorboard("run", "motion") == pytest.approx({row["step"]: row["motion"] for row in first})

    done = nasa_video("train", str(config), "-o", "run", "--cpu", "--iterations", "3")
    assert done.status == 0, done.stderr
    assert curves("run")[:2] == first
    assert [row["step"] for row in curves("run")] == [1, 2, 3]

    done = nasa_video("generate", "a red ball", "--neg", "blurry", "--model", "run/model", "-o", "ball.mp4", "--json")
    assert done.status == 0, done.stderr
    assert done.json["effect"]["relative_change"] > 0

    Path("other.txt").write_text("sepia\n")
    done = nasa_video("train", str(config), "-o", "run", "--cpu", "--negatives", "other.txt")
    assert done.status == 1
    assert "choose another folder" in done.stderr
    done = nasa_video("train", str(config), "-o", "context", "--cpu", "--shard")
    assert done.status == 1
    assert "several processes" in done.stderr
    assert "--no-shard" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd", "pixart"])
def test_an_image_model_from_its_pipeline(nasa_video: Run, tmp_path: Path, family: str) -> None:
    tiny.PIPES[family]().save_pretrained(tmp_path / "teacher")
    settings: dict[str, Any] = {"max_tokens": {"sd": 16, "pixart": 12}[family], "text_dim": tiny.TEXT_DIM}
    if family == "sd":
        settings["clip"] = _clip(tmp_path) | {"margin": 0.9}
    config = write_config(
        tmp_path / "own.yaml", "a fox\na cat\n", "rain\nfog\n", kind="image", family=family,
        teacher=str(tmp_path / "teacher"), size=64, lora={"rank": 2, "scaling": 4}, **settings,
    )  # fmt: skip
    done = nasa_video("train", str(config), "-o", "run", "--cpu")
    assert done.status == 0, done.stderr
    rows = curves("run")
    assert all(row["direction"] > 0 and row["effect"] > 0 for row in rows)
    assert ("clip" in rows[0]) == (family == "sd")
    assert tensorboard("run", "fake") == pytest.approx({row["step"]: row["fake"] for row in rows})
    name, model = {"sd": ("unet", UNet2DConditionModel), "pixart": ("transformer", PixArtTransformer2DModel)}[family]
    before, after = (
        dict(model.from_pretrained(place, subfolder=name).named_parameters())
        for place in (tmp_path / "teacher", "run/model")
    )
    assert before.keys() == after.keys()
    assert any(not torch.equal(value, before[key]) for key, value in after.items())
    if family == "sd":
        done = nasa_video(
            "image", "a fox", "--neg", "rain", "--model", "sbv2-sd15", "--base", str(tmp_path / "teacher"),
            "--weights", "run/model/unet", "--width", "64", "--height", "64", "-o", "fox.png", "--json",
        )  # fmt: skip
        assert done.status == 0, done.stderr
        assert Path("fox.png").exists()

    config.write_text(config.read_text() + "prediction: v_prediction\n")
    done = nasa_video("train", str(config), "-o", "other", "--cpu")
    assert done.status == 1
    assert "predicts epsilon" in done.stderr
    config.write_text(config.read_text().replace(str(tmp_path / "teacher"), str(tmp_path / "nowhere")))
    done = nasa_video("train", str(config), "-o", "other", "--cpu")
    assert done.status == 1
    assert "could not be loaded" in done.stderr


def _clip(folder: Path) -> dict[str, str]:
    """A small CLIP with the tiny pipelines' letters, and a small decoder; their places."""
    tokenizer = tiny.clip_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {
        **sizes, "vocab_size": len(tokenizer), "max_position_embeddings": 77, "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }  # fmt: skip
    config = CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, num_decoder_blocks=(1, 1, 1, 1),
        num_encoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder / "decoder")  # fmt: skip
    return {"model": str(folder / "clip"), "decoder": str(folder / "decoder")}
