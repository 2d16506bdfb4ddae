"""`generate --preview` and `stream` beside the server."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from live_client import Client

from nasa_video.cli.console import chunk_progress
from nasa_video.cli.generation import Request, run
from nasa_video.cli.streaming import StreamRequest, run_stream
from nasa_video.errors import OutputError
from nasa_video.serve.preview import Preview
from nasa_video.video.source import read_frames


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
        request = Request(prompt="a ball", model=str(model_folder))
        result = run(request, str(tmp_path / "a.mp4"), chunk_progress, lambda message: None, preview.watch)
    for viewer in viewers:
        viewer.join(10)
    assert seen == [21, 21]
    assert result["frames"] == len(read_frames(tmp_path / "a.mp4")) == 21


def _request(model: Path, to: str) -> StreamRequest:
    return StreamRequest("a ball", ("red",), None, None, str(model), 3, None, 2.0, None, "cpu", None, False, to)


def test_a_stream_into_a_file(model_folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result: dict[str, Any] = run_stream(_request(model_folder, str(tmp_path / "s.mp4")), said.append)
    assert result["frames"] == len(read_frames(tmp_path / "s.mp4")) == 24


def test_a_stream_that_nobody_takes(model_folder: Path) -> None:
    with pytest.raises(OutputError, match="refused") as refused:
        run_stream(_request(model_folder, "rtmp://127.0.0.1:1/live/secret"), lambda message: None)
    assert "secret" not in str(refused.value)
