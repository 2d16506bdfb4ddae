"""Bringing a model from a hub: a small server on this machine speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from diffusers import AutoencoderKLWan

from nasa_video import downloads, models
from nasa_video.models import configs_dir

Run = Callable[..., Any]
COMMIT = "a" * 40


@dataclass
class Hub:
    """Repositories by file name, and what is to go wrong."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    requests: list[str] = field(default_factory=list)
    status: int | None = None
    damage: str | None = None
    cut_once: str | None = None
    ranges: list[str] = field(default_factory=list)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, body: bool) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            path = self.path.split("?")[0].lstrip("/")
            if hub.status is not None:
                return self._send(hub.status, b"{}", {}, body)
            if path.startswith("api/models/"):
                repo = "/".join(path.split("/")[2:4])
                names = [name.removeprefix(f"{repo}/") for name in hub.files if name.startswith(f"{repo}/")]
                tree = [{"type": "file", "path": name, "size": 1, "oid": "0" * 40} for name in names]
                info = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in names]}
                return self._send(200, json.dumps(tree if "/tree/" in path else info).encode(), {}, body)
            name = path.replace("/resolve/main/", "/").replace(f"/resolve/{COMMIT}/", "/")
            if name not in hub.files:
                return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            content = hub.files[name]
            etag = hashlib.sha256(content).hexdigest()
            if hub.damage == name and body:
                content = bytes(len(content))
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range")
            if wanted and body:
                hub.ranges.append(wanted)
                start = int(wanted.removeprefix("bytes=").split("-")[0])
                headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                return self._send(206, content[start:], headers, body)
            if hub.cut_once == name and body:
                hub.cut_once = None
                self.send_response(200)
                for key, value in (headers | {"Content-Length": str(len(content))}).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return None
            return self._send(200, content, headers, body)

        def _send(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
            self.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(content))}).items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the true files' names and small contents, and an empty cache."""
    from huggingface_hub import constants

    hub = Hub()
    wan = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
    for name in ("vae/config.json", "vae/w.safetensors", "text_encoder/config.json", "text_encoder/w.safetensors",
                 "text_encoder/w.bin", "tokenizer/tokenizer_config.json", "README.md"):  # fmt: skip
        hub.files[f"{wan}/{name}"] = name.encode() * 50
    hub.files[f"{wan}/vae/config.json"] = json.dumps(dict(AutoencoderKLWan(base_dim=4).config)).encode()
    hub.files["gdhe17/Self-Forcing/checkpoints/self_forcing_dmd.pt"] = bytes(range(256)) * 4000
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    cache = tmp_path / "cache"
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept of a broken download is whole pieces
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.delenv(models.MODELS_FOLDER, raising=False)
    yield hub
    server.shutdown()
    server.server_close()


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
    monkeypatch.setenv(models.MODELS_FOLDER, "here")
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
    assert models.MODELS_FOLDER in done.stderr


def test_a_full_disk_is_noticed_before_the_download(nasa_video: Run, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    usage = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    done = nasa_video("models", "pull", "self-forcing", "--yes", "--mirror", hub.url, "--to", "here")
    assert done.status == 1
    assert "do not fit" in done.stderr
    assert not any("GET" in request and "resolve" in request for request in hub.requests)


def test_check_says_what_is_missing_and_whether_it_fits(nasa_video: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nasa_video.planning.available", lambda device: 12_000_000_000)
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
        preset = models.parse_preset(path)
        assert preset.name == path.stem
        assert set(preset.guidance) == {"nasa", "nag", "vsf", "cfg"}
        assert preset.sampler.timesteps(preset.sampler.default_steps)
        assert preset.licence
        for source in preset.components.sources:
            stated = source.package or source.bytes or source.folder == "tokenizer" or source in preset.components.loras
            assert stated, source


def test_unknown_keys_are_named_with_their_place(tmp_path: Path) -> None:
    data = yaml.safe_load((configs_dir() / "video" / "causvid.yaml").read_text())
    data["sampler"]["shfit"] = 3
    (tmp_path / "p.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(models.InputError, match=r"sampler\.shfit"):
        models.parse_preset(tmp_path / "p.yaml")


def test_verify_compares_size_and_hash(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"abc")
    downloads.verify(path, downloads.HubFile("r", "f", 3, hashlib.sha256(b"abc").hexdigest()))
    with pytest.raises(models.InputError, match="bytes instead of 4"):
        downloads.verify(path, downloads.HubFile("r", "f", 4, None))
    assert not path.exists()
