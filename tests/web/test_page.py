"""The page in a real Chromium: it plays, it changes, it holds, it recovers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from live_client import Client, eventually, every_task_had_its_turn, ffmpegs
from live_page import acting_chunk, contrast, data, play, ready, saved, until, wait_for_frame

from nasa_video.cli.console import chunk_progress
from nasa_video.cli.generation import RunOptions, run
from nasa_video.files.metadata import read_metadata
from nasa_video.files.source import read_frames
from nasa_video.serve.app import Server
from nasa_video.video.request import VideoRequest


@pytest.mark.parametrize("media", ["mp4", "webm", "av1", "jpeg"])
def test_it_plays(server: Server, open_page: Any, media: str) -> None:
    page = open_page(server.address)
    play(page, media)
    assert data(page, "media") == media
    wait_for_frame(page, 25)
    assert "chunk" in page.inner_text("#counter")
    assert "FPS" in page.inner_text("#made")
    assert contrast(page) > 20, "a picture is on the screen"


@pytest.mark.parametrize(("lacks", "gets"), [("mp4", "webm"), ("mp4 vp09", "av1"), ("mp4 webm", "jpeg")])
def test_a_browser_gets_what_it_can_play(server: Server, open_page: Any, lacks: str, gets: str) -> None:
    without = """((lacks) => {
      const able = MediaSource.isTypeSupported.bind(MediaSource);
      MediaSource.isTypeSupported = (type) => !lacks.split(" ").some((part) => type.includes(part)) && able(type);
    })"""
    page = open_page(server.address, script=f'{without}("{lacks}")')
    play(page)
    assert data(page, "media") == gets
    wait_for_frame(page, 12)


def test_changes_pause_stop_and_downloads(server: Server, open_page: Any, tmp_path: Path) -> None:
    page = open_page(server.address)
    play(page)
    page.fill("#negative", "red")
    page.press("#negative", "Enter")
    accepted = acting_chunk(page)
    until(page, f"Number(document.body.dataset.chunk) >= {accepted}")
    assert "%" in page.inner_text("#change")
    assert page.locator("#segments li").count() == 2
    page.focus("body")
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    page.wait_for_selector("body[data-state=paused]")
    every_task_had_its_turn(server)
    page.wait_for_timeout(300)
    (stream,) = server.state.streams.values()
    frame, made, held = data(page, "frame"), stream.made, psutil.Process().memory_info().rss
    page.wait_for_timeout(2500)
    assert data(page, "frame") == frame, "the picture stands"
    assert stream.made == made, "nothing is made"
    assert psutil.Process().memory_info().rss < held + 2**22, "nothing grows"
    page.click("#pause")
    page.wait_for_selector("body[data-state=playing]")
    wait_for_frame(page, int(frame) + 5)
    page.click("#stop")
    page.wait_for_selector("body[data-state=ended]")
    frames = int(data(page, "frames"))
    wait_for_frame(page, frames - 2)
    video = saved(page, "#save-video", tmp_path / "shown.mp4")
    assert len(read_frames(video)) == frames
    timeline = saved(page, "#save-timeline", tmp_path / "shown.yaml")
    assert "- red" in timeline.read_text()
    assert read_metadata(video)["nasa_video"]["frames"] == frames
    # tests/web/test_server.py compares them before any encoding, to the bit.
    request = VideoRequest.read_timeline(timeline)
    run(request, str(tmp_path / "again.mp4"), RunOptions(), chunk_progress, lambda message: None)
    again = read_frames(tmp_path / "again.mp4")
    assert abs(again.astype(int) - read_frames(video)).mean() < 6, "the same pictures, but for the encoder"


def test_reload_and_a_second_viewer(server: Server, open_page: Any) -> None:
    first = open_page(server.address)
    play(first, prompt="a green star")
    second = open_page(server.address)
    play(second)
    assert server.state.scheduler.counts[0] == 2
    first.reload()
    ready(first)
    assert first.input_value("#prompt") == "a green star", "what was typed is still there"
    eventually(lambda: server.state.scheduler.counts[0] == 1)
    play(first)


def test_a_lost_connection_comes_back(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    play(page)
    for connection in list(server.server_state.connections):
        connection.transport.abort()
    page.wait_for_selector("body[data-state=connecting]")
    ready(page)
    play(page)


def test_a_killed_encoder_is_hardly_seen(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    play(page, "mp4")
    wait_for_frame(page, 12)
    for encoder in ffmpegs("pipe:1"):
        encoder.kill()
    before = int(data(page, "frame"))
    wait_for_frame(page, before + 30)


def test_a_browser_without_video_gets_pictures(server: Server, open_page: Any) -> None:
    page = open_page(server.address, script="delete window.MediaSource; delete window.ManagedMediaSource;")
    play(page)
    assert data(page, "media") == "jpeg"
    wait_for_frame(page, 12)


def test_the_token_is_asked_for(serve: Callable[..., Server], open_page: Any) -> None:
    server = serve(token="a secret")
    page = open_page(server.address)
    page.fill("#token", "wrong")
    page.press("#token", "Enter")
    page.wait_for_selector("#login-error:not([hidden])")
    page.fill("#token", "a secret")
    page.press("#token", "Enter")
    ready(page)
    given = open_page(f"{server.address}#token=a%20secret")
    ready(given)
    assert "secret" not in given.url


def test_without_nasa_beside_it(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    ready(page)
    page.check("#compare")
    page.fill("#negative", "red")
    page.press("#negative", "Enter")
    page.click("#start")
    page.wait_for_selector("body[data-state=playing]")
    assert page.inner_text("#captions").split("\n") == ["without negatives", "with centred NASA 0.5"]
    page.select_option("#guidance", "nag")
    until(page, "document.querySelector('#with').textContent === 'with NAG 4'")
    assert page.evaluate("document.querySelector('video').videoWidth") == 2 * page.evaluate(
        "2 * document.querySelector('video').videoHeight"
    )


def test_the_api_page(server: Server, open_page: Any) -> None:
    page = open_page(f"{server.address}docs")
    page.wait_for_selector("article")
    assert "/v1/videos" in page.inner_text("main")


@pytest.mark.parametrize("media", ["mp4", "webm", "jpeg"])
def test_the_first_picture_is_shown_while_the_second_chunk_is_made(
    server: Server, open_page: Any, hold_second_chunk: threading.Event, media: str
) -> None:
    page = open_page(server.address)
    play(page, media)
    assert not hold_second_chunk.is_set()
    assert float(data(page, "firstPicture")) > float(data(page, "firstChunk")) > 0, "both are measured"
    hold_second_chunk.set()
    wait_for_frame(page, 9)


def test_a_client_in_python_sees_what_the_page_sees(server: Server, open_page: Any, client_of: Any) -> None:
    page = open_page(server.address)
    play(page)
    client: Client = client_of(server)
    client.start(media=["jpeg"])
    client.watch(2)
    assert server.state.scheduler.counts[0] == 2
