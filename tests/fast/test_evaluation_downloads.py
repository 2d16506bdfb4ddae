"""Nothing is downloaded before it was said what it is, how large, and under which licence."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import checkpoint_hash
from nasa_video.evaluation.benchmarks.hpsv2 import HPS_ASSETS
from nasa_video.evaluation.samples import image_checkpoint
from nasa_video.images.presets import find_image_preset
from nasa_video.models.presets import find_preset


@pytest.fixture
def said_first(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path) -> list[str]:
    """What had been said when the network was first asked; nothing is on this machine, and nothing can be had."""
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(tmp_path))
    said: list[str] = []

    def refuse(*_: Any, **__: Any) -> str:
        if not said:
            said.extend(record.getMessage() for record in caplog.records)
        raise OSError("no network")

    caplog.set_level(logging.WARNING)
    for place in ("nasa_video.evaluation.assets", "huggingface_hub"):
        monkeypatch.setattr(f"{place}.hf_hub_download", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    for place in ("nasa_video.evaluation.assets", "huggingface_hub"):
        monkeypatch.setattr(f"{place}.try_to_load_from_cache", lambda *_, **__: None)
    return said


def test_a_video_models_parts_are_named_before_the_first_is_asked_for(said_first: list[str]) -> None:
    preset = find_preset("self-forcing")
    with pytest.raises(InputError, match="could not be downloaded"):
        checkpoint_hash(preset)
    assert len(said_first) >= len({*preset.needs}) > 1
    for need in preset.needs:
        assert any(need in line for line in said_first)
    assert all(preset.licence in line for line in said_first)


def test_an_image_models_parts_are_named_before_they_are_asked_for(said_first: list[str]) -> None:
    preset = find_image_preset("dmd2-sdxl-4step")
    with pytest.raises(InputError, match="could not be downloaded"):
        image_checkpoint(preset, None, None)
    assert len(said_first) == len(preset.needs) == 2
    assert all(need in line for need, line in zip(preset.needs, said_first, strict=True))
    assert all(preset.licence in line for line in said_first)


def test_a_scorer_is_named_before_it_is_asked_for(said_first: list[str]) -> None:
    with pytest.raises(InputError, match="--checkpoint"):
        HPS_ASSETS["v2"].fetch("--checkpoint FILE")
    assert "1.97 GB" in said_first[0]
    assert "Apache-2.0" in said_first[0]


def test_what_is_here_is_not_spoken_of(said_first: list[str], tmp_path: Path, caplog: Any) -> None:
    here = tmp_path / "xswu" / "HPSv2" / "HPS_v2_compressed.pt"
    here.parent.mkdir(parents=True)
    here.write_text("weights")
    assert HPS_ASSETS["v2"].fetch("--checkpoint FILE") == here
    assert not caplog.records
    assert not said_first
