"""Judges: whether a still or video shows a feature, and whether it shows what was asked for. A new one is one class.

judge = parse_judge("clip:ViT-L-14:openai")     # or "command:python my_judge.py", "http://127.0.0.1:8000/v1#MODEL"
answer = judge(frames, Question(prompt="a photo of a person", feature="male", alternatives=("female",)))

    @register_judge
    class Bright(Judge):                        # --judge bright:200
        name, spelling = "bright", "bright:LUMA"
        def __init__(self, above: str, options: JudgeOptions): ...
        def __call__(self, frames, question): return Answer(frames.mean() > self.above, None, {})
"""

# F frames, H W height and width; frames are uint8 (F, H, W, 3)

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import JsonValue

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation.clip import Backbone, Clip
from nasa_video.files.frames import Frames, check_frames

DEFAULT_CLIP = "ViT-L-14:openai"
FRAMES_LOOKED_AT = 4
"""Of a video, evenly spaced, by judges that look at single stills."""
KEY_VARIABLE = "NASA_VIDEO_JUDGE_KEY"
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


@dataclass(frozen=True)
class JudgeOptions:
    """How judges run: the device of models, and the seconds that a command or an endpoint has for one answer."""

    device: str | None = None
    timeout: float = 300.0


DEFAULT_OPTIONS = JudgeOptions()


class Judge:
    """Looks at samples one by one.

    Attributes:
        name: what ``--judge`` takes; spelling: with what stands behind the colon, for messages.
        identity: everything that its answers depend on, for the record and to know when to ask again.
        asks_held: whether it can say if the prompt is held.
        frames: how many frames of a video it looks at; None: all.
    """

    name: ClassVar[str]
    spelling: ClassVar[str]
    asks_held: ClassVar[bool] = False
    frames: ClassVar[int | None] = FRAMES_LOOKED_AT
    identity: dict[str, JsonValue]

    def __init__(self, text: str, options: JudgeOptions) -> None:
        """From what stands behind the colon; InputError where that is nothing that it can use."""
        raise NotImplementedError

    def __call__(self, frames: Frames, question: Question) -> Answer:
        """Judge a video (F, H, W, 3), or a still as a video of one frame."""
        raise NotImplementedError


JUDGES: dict[str, type[Judge]] = {}
"""Every registered judge by name."""


def register_judge(judge: type[Judge]) -> type[Judge]:
    """Make a judge known to ``--judge`` by its name; a decorator.

    Raises:
        InputError: it has no name, or one that another has.
    """
    name = getattr(judge, "name", "")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or JUDGES.get(name, judge).__qualname__ != judge.__qualname__:
        raise InputError(f"a judge needs a name of its own of lower-case letters, digits and hyphens, got {name!r}")
    JUDGES[name] = judge
    return judge


def parse_judge(text: str, options: JudgeOptions = DEFAULT_OPTIONS) -> Judge:
    """A judge by its spelling ``NAME`` or ``NAME:…``, or ``http://HOST/v1#MODEL``.

    Raises:
        InputError: none of the registered, or the judge cannot be had.
    """
    name, _, rest = text.partition(":")
    address = name in ("http", "https")
    if address or name in JUDGES:
        return JUDGES["http" if address else name](text if address else rest, options)
    raise InputError(f"the judge must be {', '.join(judge.spelling for judge in JUDGES.values())}, got {text!r}")


@register_judge
class SpritesFeatureJudge(Judge):
    """The shipped detectors of the sprites world, asked for one of its words ("red", "blurry", "moving left").

    Raises:
        InputError: (when asked) the feature is no word of that world.
    """

    name = spelling = "sprites"
    frames = None

    def __init__(self, text: str, options: JudgeOptions) -> None:
        from nasa_video.evaluation.benchmarks.removal import SpritesJudge, detector_hash

        self._judge = SpritesJudge()
        self.identity = {"judge": "sprites", "sha256": detector_hash()}

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


@register_judge
class ClipJudge(Judge):
    """Zero-shot classification: the feature against its alternatives, or against the prompt without it.

    With alternatives the texts are "a photo of FEATURE" and "a photo of ALTERNATIVE" each; without, "PROMPT, FEATURE"
    and "PROMPT". CLIP understands no negation ("without wheels" is near pictures of wheels), so nothing is negated. The
    feature is shown where its probability (softmax at the model's own scale, mean over the frames) is above one half.
    """

    name, spelling = "clip", "clip[:ARCHITECTURE:WEIGHTS]"

    def __init__(self, text: str, options: JudgeOptions) -> None:
        self._clip = Clip(Backbone.parse(text or DEFAULT_CLIP), options.device)
        self.identity = {"judge": "clip", **self._clip.identity, "threshold": 0.5}

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


@register_judge
class CommandJudge(Judge):
    """A program that is started once and answers line by line.

    For every question one JSON object on one line of its standard input::

        {"prompt": "…", "feature": "wheels", "frames": ["/tmp/…/0.png", …], "questions": ["…", …]}

    and for it one JSON object on one line of its standard output, with an answer to each question::

        {"answers": ["no", "yes"]}

    An answer is true or false, or a text that begins with yes or no; anything else is "unsure".

    Raises:
        InputError: it cannot be started.
    """

    name, spelling = "command", "command:PROGRAM"
    asks_held = True

    def __init__(self, text: str, options: JudgeOptions) -> None:
        self.identity = {"judge": "command", "command": text}
        self._words = shlex.split(text)
        if not self._words:
            raise InputError("--judge command:PROGRAM needs a program, such as command:python my_judge.py")
        self._timeout = options.timeout
        self._folder = tempfile.TemporaryDirectory(prefix="nasa-video-judge-")
        try:
            self._process = subprocess.Popen(
                self._words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError as error:
            raise InputError(f"the judge {self._words[0]!r} cannot be started: {error.strerror}") from error

    def __call__(self, frames: Frames, question: Question) -> Answer:
        from PIL import Image

        questions = questions_of(question)
        paths = [Path(self._folder.name, f"{index}.png") for index in range(len(check_frames(frames)))]
        for path, frame in zip(paths, frames, strict=True):
            Image.fromarray(frame).save(path)
        reply = self._ask(
            {"prompt": question.prompt, "feature": question.feature, "frames": [*map(str, paths)],
             "questions": questions}
        )  # fmt: skip
        try:
            answers = json.loads(reply)["answers"]
            if not isinstance(answers, list) or len(answers) != len(questions):
                raise ValueError
        except (ValueError, KeyError, TypeError) as error:
            raise NasaVideoError(
                f'the judge {self._words[0]!r} must answer with one line {{"answers": […]}}, one for each question; it '
                f"said {reply[:200]!r}"
            ) from error
        return answer_of(question, [_as_bool(one) for one in answers], [str(one)[:200] for one in answers])

    def close(self) -> None:
        """End the program."""
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):
            self._process.communicate(timeout=5)
        self._kill()
        self._process.wait()
        self._folder.cleanup()

    def __del__(self) -> None:
        if getattr(self, "_process", None) is not None:
            self.close()

    def _ask(self, request: dict[str, Any]) -> str:
        """One line for one line; writing, reading and a program's end are all waited for no longer than the limit."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        timer = threading.Timer(self._timeout, self._kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # it has closed its input
            line = b""
        if not line:
            self._process.wait()  # the timer is still running
        late = not timer.is_alive()
        timer.cancel()
        if line:
            return line.decode(errors="replace")
        if late:
            raise NasaVideoError(
                f"the judge {self._words[0]!r} gave no answer within {self._timeout:g} s; it must answer each line of "
                "its input with one line, at once (flush the output); --judge-timeout gives it longer"
            )
        status = self._process.returncode
        raise NasaVideoError(f"the judge {self._words[0]!r} ended with status {status} before it had answered")

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


@register_judge
class HttpJudge(Judge):
    """A vision-language model behind an endpoint with OpenAI's chat completions: ``http://HOST/v1#MODEL``.

    Stills are sent as PNG inside the request. The key of an endpoint that wants one is read from the environment
    (NASA_VIDEO_JUDGE_KEY) and is kept out of every record. Busy answers (429, 5xx) are tried again, ``_TRIES`` in all.
    """

    name, spelling = "http", "http://HOST/v1#MODEL"
    asks_held = True

    def __init__(self, text: str, options: JudgeOptions, pause: float = 2.0) -> None:
        url, _, self._model = text.partition("#")
        if not self._model:
            raise InputError("a judge at an endpoint needs the name of its model: --judge http://HOST:PORT/v1#MODEL")
        self._url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self._timeout, self._pause = options.timeout, pause
        self.identity = {"judge": "http", "url": self._url, "model": self._model, "prompt": INSTRUCTION}

    def __call__(self, frames: Frames, question: Question) -> Answer:
        stills = [{"type": "image_url", "image_url": {"url": _data_url(frame)}} for frame in check_frames(frames)]
        said = []
        for text in questions_of(question):
            content = [*stills, {"type": "text", "text": INSTRUCTION.format(question=text)}]
            said.append(self._ask([{"role": "user", "content": content}]))
        return answer_of(question, [_as_bool(reply) for reply in said], [reply[:200] for reply in said])

    def _ask(self, messages: list[dict[str, Any]]) -> str:
        reply = self._post({"model": self._model, "temperature": 0, "max_tokens": 16, "messages": messages})
        try:
            return str(json.loads(reply)["choices"][0]["message"]["content"])
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise NasaVideoError(
                f"{self._url} did not answer as chat completions do; it said {reply[:200]!r}"
            ) from error

    def _post(self, body: dict[str, Any]) -> str:
        import httpx

        key = os.environ.get(KEY_VARIABLE)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        for pause in [*(self._pause * 2**attempt for attempt in range(_TRIES - 1)), None]:
            try:
                reply = httpx.post(self._url, json=body, headers=headers, timeout=self._timeout)
                if reply.is_success:
                    return reply.text
                if pause is None or (reply.status_code != 429 and reply.status_code < 500):
                    said = " ".join(reply.text.split())[:200]
                    hint = f"; its key is read from {KEY_VARIABLE}" if reply.status_code in (401, 403) else ""
                    raise NasaVideoError(f"the judge {self._url} refuses (HTTP {reply.status_code}: {said}){hint}")
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                if pause is None:
                    raise NasaVideoError(f"the judge {self._url} cannot be reached: {error}") from error
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")


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
