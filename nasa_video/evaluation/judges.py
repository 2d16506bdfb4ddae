"""Judges: whether a picture or video shows a feature, and whether it shows what was asked for.

judge = parse_judge("clip:ViT-L-14:openai")     # or "command:python my_judge.py", "http://127.0.0.1:8000/v1"
answer = judge(frames, Question(prompt="a photo of a person", feature="male", alternatives=("female",)))

"""

# F frames, H W height and width; frames are uint8 (F, H, W, 3)

from __future__ import annotations

import base64
import io
import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pydantic import JsonValue

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation.clip import Backbone, Clip
from nasa_video.files.frames import Frames, check_frames

DEFAULT_CLIP = "ViT-L-14:openai"
FRAMES_LOOKED_AT = 4
"""Of a video, evenly spaced, by judges that look at single pictures."""
KEY_VARIABLE = "NASA_VIDEO_JUDGE_KEY"
PATIENCE = 300.0
"""Seconds that a command or an endpoint may take for one answer."""
_TRIES = 4


@dataclass(frozen=True)
class Question:
    """What is asked of one sample.

    Attributes:
        present: a question that "yes" answers where the prompt is held; None: it is not asked.
        absent: a question that "yes" answers where the feature is missing; None asks whether it is there.
        alternatives: what could be there instead of the feature.
    """

    prompt: str
    feature: str
    present: str | None = None
    absent: str | None = None
    alternatives: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a judge says; None is "unsure", which counts neither as removed nor as held.

    Attributes:
        shown: whether the feature is there.
        held: whether the prompt is held; None also where the judge was not asked or cannot say.
        detail: what the answer rests on, for the record.
    """

    shown: bool | None
    held: bool | None
    detail: dict[str, JsonValue]


class Judge(Protocol):
    """Looks at samples one by one."""

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Everything that its answers depend on, for the record and to know when an answer must be asked again."""
        ...

    @property
    def asks_held(self) -> bool:
        """Whether it can say if the prompt is held."""
        ...

    @property
    def frames(self) -> int | None:
        """How many frames of a video it looks at; None: all."""
        ...

    def __call__(self, frames: Frames, question: Question) -> Answer:
        """Judge a video, or a picture as a video of one frame."""
        ...


class SpritesFeatureJudge:
    """The shipped detectors of the sprites world, asked for one of its words ("red", "blurry", "moving left").

    Raises:
        InputError: (when asked) the feature is no word of that world.
    """

    asks_held = False
    frames: int | None = None

    def __init__(self) -> None:
        from nasa_video.evaluation.removal import SpritesJudge, detector_hash

        self._judge = SpritesJudge()
        self.identity: dict[str, JsonValue] = {"judge": "sprites", "sha256": detector_hash()}

    def __call__(self, frames: Frames, question: Question) -> Answer:
        from nasa_video.sprites.detectors import UNSURE, shows

        attribute, value = sprites_word(question.feature)
        label = self._judge([frames])[0][attribute]
        return Answer(None if label == UNSURE else shows(label, value), None, {"label": label})


def sprites_word(feature: str) -> tuple[str, str]:
    """The attribute and value that a word of the sprites world names.

    Raises:
        InputError: it is none.
    """
    from nasa_video.sprites.captions import TERMS

    for attribute, values in TERMS.items():
        for value, words in values.items():
            if feature.strip().lower() in words:
                return attribute, value
    known = ", ".join(words[0] for values in TERMS.values() for words in values.values())
    raise InputError(f"the sprites detectors do not know {feature!r}; they know {known}")


class ClipJudge:
    """Zero-shot classification: the feature against its alternatives, or against the prompt without it.

    With alternatives the texts are "a photo of FEATURE" and "a photo of ALTERNATIVE" each; without, "PROMPT, FEATURE"
    and "PROMPT". CLIP understands no negation ("without wheels" is near pictures of wheels), so nothing is negated. The
    feature is shown where its probability (softmax at the model's own scale, mean over the frames) is above one half.
    """

    asks_held = False
    frames: int | None = FRAMES_LOOKED_AT

    def __init__(self, clip: Clip) -> None:
        self._clip = clip
        self.identity: dict[str, JsonValue] = {"judge": "clip", **clip.identity, "threshold": 0.5}

    def __call__(self, frames: Frames, question: Question) -> Answer:
        texts = clip_texts(question)
        logits = self._clip.logit_scale * self._clip.pictures(list(frames)) @ self._clip.texts(texts).T
        probability = float(logits.softmax(dim=-1)[:, 0].mean())
        return Answer(probability > 0.5, None, {"probability": probability})


def clip_texts(question: Question) -> list[str]:
    """The texts that CLIP chooses among, the feature's first."""
    if question.alternatives:
        return [f"a photo of {text}" for text in (question.feature, *question.alternatives)]
    return [f"{question.prompt}, {question.feature}", question.prompt]


class CommandJudge:
    """A program that is started once and answers line by line.

    For every question one JSON object on one line of its standard input::

        {"prompt": "…", "feature": "wheels", "frames": ["/tmp/…/0.png", …], "questions": ["…", …]}

    and for it one JSON object on one line of its standard output, with an answer to each question::

        {"answers": ["no", "yes"]}

    An answer is true or false, or a text that begins with yes or no; anything else is "unsure".

    Raises:
        InputError: it cannot be started.
    """

    asks_held = True
    frames: int | None = FRAMES_LOOKED_AT

    def __init__(self, command: str, patience: float = PATIENCE) -> None:
        self.identity: dict[str, JsonValue] = {"judge": "command", "command": command}
        self._words = shlex.split(command)
        if not self._words:
            raise InputError("--judge command:PROGRAM needs a program, such as command:python my_judge.py")
        self._patience = patience
        self._folder = tempfile.TemporaryDirectory(prefix="nasa-video-judge-")
        try:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"the judge {self._words[0]!r} cannot be started: {error.strerror}") from error
        self._rest = b""

    def __call__(self, frames: Frames, question: Question) -> Answer:
        questions = questions_of(question)
        paths = self._save(frames)
        request = {"prompt": question.prompt, "feature": question.feature, "frames": paths, "questions": questions}
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
        except OSError as error:
            raise self._gone() from error
        reply = self._line().decode(errors="replace")
        try:
            answers = json.loads(reply)["answers"]
        except (ValueError, KeyError, TypeError) as error:
            raise self._wrong(reply) from error
        if not isinstance(answers, list) or len(answers) != len(questions):
            raise self._wrong(reply)
        return answer_of(question, [_as_bool(one) for one in answers], [str(one)[:200] for one in answers])

    def close(self) -> None:
        """End the program."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._folder.cleanup()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _save(self, frames: Frames) -> list[str]:
        from PIL import Image

        paths = [Path(self._folder.name, f"{index}.png") for index in range(len(check_frames(frames)))]
        for path, frame in zip(paths, frames, strict=True):
            Image.fromarray(frame).save(path)
        return [str(path) for path in paths]

    def _line(self) -> bytes:
        """One line of its output, waited for."""
        assert self._process.stdout is not None
        deadline = time.monotonic() + self._patience
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise NasaVideoError(
                    f"the judge {self._words[0]!r} gave no answer within {self._patience:g} s; it must answer each "
                    "line of its input with one line, at once (flush the output)"
                )
            part = self._process.stdout.read(1 << 16)
            if not part:
                raise self._gone()
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _gone(self) -> NasaVideoError:
        status = self._process.wait()
        return NasaVideoError(f"the judge {self._words[0]!r} ended with status {status} before it had answered")

    def _wrong(self, reply: str) -> NasaVideoError:
        return NasaVideoError(
            f'the judge {self._words[0]!r} must answer with one line {{"answers": […]}}, one for each question; it '
            f"said {reply[:200]!r}"
        )


class HttpJudge:
    """A vision-language model behind an endpoint with OpenAI's chat completions.

    Pictures are sent as PNG inside the request. The key of an endpoint that wants one is read from the environment
    (NASA_VIDEO_JUDGE_KEY) and is kept out of every record. Busy answers (429, 5xx) are tried again, ``_TRIES`` in all.

    Args:
        url: up to and with ``/v1``; ``/chat/completions`` is put behind it.
        model: the model's name there.
    """

    asks_held = True
    frames: int | None = FRAMES_LOOKED_AT

    def __init__(self, url: str, model: str, patience: float = PATIENCE, pause: float = 2.0) -> None:
        if not model:
            raise InputError("a judge at an endpoint needs the name of its model: --judge http://HOST:PORT/v1#MODEL")
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._model, self._patience, self._pause = model, patience, pause
        self.identity: dict[str, JsonValue] = {"judge": "http", "url": self._url, "model": model, "prompt": INSTRUCTION}

    def __call__(self, frames: Frames, question: Question) -> Answer:
        pictures: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in check_frames(frames)
        ]
        answers, said = [], []
        for text in questions_of(question):
            content = [*pictures, {"type": "text", "text": INSTRUCTION.format(question=text)}]
            reply = self._ask(content)
            answers.append(_as_bool(reply))
            said.append(reply[:200])
        return answer_of(question, answers, said)

    def _ask(self, content: list[dict[str, Any]]) -> str:
        messages = [{"role": "user", "content": content}]
        body = {"model": self._model, "temperature": 0, "max_tokens": 16, "messages": messages}
        reply = self._post(json.dumps(body).encode())
        try:
            return str(json.loads(reply)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise NasaVideoError(
                f"{self._url} did not answer as chat completions do; it said {reply[:200]!r}"
            ) from error

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {os.environ[KEY_VARIABLE]}"
        for attempt in range(1, _TRIES + 1):
            request = urllib.request.Request(self._url, body, headers)
            try:
                with urllib.request.urlopen(request, timeout=self._patience) as reply:
                    text: str = reply.read().decode(errors="replace")
                    return text
            except urllib.error.HTTPError as error:
                if (error.code != 429 and error.code < 500) or attempt == _TRIES:
                    raise self._refused(error) from error
            except (urllib.error.URLError, OSError) as error:
                if attempt == _TRIES:
                    reason = getattr(error, "reason", error)
                    raise NasaVideoError(f"the judge {self._url} cannot be reached: {reason}") from error
            time.sleep(self._pause * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _refused(self, error: urllib.error.HTTPError) -> NasaVideoError:
        said = " ".join(error.read().decode(errors="replace").split())[:200]
        key = f"; its key is read from {KEY_VARIABLE}" if error.code in (401, 403) else ""
        return NasaVideoError(f"the judge {self._url} refuses (HTTP {error.code}: {said}){key}")


INSTRUCTION = (
    "Look at the picture (or at these frames of one video) and answer with one word, yes or no. {question} "
    "If it cannot be seen clearly, answer unsure."
)


def questions_of(question: Question) -> list[str]:
    """The yes-no questions of a sample: first about the feature, then, where there is one, about the prompt."""
    first = question.absent or f"Does it show {question.feature}?"
    return [first] if question.present is None else [first, question.present]


def answer_of(question: Question, answers: Sequence[bool | None], said: Sequence[str]) -> Answer:
    """The answers to :func:`questions_of`, read as what they mean."""
    shown = answers[0]
    if shown is not None and question.absent is not None:
        shown = not shown
    detail: dict[str, JsonValue] = {"answers": list(said)}
    return Answer(shown, answers[1] if len(answers) > 1 else None, detail)


def parse_judge(text: str, device: str | None = None) -> Judge:
    """``sprites``, ``clip``, ``clip:ARCHITECTURE:WEIGHTS``, ``command:PROGRAM …`` or ``http://HOST/v1#MODEL``.

    Raises:
        InputError: none of these, or the judge cannot be had.
    """
    if text == "sprites":
        return SpritesFeatureJudge()
    if text == "clip" or text.startswith("clip:"):
        return ClipJudge(Clip(Backbone.parse(text.partition(":")[2] or DEFAULT_CLIP), device))
    if text.startswith("command:"):
        return CommandJudge(text.partition(":")[2])
    if text.startswith(("http://", "https://")):
        url, _, model = text.partition("#")
        return HttpJudge(url, model)
    raise InputError(
        f"the judge must be sprites, clip, clip:ARCHITECTURE:WEIGHTS, command:PROGRAM or http://HOST/v1#MODEL, "
        f"got {text!r}"
    )


def _as_bool(answer: Any) -> bool | None:
    if isinstance(answer, bool):
        return answer
    word = re.match(r"\W*(yes|no|true|false)\b", str(answer), re.IGNORECASE)
    return None if word is None else word[1].lower() in ("yes", "true")


def _data_url(frame: Frames) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
