"""Bringing a model from a hub: a small server on this machine speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import AutoencoderKLWan
from hub_server import Hub, serving

from nasa_video.errors import InputError
from nasa_video.models import download as downloads
from nasa_video.models.presets import configs_dir, parse_preset
from nasa_video.models.stored import MODELS_FOLDER

Run = Callable[..., Any]
TINY = "lightx2v/Autoencoders/taew2_1.pth"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the true files' names and small contents, and an empty cache."""
    hub = Hub()
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    for name in ("vae/config.json", "vae/w.safetensors", "text_encoder/config.json", "text_encoder/w.safetensors",
                 "text_encoder/w.bin", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json",
                 "README.md"):  # fmt: skip
        hub.files[f"{wan}/{name}"] = name.encode() * 50
    hub.files[f"{wan}/vae/config.json"] = json.dumps(dict(AutoencoderKLWan(base_dim=4).config)).encode()
    hub.files["gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"] = bytes(range(256)) * 4000
    hub.files[TINY] = b"tiny" * 50
    with serving(hub, tmp_path / "cache", monkeypatch):
        yield hub


def test_pull_says_size_and_licence_and_asks_first(nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("typer.confirm", lambda text: False)
    done = nasa_video("models", "pull", "self-forcing", "--mirror", hub.url, "--to", "here")
    assert done.status == 1
    assert "Licence: Apache-2.0" in done.stderr
    assert "checkpoints/self_forcing_dmd.pt" in done.stderr
    assert not Path("here").exists()


def test_pull_brings_what_is_needed_and_never_asks_again(
    nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 0, done.stderr
    folder = Path("here/Wan-AI/Wan2.1-T2V-1.3B-Diffusers")
    assert (folder / "vae/w.safetensors").read_bytes() == b"vae/w.safetensors" * 50
    assert not (folder / "text_encoder/w.bin").exists(), "the pickled copy is left out"
    assert not (folder / "README.md").exists()
    monkeypatch.setenv(MODELS_FOLDER, "here")
    seen = len(hub.requests)
    assert nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url).status == 0
    rows = {row["name"]: row for row in nasa_video("models", "--json").json}
    assert rows["self-forcing"]["present"] is True
    assert nasa_video("models", "check", "self-forcing", "--json").json["missing"] == []
    assert len(hub.requests) == seen, "nothing was asked of the network"


def test_a_broken_download_is_resumed(nasa_video: Run, hub: Hub) -> None:
    hub.cut_once = "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    if done.status != 0:  # where the client itself gave up, the next call goes on
        done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 0, done.stderr
    assert hub.ranges, "the second half was asked for, not the whole"
    assert Path("here", "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt").stat().st_size == 256 * 4000


def test_half_a_folder_is_no_model_and_is_completed(nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers/text_encoder"
    index = {"weight_map": {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}}
    del hub.files[f"{wan}/w.safetensors"]
    hub.files[f"{wan}/m.safetensors.index.json"] = json.dumps(index).encode()
    for part in index["weight_map"].values():
        hub.files[f"{wan}/{part}"] = part.encode() * 50
    # The second half arrives damaged: config and first half are there, the rest is not.
    hub.damage = f"{wan}/m-00002-of-00002.safetensors"
    monkeypatch.setenv(MODELS_FOLDER, "here")
    words = ("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert nasa_video(*words).status == 1
    assert Path("here", wan, "m-00001-of-00002.safetensors").exists()
    assert any(wan in part for part in nasa_video("models", "check", "self-forcing", "--json").json["missing"])
    hub.damage = None
    assert nasa_video(*words).status == 0
    assert nasa_video("models", "check", "self-forcing", "--json").json["missing"] == []
    first = [r for r in hub.requests if r.startswith("GET") and "self_forcing_dmd.pt" in r]
    assert len(first) == 1, "what was there was not downloaded again"


def test_the_tiny_decoder_comes_along_and_nothing_fails_without_it(
    nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = hub.files.pop(TINY)
    words = ("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    done = nasa_video(*words)
    assert done.status == 0, done.stderr
    assert "without --decoder tiny" in done.stderr
    monkeypatch.setenv(MODELS_FOLDER, "here")
    check = nasa_video("models", "check", "self-forcing")
    assert check.status == 0
    assert "missing, for --decoder tiny only: lightx2v/Autoencoders/taew2_1.pth" in check.stdout
    hub.files[TINY] = tiny
    assert nasa_video(*words).status == 0
    assert Path("here", TINY).read_bytes() == tiny


def test_a_file_that_differs_from_its_hash_is_removed(nasa_video: Run, hub: Hub) -> None:
    hub.damage = "gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 1
    assert "arrived damaged" in " ".join(done.stderr.split())
    assert not Path("here", hub.damage).exists()


@pytest.mark.parametrize(("status", "message"), [(401, "gated or private"), (404, "HTTP 404")])
def test_a_refusal_of_the_hub_is_explained(nasa_video: Run, hub: Hub, status: int, message: str) -> None:
    hub.status = status
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())


def test_no_network_says_the_ways_out(nasa_video: Run) -> None:
    done = nasa_video("models", "pull", "causvid", "--yes", "--mirror", "http://127.0.0.1:9", "--to", "here")
    assert done.status == 1
    assert "--mirror" in done.stderr
    assert MODELS_FOLDER in done.stderr


def test_a_full_disk_is_noticed_before_the_download(nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 1
    assert "do not fit" in done.stderr
    assert not any("GET" in request and "resolve" in request for request in hub.requests)


def test_check_says_what_is_missing_and_whether_it_fits(nasa_video: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: 12_000_000_000)
    done = nasa_video("models", "check", "causvid", "--device", "cpu", "--json")
    assert done.status == 1
    report = done.json
    assert len(report["missing"]) == 4
    assert report["enough"] is False
    width, height = report["fits"]
    assert (width, height) < (832, 480)
    assert width % 16 == height % 16 == 0
    # 81 frames of 832 x 480 in float32: 21 latent frames of 1,560 tokens, 30 layers of 2 x 1536 numbers.
    assert report["memory"]["history"] >= 21 * 1560 * 30 * 2 * 1536 * 4
    again = nasa_video("models", "check", "causvid", "--width", str(width), "--height", str(height), "--json")
    assert again.json["enough"] is True


def test_check_reads_a_folder(nasa_video: Run) -> None:
    done = nasa_video("models", "check", "{model}", "--json")
    assert done.status == 0
    assert done.json["enough"] is True


def test_every_shipped_preset_is_valid_and_complete() -> None:
    for path in (configs_dir() / "video").glob("*.yaml"):
        preset = parse_preset(path)
        assert preset.name == path.stem
        assert set(preset.guidance) == {"nasa", "nasa-centred", "nag", "vsf", "cfg"}
        assert preset.sampler.timesteps(preset.sampler.default_steps)
        assert preset.licence
        for source in preset.components.sources:
            stated = source.package or source.bytes or source.folder == "tokenizer" or source in preset.components.loras
            # whose card states no size; the hub is asked before anything is downloaded
            assert stated or source.repo == "zhuhz22/Causal-Forcing", source


def test_unknown_keys_are_named_with_their_place(tmp_path: Path) -> None:
    data = yaml.safe_load((configs_dir() / "video" / "causvid.yaml").read_text())
    data["sampler"]["shfit"] = 3
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(InputError, match=r"sampler\.shfit"):
        parse_preset(tmp_path / "p.yaml")


def test_verify_compares_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    downloads.verify(path, downloads.HubFile("r", "f", 3, hashlib.sha256(b"abc").hexdigest()))
    with pytest.raises(InputError, match="bytes instead of 4"):
        downloads.verify(path, downloads.HubFile("r", "f", 4, None))
    assert not path.exists()


def test_a_model_is_shown_with_the_words_that_it_knows(nasa_video: Run) -> None:
    done = nasa_video("models", "sprites", "--json")
    assert done.status == 0
    shown = json.loads(done.stdout)
    assert shown["words"]["shape"]["circle"][0] == "circle"
    assert shown["needs"]
    large = json.loads(nasa_video("models", "show", "self-forcing", "--json").stdout)
    assert large["words"] == {}
    assert nasa_video("models", "no-such-model").status == 1
