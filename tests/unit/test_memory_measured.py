"""The plan against the true peak of a run, in a process of its own (docs/memory.md has the same at CausVid's size)."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import AutoencoderKLWan

from nasa_video.models import configs_dir

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def script() -> Any:
    spec = importlib.util.spec_from_file_location("measure_memory", ROOT / "scripts" / "measure_memory.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure_memory"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_plan_is_near_the_measured_peak(tmp_path: Path) -> None:
    AutoencoderKLWan(base_dim=48).save_pretrained(tmp_path / "vae")
    data = yaml.safe_load((configs_dir() / "video" / "causvid.yaml").read_text())
    data["components"]["transformer"] = {"path": str(tmp_path / "none.pt")}
    data["components"]["vae"] = {"path": str(tmp_path / "vae")}
    data["components"]["config"] |= {"num_attention_heads": 4, "ffn_dim": 2048, "num_layers": 12}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(data))
    measuring = script()
    wanted = measuring.Wanted(str(tmp_path / "small.yaml"), 208, 112, 21, dtype="float32")
    result = measuring.measure(wanted)
    assert result["measured"]["peak"] > 300_000_000, "large enough to measure"
    assert result["ratio"] == pytest.approx(1, abs=0.12)
    assert result["planned"]["weights"] == pytest.approx(result["measured"]["weights"], rel=0.05)
