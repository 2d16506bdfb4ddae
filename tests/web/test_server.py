"""The server by its protocol: streams, changes, places, jobs, failures."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from live_client import PATIENCE, Client, eventually, every_task_had_its_turn, ffmpegs
from PIL import Image
from websockets.exceptions import ConnectionClosed

from nasa_video.cli.console import chunk_progress
from nasa_video.cli.generation import RunOptions, run
from nasa_video.errors import InputError
from nasa_video.files.frames import enlarge
from nasa_video.files.metadata import read_metadata
from nasa_video.files.source import read_frames
from nasa_video.serve import delivery
from nasa_video.serve.app import Server
from nasa_video.serve.delivery import Recorder
from nasa_video.serve.media import LIMIT_BYTES, Gone, MediaPipe, Outgoing
from nasa_video.serve.states import LiveStates
from nasa_video.video import controller
from nasa_video.video.request import PromptRequest, PromptState, VideoRequest


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray[Any, Any]]:
    """The frames that streams hand to their recordings, before any encoding."""
    frames: list[np.ndarray[Any, Any]] = []
    write = Recorder.write

    def spy(self: Recorder, new: np.ndarray[Any, Any]) -> None:
        frames.append(new.copy())
        write(self, new)

    monkeypatch.setattr(Recorder, "write", spy)
    return frames


def test_a_stream_from_start_to_stop(server: Server, client: Client) -> None:
    started = client.start(negatives=[{"text": "red", "weight": 0.5}], seed=3, media=["mp4", "jpeg"])
    assert started["media"] == "mp4"
    assert (started["width"], started["height"], started["fps"]) == (64, 32, 12)
    chunks = client.watch(3)
    assert [chunk["index"] for chunk in chunks] == [0, 1, 2]
    assert [chunk["first_frame"] for chunk in chunks] == [0, 9, 21]
    assert chunks[1]["negatives"] == [{"text": "red", "weight": 0.5}]
    assert chunks[1]["effect"]["relative_change"] > 0
    assert chunks[1]["fps"] > 0
    client.send("stop")
    ended = client.hear("ended")
    assert ended["reason"] == "stopped"
    assert b"avcC" in client.media[0] + client.media[1], "the first bytes are an MP4's header"
    assert server.state.scheduler.counts == (0, 0)


@pytest.mark.parametrize(
    ("kind", "magic"),
    [("webm", b"\x1aE\xdf\xa3"), ("av1", b"\x1aE\xdf\xa3"), ("jpeg", b"\0\0\0\0\xff\xd8")],
)
def test_other_ways_to_send_pictures(client: Client, tmp_path: Path, kind: str, magic: bytes) -> None:
    client.start(media=[kind], frames=21)
    client.watch(2)
    assert client.hear("ended")["reason"] == "finished"
    assert b"".join(client.media).startswith(magic)
    if kind == "jpeg":
        assert [int.from_bytes(data[:4], "big") for data in client.media] == list(range(21))
        assert Image.open(io.BytesIO(client.media[20][4:])).size == (32, 16)
    else:
        path = tmp_path / "sent.webm"
        path.write_bytes(b"".join(client.media))
        # decord wants a duration, which a live stream has not, and knows no AV1
        command = [
            imageio_ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            str(path),
            "-vf",
            "scale=2:2",
            "-f",
            "rawvideo",
        ]
        pictures = subprocess.run([*command, "-pix_fmt", "gray", "-"], capture_output=True, check=True).stdout
        assert len(pictures) == 21 * 4


@pytest.mark.parametrize(("kind", "picture"), [("mp4", b"moof"), ("webm", b"\x1f\x43\xb6\x75"), ("jpeg", b"\xff\xd8")])
def test_the_first_picture_waits_for_the_first_chunk_only(
    client: Client, hold_second_chunk: threading.Event, kind: str, picture: bytes
) -> None:
    client.start(media=[kind])
    client.hear("chunk")
    while picture not in b"".join(client.media):
        item = client.socket.recv(PATIENCE)
        assert isinstance(item, bytes), "the pictures of one chunk are enough"
        client.media.append(item)
    hold_second_chunk.set()
    assert client.hear("chunk")["index"] == 1


def test_changes_act_from_the_next_chunk_and_replay_to_the_same_frames(
    server: Server,
    client: Client,
    shown: list[np.ndarray[Any, Any]],
    tmp_path: Path,
) -> None:
    client.start(seed=11, on_change="keep", steps=1, first_chunk_steps=2)
    changes: list[dict[str, Any]] = [
        {"negatives": [{"text": "ratio 16:9"}, {"text": "blue", "weight": 0.3}]},
        {"prompt": "a blue star", "on_change": "regenerate"},
        {"guidance": "nag:2.5", "on_change": "recache"},
        {"guidance": ":3,alpha=0.3"},
        {"guidance": "none"},
        {"guidance": "vsf", "negatives": 'snow, "black, white":0.5'},
        {"negatives": []},
    ]
    for change in changes:
        before = client.watch(1)[0]["index"]
        client.send("update", **change)
        accepted = client.hear("accepted")
        assert accepted["from_chunk"] > before
        while (chunk := client.watch(1)[0])["index"] < accepted["from_chunk"]:
            pass
        assert chunk["index"] == accepted["from_chunk"]
        for name, value in change.items():
            if name == "guidance":
                assert chunk[name].startswith(value if value[0] != ":" else f"nag{value.split(',')[0]}")
            elif name != "negatives":
                assert chunk[name] == value
    client.send("stop")
    frames = client.hear("ended")["frames"]

    timeline = httpx.get(f"{server.address}v1/streams/{client.key}/timeline.yaml").text
    (tmp_path / "t.yaml").write_text(timeline)
    request = VideoRequest.read_timeline(tmp_path / "t.yaml")
    run(request, f"{tmp_path}/again/", RunOptions(), chunk_progress, lambda message: None)
    again = np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / "again").glob("*.png"))])
    live = enlarge(np.concatenate(shown), 2)
    assert len(live) == frames
    np.testing.assert_array_equal(again, live)


def test_the_download_is_what_was_shown(server: Server, client: Client, shown: list[np.ndarray[Any, Any]]) -> None:
    client.start(seed=5)
    client.watch(2)
    early = httpx.get(f"{server.address}v1/streams/{client.key}/video.mp4")
    client.watch(1)
    client.send("stop")
    frames = client.hear("ended")["frames"]
    late = httpx.get(f"{server.address}v1/streams/{client.key}/video.mp4")
    assert 'filename="a-red-ball.mp4"' in late.headers["content-disposition"]
    path = server.state.folder / "late.mp4"
    for answer, count in ((early, None), (late, frames)):
        path.write_bytes(answer.content)
        decoded = read_frames(path)
        expected = enlarge(np.concatenate(shown), 2)[: len(decoded)]
        assert count is None or len(decoded) == count
        assert abs(decoded.astype(int) - expected).mean() < 6, "the same pictures, but for the encoder"
    assert read_metadata(path)["nasa_video"]["seed"] == 5
    path.unlink()


def test_a_full_recording_is_said(serve: Callable[..., Server], client_of: Callable[..., Client]) -> None:
    server = serve(record_seconds=1.0)
    client = client_of(server)
    client.start(frames=33)
    client.watch(3)
    client.hear("ended")
    notes = [message["message"] for message in client.heard if message["type"] == "note"]
    assert notes == ["the first 1 s are kept for download; the timeline goes on"]
    path = server.state.folder / "kept.mp4"
    path.write_bytes(httpx.get(f"{server.address}v1/streams/{client.key}/video.mp4").content)
    assert len(read_frames(path)) == 12
    path.unlink()


def test_side_by_side_is_the_guided_and_the_unguided_stream(
    client: Client, client_of: Callable[..., Client], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[np.ndarray[Any, Any]] = []
    monkeypatch.setattr(delivery.Delivery, "_send", lambda self, item: sent.append(item.frames))
    started = client.start(negatives=[{"text": "red"}], compare=True, frames=21, on_change="regenerate")
    assert started["width"] == 2 * 64
    client.watch(2)
    client.hear("ended")
    both = np.concatenate(sent)
    for negatives, half in ([], both[:, :, :32]), ([{"text": "red"}], both[:, :, 32:]):
        sent.clear()
        client.start(negatives=negatives, frames=21)
        client.watch(2)
        client.hear("ended")
        np.testing.assert_array_equal(np.concatenate(sent), half)


def test_generation_waits_for_the_viewer(server: Server, client: Client) -> None:
    client.start()
    stream = server.state.streams.get(client.key)
    assert stream is not None
    held = [client.hear("chunk") for _ in range(2)]
    every_task_had_its_turn(server)
    assert stream.made == 21, "two chunks for a viewer who has seen nothing, and no more"
    client.at(held[-1]["first_frame"] + 8)
    assert client.hear("chunk")["first_frame"] == 21
    client.send("pause")
    assert client.hear("state")["state"] == "paused"
    every_task_had_its_turn(server)
    made = stream.made
    client.at(10_000)
    client.send("pause")
    assert client.hear("state")["state"] == "paused", "the server has read the position before it"
    every_task_had_its_turn(server)
    assert stream.made == made, "made while paused"
    client.send("resume")
    while client.hear("chunk")["first_frame"] < made:
        pass


def test_a_stream_with_an_end_does_not_wait_for_its_viewer_there(server: Server, client: Client) -> None:
    client.start(frames=21)
    for _ in range(2):
        client.hear("chunk")
    assert client.hear("ended")["reason"] == "finished", "without a word about how far the viewer is"
    assert server.state.scheduler.counts == (0, 0)


def test_a_bad_change_is_refused_and_the_stream_goes_on(client: Client) -> None:
    client.start()
    client.watch(1)
    for change in ({"negatives": [{"text": "A  red BALL"}]}, {"guidance": "cfg"}, {"guidance": "nag", "scale": 0.5}):
        client.send("update", id=7, **change)
        error = client.hear("error")
        assert (error["code"], error["id"]) == ("refused", 7)
        client.heard.clear()
    assert client.watch(1)[0]["guidance"].startswith("nasa-centred:")


def test_a_change_needs_no_memory_for_another_stream(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.start()
    client.watch(1)

    def nothing_left(*arguments: Any, **options: Any) -> None:
        raise InputError("there is no memory for one more")

    monkeypatch.setattr("nasa_video.video.pipeline.require", nothing_left)
    client.send("update", negatives=[{"text": "red"}], on_change="regenerate")
    accepted = client.hear("accepted")["from_chunk"]
    while (chunk := client.watch(1)[0])["index"] < accepted:
        pass
    assert chunk["negatives"] == [{"text": "red", "weight": 1.0}]


def test_moving_the_scale_encodes_no_text(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.start(negatives=[{"text": "red"}])
    client.watch(1)
    monkeypatch.setattr(controller, "encode", None)
    for scale in (0.5, 0.25, 2.0):
        client.send("update", scale=scale)
        client.hear("accepted")
    while not client.watch(1)[0]["guidance"].startswith("nasa-centred:2,"):
        pass


def test_a_scale_of_zero_hides_no_bad_negative(client: Client) -> None:
    client.start("a red ball", negatives=[{"text": "a red ball"}], scale=0)
    client.watch(1)
    client.send("update", scale=1)
    assert "prompt itself" in client.hear("error")["message"]
    client.heard.clear()
    assert client.watch(1)[0]["guidance"].startswith("nasa-centred:0,")


def test_changes_faster_than_they_can_be_looked_at(
    client: Client, client_of: Callable[..., Client], server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, seen = threading.Event(), []
    check = LiveStates.check

    def slow(self: LiveStates, wanted: PromptRequest) -> PromptState:
        if seen:
            look.wait(PATIENCE)
        seen.append(wanted)
        return check(self, wanted)

    monkeypatch.setattr(LiveStates, "check", slow)
    client.start()
    other = client_of(server)
    client.send("pause")
    client.hear("state")
    for weight in range(1, 13):
        client.send("update", negatives=[{"text": "red", "weight": weight}])
    assert "changes are waiting" in client.hear("error")["message"], "they do not pile up"
    client.heard.clear()
    other.send("start", prompt="a star")
    look.set()
    other.hear("chunk")
    turn = [wanted.prompt for wanted in seen].index("a star")
    assert turn <= 3, "a stream looks at one change in its turn, so that the others get theirs"
    client.send("resume")
    while client.hear("chunk", "error")["type"] == "error":  # The last ones were left out as well.
        pass


def test_malformed_messages_are_refused(server: Server, client: Client) -> None:
    for text in ("", "{", "[]", '{"type":"dance"}', '{"type":"start","prompt":3}'):
        client.socket.send(text)
        assert client.hear("error")["code"] == "malformed"
    client.socket.send(b"binary")
    assert client.hear("error")["code"] == "malformed"
    secret = "/etc/passwd"
    client.send("start", prompt="a ball", model=secret)
    assert client.hear("error")["code"] == "refused"
    client.send("start", prompt="a ball", seed="7; rm", nonsense=1)
    assert "7; rm" not in client.hear("error")["message"], "what came in is not sent back"
    client.start()
    client.watch(1)


def test_an_oversize_message_ends_the_connection(server: Server, client: Client) -> None:
    client.start()
    client.socket.send("x" * 70_000)
    eventually(lambda: server.state.sessions == 0)
    assert server.state.scheduler.counts == (0, 0)


def test_too_many_messages_are_left_out_then_the_client(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(messages_per_second=5.0)
    client = client_of(server)
    with contextlib.suppress(ConnectionClosed):
        for _ in range(100):
            client.at(0)
    assert client.hear("error")["code"] == "too-fast"
    eventually(lambda: server.state.sessions == 0)


def test_who_leaves_frees_the_place_within_a_second(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(max_streams=1)
    first, second = client_of(server), client_of(server)
    first.start()
    first.watch(1)
    second.send("start", prompt="a star")
    assert second.hear("queued")["place"] == 1
    began = time.monotonic()
    first.socket.close()
    second.hear("started", seconds=5)
    assert time.monotonic() - began < 1


def test_a_connection_that_is_cut_frees_the_place(server: Server, client: Client) -> None:
    client.start()
    client.watch(1)
    client.socket.socket.close()
    eventually(lambda: server.state.sessions == 0, 5)
    assert server.state.scheduler.counts == (0, 0)
    timeline = httpx.get(f"{server.address}v1/streams/{client.key}/timeline.yaml")
    assert timeline.status_code == 200, "what was shown can still be had"


def test_twenty_clients_at_once(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(max_streams=4, max_waiting=10, turn_seconds=1.0)
    outcomes: list[str] = []

    def visit() -> None:
        client = client_of(server)
        client.send("start", prompt="a ball", media=["jpeg"], frames=21)
        if client.hear("queued", "started", "error")["type"] == "error":
            outcomes.append("busy")
            return
        client.key = next((m["stream"] for m in client.heard if m["type"] == "started"), "")
        client.key = client.key or client.hear("started")["stream"]
        client.watch(2)
        outcomes.append(client.hear("ended")["reason"])

    threads = [threading.Thread(target=visit) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert len(outcomes) == 20
    assert outcomes.count("finished") >= 14
    assert outcomes.count("finished") + outcomes.count("busy") == 20


@pytest.mark.parametrize("looks", [True, False])
@pytest.mark.parametrize("frames", [None, 1197])
def test_a_stream_makes_room_for_those_who_wait(
    serve: Callable[..., Server], client_of: Any, frames: int | None, looks: bool
) -> None:
    server = serve(max_streams=1, turn_seconds=0.5)
    first, second = client_of(server), client_of(server)
    first.start(frames=frames)
    second.send("start", prompt="a star", frames=9)
    if looks and frames is None:
        assert first.hear("ended")["reason"] == "turn over", "it took more and more chunks, but others waited"
    elif looks:
        first.watch(2)  # ... and then no longer.
    assert second.hear("ended")["reason"] == "finished", "nobody holds the worker by not looking"
    if frames or not looks:
        assert first.hear("ended")["reason"] == "turn over"


def test_a_stream_with_an_end_keeps_its_place_while_it_is_watched(server: Server, client: Client) -> None:
    client.start(frames=1197)
    stream = server.state.streams.get(client.key)
    assert stream is not None
    for _ in range(2):
        client.hear("chunk")
    every_task_had_its_turn(server)
    assert not stream.endless
    stream._moved_at -= server.settings.turn_seconds + 1
    assert stream.endless, "its viewer has not moved on for a turn"
    client.at(1)
    eventually(lambda: not stream.endless)


def test_a_full_line_is_said(serve: Callable[..., Server], client_of: Any) -> None:
    server = serve(max_streams=1, max_waiting=0, max_sessions=2)
    first, second = client_of(server), client_of(server)
    first.start()
    second.send("start", prompt="a star")
    assert second.hear("error")["code"] == "busy"
    assert httpx.post(f"{server.address}v1/videos", json={"prompt": "a star"}).status_code == 503
    with pytest.raises(Exception, match=r"1013|too many"):
        client_of(server)


def test_a_killed_encoder_is_replaced(client: Client, tmp_path: Path) -> None:
    client.start(media=["mp4"])
    client.watch(1)
    (encoder,) = ffmpegs("pipe:1")
    encoder.kill()
    again = client.hear("media")
    assert again["media"] == "mp4"
    client.at(again["first_frame"] + 9)
    client.watch(2)
    client.send("stop")
    ended = client.hear("ended")
    assert ended["reason"] == "stopped"
    # Only now: a chunk is told of when it is made, its pictures follow when the new encoder has started.
    path = tmp_path / "again.mp4"
    path.write_bytes(b"".join(client.media))
    assert len(read_frames(path)) == ended["frames"] - again["first_frame"], "what followed the message is one video"


def test_an_encoder_that_is_killed_before_the_end_loses_nothing(client: Client, tmp_path: Path) -> None:
    client.start(media=["mp4"])
    client.watch(1)
    (encoder,) = ffmpegs("pipe:1")
    encoder.kill()
    client.send("stop")
    ended = client.hear("ended")
    assert ended["reason"] == "stopped"
    again = next(message for message in client.heard if message["type"] == "media")
    path = tmp_path / "again.mp4"
    path.write_bytes(b"".join(client.media))
    assert len(read_frames(path)) == ended["frames"] - again["first_frame"]


def test_nothing_of_a_stopped_encoder_follows_the_news_of_the_next() -> None:
    async def scene() -> None:
        outgoing = Outgoing(asyncio.get_running_loop())
        old = MediaPipe(outgoing)
        old.write(bytes(LIMIT_BYTES))
        late = asyncio.create_task(asyncio.to_thread(old.write, b"late"))  # Waits: the client reads nothing.
        old.stop()
        with pytest.raises(Gone):
            await late
        outgoing.say("media")
        assert len(await outgoing.get() or "") == LIMIT_BYTES
        assert json.loads(await outgoing.get() or "") == {"type": "media"}
        MediaPipe(outgoing).write(b"new")
        assert await outgoing.get() == b"new"

    # In a thread of its own: where a browser's tests ran before, this thread has a running loop.
    runner = threading.Thread(target=lambda: done.append(asyncio.run(scene())))
    done: list[None] = []
    runner.start()
    runner.join(PATIENCE)
    assert done == [None]


def test_a_client_may_ask_for_pictures_instead(client: Client) -> None:
    client.start(media=["mp4"])
    client.hear("chunk")
    client.send("media", media=["jpeg"])
    changed = client.hear("media")
    assert changed["media"] == "jpeg"
    client.at(21)
    client.hear("chunk")
    assert int.from_bytes(client.media[0][:4], "big") == changed["first_frame"]


def test_a_job_from_request_to_file(server: Server) -> None:
    ask = {"prompt": "a red ball", "negatives": [{"text": "red"}], "seed": 4, "steps": 1, "first_chunk_steps": 2}
    with httpx.Client(base_url=server.address) as http:
        made = http.post("v1/videos", json=ask)
        assert made.status_code == 202
        address = f"v1/videos/{made.json()['id']}"
        done = eventually(lambda: (s := http.get(address).json())["status"] in ("done", "failed") and s)
        assert done["status"] == "done", done
        assert done["frames"] == done["total_frames"] == 21
        assert done["progress"] == 1
        assert done["effect"]["relative_change"] > 0
        path = server.state.folder / "job.mp4"
        path.write_bytes(http.get(done["content"]).content)
        assert len(read_frames(path)) == 21
        recipe = read_metadata(path)["nasa_video"]
        assert (recipe["seed"], recipe["first_chunk_steps"]) == (4, 2), "generate --from makes it again"
        path.unlink()
        assert http.delete(address).status_code == 204
        assert http.get(address).status_code == 404


def test_a_job_that_is_cancelled(server: Server) -> None:
    with httpx.Client(base_url=server.address) as http:
        key = http.post("v1/videos", json={"prompt": "a ball", "frames": 1197}).json()["id"]
        eventually(lambda: http.get(f"v1/videos/{key}").json()["frames"])
        assert http.delete(f"v1/videos/{key}").status_code == 204
        began = time.monotonic()
        eventually(lambda: http.get(f"v1/videos/{key}").json()["status"] == "cancelled", 5)
        assert time.monotonic() - began < 2
        assert not list(server.state.folder.glob("*.mp4"))
        assert http.get(f"v1/videos/{key}/content").status_code == 409


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"prompt": ""}, 422),
        ({"prompt": "a", "scale": 1e9}, 422),
        ({"prompt": "a", "output": "/tmp/x"}, 422),
        ({"prompt": "a", "model": "/etc"}, 422),
        ({"prompt": "a" * 3000}, 422),
    ],
)
def test_bad_requests(server: Server, body: dict[str, Any], status: int) -> None:
    assert httpx.post(f"{server.address}v1/videos", json=body).status_code == status


def test_a_job_that_cannot_be_made_says_why(server: Server) -> None:
    key = httpx.post(f"{server.address}v1/videos", json={"prompt": "a ball", "frames": 10}).json()["id"]
    answer = eventually(lambda: (s := httpx.get(f"{server.address}v1/videos/{key}").json())["error"] and s)
    assert answer["status"] == "failed"
    assert "use 9 or 21" in answer["error"]


def test_information(server: Server, model_folder: Path) -> None:
    health = httpx.get(f"{server.address}healthz").json()
    assert health["status"] == "ok"
    models = httpx.get(f"{server.address}models").json()
    assert models[0]["name"] == str(model_folder)
    assert models[0]["offered"]
    assert not any(model["offered"] for model in models[1:])
    api = httpx.get(f"{server.address}openapi.json").json()
    assert {"/healthz", "/models", "/v1/videos", "/v1/videos/{key}"} <= set(api["paths"])


def test_nothing_is_left_behind(server: Server, client_of: Any) -> None:
    def visit() -> None:
        client = client_of(server)
        client.start(media=["mp4"])
        client.watch(2)
        client.close()

    visit()
    eventually(lambda: server.state.sessions == 0)
    process = psutil.Process()

    def leftovers() -> tuple[int, int]:
        # Not all children: the browser of other tests lives as long as they all.
        return len(ffmpegs()), sum("stream" in thread.name for thread in threading.enumerate())

    eventually(lambda: leftovers() == (0, 0))
    files = process.num_fds()
    for _ in range(3):
        visit()
    eventually(lambda: leftovers() == (0, 0))
    eventually(lambda: process.num_fds() <= files + 2)
