"""`generate --preview` and `stream` beside the server."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from live_client import PATIENCE, Client, eventually

from nasa_video.cli.console import chunk_progress
from nasa_video.cli.generation import RunOptions, run
from nasa_video.cli.stream import run_stream, seconds_to_arrive
from nasa_video.errors import OutputError
from nasa_video.files import ffmpeg
from nasa_video.files.source import read_frames
from nasa_video.serve.preview import Preview
from nasa_video.video.request import LoadOptions, VideoRequest


def test_a_preview_shows_the_run_to_everybody(model_folder: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    viewers: list[threading.Thread] = []

    def look(address: str) -> None:
        client = Client(SimpleNamespace(address=address))  # type: ignore[arg-type]
        assert client.heard[0]["preview"]["prompt"] == "a ball"
        client.start("a ball", media=["jpeg"])
        client.watch(2)
        seen.append(client.hear("ended")["frames"])
        client.close()

    def open_page(address: str) -> None:
        for _ in range(2):
            viewers.append(threading.Thread(target=look, args=(address,)))
            viewers[-1].start()

    with Preview(lambda message: None, open_page=open_page) as preview:
        request = VideoRequest(prompt="a ball", model=str(model_folder))
        output = str(tmp_path / "a.mp4")
        result = run(request, output, RunOptions(), chunk_progress, lambda message: None, preview.watch)
    for viewer in viewers:
        viewer.join(10)
    assert seen == [21, 21]
    assert result["frames"] == len(read_frames(tmp_path / "a.mp4")) == 21


def _stream(model: Path, to: str, say: Any) -> dict[str, Any]:
    request = VideoRequest.read({"prompt": "a ball", "negatives": "red", "model": str(model), "seed": 3})
    return run_stream(request, to, LoadOptions(device="cpu"), say, 2.0)


def test_a_stream_into_a_file(model_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result: dict[str, Any] = _stream(model_folder, str(tmp_path / "s.mp4"), said.append)
    assert result["frames"] == len(read_frames(tmp_path / "s.mp4")) == 24


def test_a_stream_that_nobody_takes(model_folder: Path) -> None:
    with pytest.raises(OutputError, match="refused") as refused:
        _stream(model_folder, "rtmp://127.0.0.1:1/live/secret", lambda message: None)
    assert "secret" not in str(refused.value)


def test_a_protocol_that_this_ffmpeg_lacks_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text("#!/bin/sh\nprintf 'Input:\\n  srt\\n  tcp\\nOutput:\\n  file\\n  tcp\\n'\n")
    program.chmod(0o755)
    monkeypatch.setattr(ffmpeg, "executable", lambda: str(program))
    with pytest.raises(OutputError, match=r"built without srt://; use tcp://, or .*IMAGEIO_FFMPEG_EXE") as refused:
        _stream(Path("no such model"), "srt://127.0.0.1:9/?streamid=secret", lambda message: None)
    assert "secret" not in str(refused.value)


def test_an_srt_connection_stays_open_for_its_latency() -> None:
    assert seconds_to_arrive("rtmp://host/app/key") == seconds_to_arrive("srt.mp4") == 0
    assert seconds_to_arrive("srt://host:9") == 0.5
    assert seconds_to_arrive("srt://host:9?latency=2000000&mode=caller") == 2.5
    assert seconds_to_arrive("srt://host:9?latency=much") == 0.5


def _free_port(kind: socket.SocketKind) -> int:
    with socket.socket(socket.AF_INET, kind) as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


Receive = Callable[[list[str], str], "subprocess.Popen[bytes]"]


@pytest.fixture
def receive(tmp_path: Path) -> Any:
    """Starts an ffmpeg that writes what it is sent into received.mkv."""
    running: list[subprocess.Popen[bytes]] = []

    def start(options: list[str], url: str) -> subprocess.Popen[bytes]:
        command = [ffmpeg.executable(), "-loglevel", "error", *options, "-i", url, "-c", "copy"]
        running.append(subprocess.Popen([*command, str(tmp_path / "received.mkv")]))
        return running[-1]

    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("protocol", "path", "options", "query"),
    [("rtmp", "/live/key", ["-listen", "1"], ""), ("srt", "", [], "?mode=listener")],
)
def test_a_receiver_gets_every_frame(
    model_folder: Path, tmp_path: Path, receive: Receive, protocol: str, path: str, options: list[str], query: str
) -> None:
    abilities = ffmpeg.run(["-protocols"]).decode().partition("Output:")
    if not all(protocol in side.split() for side in abilities[::2]):
        pytest.skip(f"this ffmpeg was built without {protocol}")
    port = _free_port(socket.SOCK_DGRAM if protocol == "srt" else socket.SOCK_STREAM)
    url = f"{protocol}://127.0.0.1:{port}{path}"
    receiver = receive(options, url + query)
    process = psutil.Process(receiver.pid)
    eventually(lambda: any(one.laddr and one.laddr.port == port for one in process.net_connections("inet")))
    result = _stream(model_folder, url, lambda message: None)
    receiver.wait(PATIENCE)
    assert result["to"] == f"{protocol}://127.0.0.1", "the address is told without its key"
    assert result["frames"] == len(read_frames(tmp_path / "received.mkv")) == 24
