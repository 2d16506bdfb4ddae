"""A small server on this machine that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from nasa_video.models.stored import MODELS_FOLDER

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

    def add(self, repo: str, folder: Path) -> None:
        """Every file of a folder, as a repository's."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.files[f"{repo}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()


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
                sizes = {name: len(hub.files[f"{repo}/{name}"]) for name in names}
                tree = [{"type": "file", "path": name, "size": sizes[name], "oid": "0" * 40} for name in names]
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


@contextmanager
def serving(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Serve the hub's files, to a client whose cache is the given folder."""
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(constants, name, str(cache), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # what is kept of a broken download is whole pieces
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.delenv(MODELS_FOLDER, raising=False)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
