"""Judges: a command, an endpoint, CLIP, the sprites detectors; and what each says when something is wrong with it."""

from __future__ import annotations

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation import judges
from nasa_video.evaluation.judges import (
    DEFAULT_OPTIONS,
    KEY_VARIABLE,
    Answer,
    ClipJudge,
    CommandJudge,
    HttpJudge,
    Judge,
    JudgeOptions,
    Question,
    answer_of,
    clip_texts,
    parse_judge,
    questions_of,
    register_judge,
    sprites_word,
)

RED = np.zeros((2, 8, 8, 3), np.uint8) + np.array([255, 0, 0], np.uint8)
BLUE = np.zeros((2, 8, 8, 3), np.uint8) + np.array([0, 0, 255], np.uint8)
SAILS = Question("a boat", "sails", "Is it a boat?", "Are the sails missing?")

# Says that "red" is there where the first frame is red, and that every prompt is held.
JUDGE = """
import json, sys
from PIL import Image
for line in sys.stdin:
    asked = json.loads(line)
    red = Image.open(asked["frames"][0]).getpixel((0, 0))[0] > 128
    answers = [red] + ["Yes."] * (len(asked["questions"]) - 1)
    print(json.dumps({"answers": answers}), flush=True)
"""


def command(tmp_path: Path, program: str, **settings: Any) -> CommandJudge:
    path = tmp_path / "judge.py"
    path.write_text(program)
    return CommandJudge(f"{sys.executable} {path}", JudgeOptions(**settings))


def test_questions_and_what_their_answers_mean() -> None:
    assert questions_of(Question("p", "a hat")) == ["Does it show a hat?"]
    assert questions_of(SAILS) == ["Are the sails missing?", "Is it a boat?"]
    assert answer_of(Question("p", "a hat"), [True], ["yes"]).shown is True
    assert answer_of(SAILS, [True, True], ["yes", "yes"]) == Answer(False, True, {"answers": ["yes", "yes"]})
    assert answer_of(SAILS, [None, False], ["hm", "no"]).shown is None


def test_a_command_answers_line_by_line(tmp_path: Path) -> None:
    judge = command(tmp_path, JUDGE)
    question = Question("a ball", "red", "Is there a ball?")
    assert judge(RED, question) == Answer(True, True, {"answers": ["True", "Yes."]})
    assert judge(BLUE, question) == Answer(False, True, {"answers": ["False", "Yes."]})
    process = judge._process
    judge.close()
    assert process.poll() is not None


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(3)", "ended with status 3"),
        ("import sys\nfor line in sys.stdin: print('hello', flush=True)", "must answer with one line"),
        ("import sys\nfor line in sys.stdin: print('{\"answers\": []}', flush=True)", "one for each question"),
        ("import sys\nfor line in sys.stdin: pass", "gave no answer within 1 s"),
        ("import os, time\nos.close(1)\ntime.sleep(60)", "gave no answer within 1 s"),
        ("import subprocess\nsubprocess.run(['sleep', '60'])", "gave no answer within 1 s"),
    ],
)
def test_a_command_that_does_not_answer(tmp_path: Path, program: str, message: str) -> None:
    with pytest.raises(NasaVideoError, match=message):
        command(tmp_path, program, timeout=1)(RED, SAILS)


def test_a_command_that_is_none() -> None:
    with pytest.raises(InputError, match=r"cannot be started"):
        CommandJudge("/nowhere/judge --fast", DEFAULT_OPTIONS)
    with pytest.raises(InputError, match="needs a program"):
        CommandJudge(" ", DEFAULT_OPTIONS)


class Endpoint(HTTPServer):
    """Chat completions that say "no" to red pictures; the first ``busy`` requests are turned away."""

    def __init__(self, busy: int = 0, status: int = 503, text: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.busy, self.status, self.text = busy, status, text
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.keys.append(self.headers.get("Authorization"))
        if self.server.busy:
            self.server.busy -= 1
            self._answer(self.server.status, b"no room")
            return
        asked = json.loads(body)
        self.server.requests.append(asked)
        content = asked["messages"][0]["content"]
        url = content[0]["image_url"]["url"]
        picture = Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2])))
        said = self.server.text or ("No, it is not." if picture.getpixel((0, 0)) == (255, 0, 0) else "yes")
        self._answer(200, json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: Any) -> None:
        pass


@pytest.fixture
def endpoints() -> Iterator[Any]:
    started: list[Endpoint] = []

    def start(**settings: Any) -> tuple[Endpoint, str]:
        server = Endpoint(**settings)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        started.append(server)
        return server, f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in started:
        server.shutdown()
        server.server_close()


def test_an_endpoint_is_asked_with_pictures(endpoints: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    server, url = endpoints(busy=2)
    judge = HttpJudge(f"{url}#some-vlm", DEFAULT_OPTIONS, pause=0.01)
    assert judge(RED, SAILS).shown is True, "the sails are not missing"
    assert judge(BLUE, SAILS) == Answer(False, True, {"answers": ["yes", "yes"]})
    assert server.keys[0] == "Bearer secret"
    asked = server.requests[0]
    assert (asked["model"], asked["temperature"]) == ("some-vlm", 0)
    assert [part["type"] for part in asked["messages"][0]["content"]] == ["image_url", "image_url", "text"]
    assert "Are the sails missing?" in asked["messages"][0]["content"][-1]["text"]
    assert "secret" not in json.dumps(judge.identity)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"busy": 9, "status": 500}, "HTTP 500: no room"),
        ({"busy": 9, "status": 401}, f"HTTP 401.*{KEY_VARIABLE}"),
    ],
)
def test_an_endpoint_that_refuses(endpoints: Any, settings: dict[str, Any], message: str) -> None:
    server, url = endpoints(**settings)
    with pytest.raises(NasaVideoError, match=message):
        HttpJudge(f"{url}#m", DEFAULT_OPTIONS, pause=0.01)(RED, SAILS)
    assert len(server.keys) == (4 if settings["status"] == 500 else 1), "what will not change is not asked again"


def test_an_endpoint_that_rambles_or_is_not_there(endpoints: Any) -> None:
    _, url = endpoints(text="It depends on the light.")
    assert HttpJudge(f"{url}#m", DEFAULT_OPTIONS)(RED, SAILS).shown is None
    with pytest.raises(NasaVideoError, match="cannot be reached"):
        HttpJudge("http://127.0.0.1:1/v1#m", DEFAULT_OPTIONS, pause=0.01)(RED, SAILS)
    with pytest.raises(InputError, match="#MODEL"):
        parse_judge("http://127.0.0.1:1/v1")
    with pytest.raises(InputError, match="the judge must be sprites, clip"):
        parse_judge("oracle")


class FakeClip:
    """Red pictures are near "…, red" and "a photo of red"; everything else is near every other text."""

    identity: dict[str, Any] = {"architecture": "fake"}  # noqa: RUF012
    logit_scale = 10.0

    def pictures(self, pictures: list[np.ndarray[Any, Any]]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if picture[0, 0, 0] > 128 else [0.0, 1.0] for picture in pictures])

    def texts(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[1.0, 0.0] if text.endswith("red") else [0.0, 1.0] for text in texts])


def test_clip_chooses_between_the_feature_and_what_else_it_could_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "Clip", lambda backbone, device: FakeClip())
    judge = parse_judge("clip")
    assert isinstance(judge, ClipJudge)
    question = Question("a ball", "red")
    assert clip_texts(question) == ["a ball, red", "a ball"]
    assert clip_texts(Question("a ball", "red", alternatives=("blue",))) == ["a photo of red", "a photo of blue"]
    assert judge(RED, question).shown is True
    answer = judge(BLUE, question)
    assert answer.shown is False
    assert answer.held is None
    assert answer.detail["probability"] == pytest.approx(1 / (1 + np.exp(10)), rel=1e-3)


def test_the_sprites_detectors_know_the_words_of_their_world() -> None:
    assert sprites_word("Red") == ("colour", "red")
    assert sprites_word("moving left") == ("motion", "left")
    with pytest.raises(InputError, match="do not know 'sails'"):
        sprites_word("sails")


def test_the_sprites_detectors_judge_a_rendered_scene() -> None:
    from nasa_video.files.frames import frames_from_tensor
    from nasa_video.sprites.world import COLOURS, sample_scenes
    from research.sprites.renderer import render

    scenes = sample_scenes(1, torch.Generator().manual_seed(3)).replace(count=0, blurry=0, dim=0, noisy=0)
    frames = frames_from_tensor(render(scenes, 21)[0])
    judge = parse_judge("sprites")
    shown = {colour: judge(frames, Question("p", colour)).shown for colour in COLOURS}
    true = COLOURS[int(scenes.colour)]
    assert shown[true] is True
    assert sum(value is True for value in shown.values()) == 1


def test_a_new_judge_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judges, "JUDGES", dict(judges.JUDGES))

    @register_judge
    class Bright(Judge):
        name, spelling = "bright", "bright:LUMA"

        def __init__(self, text: str, options: JudgeOptions) -> None:
            self.above = float(text)
            self.identity = {"judge": "bright", "above": self.above}

        def __call__(self, frames: Any, question: Question) -> Answer:
            return Answer(bool(frames.mean() > self.above), None, {})

    assert parse_judge("bright:80")(RED, SAILS).shown is True
    assert parse_judge("bright:90")(RED, SAILS).shown is False
    with pytest.raises(InputError, match="bright:LUMA"):
        parse_judge("oracle")

    class Clip(Bright):
        name = "clip"

    with pytest.raises(InputError, match="a name of its own"):
        register_judge(Clip)
