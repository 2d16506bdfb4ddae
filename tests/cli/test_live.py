"""`serve`, `generate --preview` and `stream` as one types them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from nasa_video.files.source import read_frames
from nasa_video.serve.app import Server
from nasa_video.serve.registry import plan_streams
from nasa_video.serve.settings import ServeSettings

Run = Callable[..., Any]


def test_serve_from_start_to_ctrl_c(nasa_video: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    heard: list[str] = []

    def look(address: str) -> None:
        try:
            heard.append(httpx.get(f"{address}healthz", timeout=60).json()["status"])
            with connect(f"{address.replace('http', 'ws')}ws", open_timeout=60) as viewer:
                viewer.send('{"type": "start", "prompt": "a ball"}')
                heard.extend(json.loads(viewer.recv(60))["type"] for _ in range(3))
                os.kill(os.getpid(), signal.SIGINT)
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        viewer.recv(60)
        except BaseException as error:
            heard.append(repr(error))
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(webbrowser, "open", lambda address: threading.Thread(target=look, args=(address,)).start())
    outcome = nasa_video("serve", "--model", "{model}", "--port", "0", "--open")
    assert heard == ["ok", "hello", "started", "chunk"]
    assert outcome.status == 0
    assert "ssh -L" in outcome.stderr, "how to come from another machine"
    assert outcome.stderr.endswith("stopped\n"), "also with a viewer, and without a traceback"
    assert not list(tmp_path.glob("nasa-video-serve-*")), "its recordings are gone"


def test_serve_where_another_one_listens(nasa_video: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        outcome = nasa_video("serve", "--model", "{model}", "--port", str(taken.getsockname()[1]))
    assert outcome.status == 1
    assert "choose another --port" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_serve_offers_the_places_that_there_is_memory_for(
    nasa_video: Run, monkeypatch: pytest.MonkeyPatch, model_folder: Path
) -> None:
    needs = {}
    for streams in (1, 2, 3):
        plan = plan_streams(ServeSettings(device="cpu"), str(model_folder), streams)
        assert plan is not None
        needs[streams] = plan.needs.peak
    assert needs[1] < needs[2] < needs[3], "every stream has a history and a decoder of its own"
    offered: list[int] = []
    monkeypatch.setattr(Server, "serve_until_stopped", lambda server: offered.append(server.settings.max_streams))
    common = ("serve", "--model", "{model}", "--port", "0", "--device", "cpu")

    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: needs[2])
    outcome = nasa_video(*common)
    assert (outcome.status, offered) == (0, [2])
    assert "memory for 2 of 4 streams" in outcome.stderr
    outcome = nasa_video(*common, "--streams", "3")
    assert outcome.status == 1
    assert "with 3 streams needs" in outcome.stderr
    assert "--streams 2 would fit" in outcome.stderr
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: needs[1] - 1)
    outcome = nasa_video(*common)
    assert outcome.status == 1
    assert "loading" not in outcome.stderr, "before anything is loaded"
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda device: 10**12)
    outcome = nasa_video(*common, "--memory", "auto")
    assert "memory on cpu" in outcome.stderr
    assert offered == [2, 4]


def test_serve_without_its_model(nasa_video: Run) -> None:
    outcome = nasa_video("serve", "--model", "no/such-model", "--port", "0")
    assert outcome.status == 1
    assert "no/such-model" in outcome.stderr


def test_a_preview_is_seen_in_the_browser_that_it_opens(
    nasa_video: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[int] = []

    def look(address: str) -> None:
        key = ""
        with connect(f"{address.replace('http', 'ws')}ws") as viewer:
            viewer.send('{"type": "start", "prompt": "a ball"}')
            while not ended:
                item = viewer.recv(60)
                if isinstance(item, bytes):
                    continue
                message = json.loads(item)
                if message["type"] == "started":
                    key = message["stream"]
                elif message["type"] == "chunk":
                    seen = message["first_frame"] + message["frames"]
                    viewer.send(json.dumps({"type": "position", "stream": key, "frame": seen}))
                elif message["type"] == "ended":
                    ended.append(message["frames"])

    monkeypatch.setattr(webbrowser, "open", lambda address: threading.Thread(target=look, args=(address,)).start())
    outcome = nasa_video("generate", "a ball", "--model", "{model}", "--preview", "-o", "ball.mp4")
    assert outcome.status == 0, outcome.stderr
    assert "preview at http://localhost:" in outcome.stderr
    assert ended == [len(read_frames(tmp_path / "ball.mp4"))] == [21]


def test_stream_into_a_file(nasa_video: Run, tmp_path: Path) -> None:
    words = ("--neg", "red", "--model", "{model}", "--seconds", "1", "--to", "out.mp4", "--json")
    outcome = nasa_video("stream", "a ball", *words)
    assert outcome.status == 0, outcome.stderr
    assert outcome.json["frames"] == len(read_frames(tmp_path / "out.mp4")) == 12


def test_stream_loads_its_model_as_generate_does(nasa_video: Run, tmp_path: Path) -> None:
    words = ("stream", "a ball", "--model", "{model}", "--seconds", "1", "--device", "cpu")
    for name, options in {"plain": (), "offloaded": ("--offload",)}.items():
        outcome = nasa_video(*words, *options, "--to", f"{name}.mp4")
        assert outcome.status == 0, outcome.stderr
    assert np.array_equal(read_frames(tmp_path / "plain.mp4"), read_frames(tmp_path / "offloaded.mp4"))
    for options, message in (
        (("--decoder", "tiny"), "has no tiny decoder"),
        (("--lora", "nowhere.safetensors"), "nowhere.safetensors"),
        (("--weights", "int4"), "plain, int8 or fp8"),
    ):
        outcome = nasa_video(*words, *options, "--to", "no.mp4")
        assert outcome.status == 1
        assert message in " ".join(outcome.stderr.split())


def test_stream_to_nowhere(nasa_video: Run) -> None:
    outcome = nasa_video("stream", "a ball", "--model", "{model}", "--to", "rtmp://127.0.0.1:1/live/key")
    assert outcome.status == 1
    assert "refused" in outcome.stderr
    assert "key" not in outcome.stderr.replace("keys", "")
