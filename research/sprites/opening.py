"""Stage three: what a prompt leaves open is decided by the student's start noise, as often as in the data.

A student of distribution matching shows its favourites, whatever its noise (docs/method/variety.md). Told what to show,
it shows it. Here it learns to tell itself, in first chunks, where all is settled. Three lessons:

* *open*: the first step leads in one stride to where many small ones of the teacher lead, with the noise that it has:
  what is settled on that way differs from noise to noise. There a detector that sees through noise reads what this
  looks most like (`research.sprites.reading`), and from there on the student does what its frozen copy does when a
  caption tells it all that was read. Where a caption states everything, stride and steps are the copy's own. (First
  step by the teacher's path: compare DP-DMD, arXiv 2602.03139.)
* *later*: behind clean chunks of the data, the student does what its copy does when told what they show.
* *as before*: at one step there is nothing to read; it is matched with the copy and the student's own caption.

The first timestep of first chunks is no other step's, which tells the student what is asked of it.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as nn_f
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.captions import Caption, leaves_open, random_caption
from nasa_video.sprites.world import Scenes, sample_scenes
from nasa_video.text import TextEncoder
from nasa_video.train.attention import compile_blocks
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.run import Report
from nasa_video.train.state import TrainState
from research.sprites.captions import caption_as_users_write
from research.sprites.dataset import Draw, LatentClips
from research.sprites.latent_detector import LatentDetector
from research.sprites.reading import Reader, left_open
from research.sprites.scenes import CLIP_CHUNKS
from research.sprites.stage import Stage, autocast, matrix_optimiser

Lesson = Literal["open", "later", "as before"]


@dataclass(frozen=True)
class OpeningTraining:
    """Settings of the opening.

    `first_timestep` is the timestep of the stride. `path_calls` are the teacher's calls on the way that it takes the
    place of; it is taught in `stride_share` of the iterations with a lesson *open*, of which the other shares leave the
    rest. `batch_size` are first chunks of one process, of whole clips a third as many. `lead` and `points_rate` are the
    reader's.
    """

    first_timestep: float = 990.0
    iterations: int = 600
    batch_size: int = 48
    matrix_rate: float = 8e-4
    other_rate: float = 5e-4
    average_decay: float = 0.98
    path_calls: int = 4
    stride_share: float = 0.5
    later_share: float = 0.2
    as_before_share: float = 0.14
    lead: float = 2.0
    points_rate: float = 0.3
    checkpoint_every: int = 50
    sheet_every: int = 200


@dataclass(frozen=True)
class OpeningDraw:
    """One iteration: its lesson, its captions, and scenes that they are true of, (B,) by name.

    *later* takes place behind the first `chunk` chunks of these `clips` of the data, of which the captions in
    `conditioned` say all. `calls` are the steps before the one that counts, `stride` is whether the first one counts.
    """

    lesson: Lesson
    captions: list[Caption]
    scenes: dict[str, NDArray[Any]]
    clips: list[int]
    conditioned: list[str]
    chunk: int
    calls: int
    stride: bool
    seed: int


@dataclass(frozen=True, eq=False)
class OpeningDraws(Dataset[OpeningDraw]):
    """Draws by iteration: they follow from the seed and the iteration alone."""

    settings: OpeningTraining
    steps: int
    clips: LatentClips
    seed: int
    context: DistributedContext

    def __getitem__(self, step: int) -> OpeningDraw:
        settings = self.settings
        # the lesson is the same in every process, so that nobody waits
        plan = random.Random(self.seed * 5_000_011 + step)
        lesson = self._lesson(plan.random())
        calls = plan.randrange(self.steps - 1)
        chunk, stride = plan.randrange(1, CLIP_CHUNKS), plan.random() < settings.stride_share
        number = (self.seed * 11_000_003 + step) * self.context.size + self.context.rank
        rng = random.Random(number)
        values, clips, conditioned = dict[str, NDArray[Any]](), list[int](), list[str]()
        if lesson == "later":
            calls = plan.randrange(self.steps)
            clips = rng.choices(self.clips.whole, k=max(1, settings.batch_size // CLIP_CHUNKS))
            captions = [caption_as_users_write(self.clips.rows[i], rng) for i in clips]
            conditioned = [
                all_of_it(caption, self.clips.rows[i], rng) for caption, i in zip(captions, clips, strict=True)
            ]
        else:
            scenes = sample_scenes(settings.batch_size, torch.Generator().manual_seed(number))
            captions = [caption_as_users_write(scenes.row(i), rng) for i in range(len(scenes))]
            values = {f.name: getattr(scenes, f.name).numpy() for f in fields(Scenes)}
        return OpeningDraw(lesson, captions, values, clips, conditioned, chunk, calls, stride, number)

    def _lesson(self, drawn: float) -> Lesson:
        settings = self.settings
        if drawn < settings.later_share:
            return "later"
        return "as before" if drawn < settings.later_share + settings.as_before_share else "open"


class Opening(Stage[OpeningDraw]):
    """The student, its frozen copy, their teacher, the reader, and one iteration.

    Args:
        settings: of this stage.
        steps: timesteps of the student's samplers by their number; those of more than one go on at the same one.
        student: distilled.
        teacher: what it was distilled from.
        detector: reads first chunks with as much noise as they have behind their first step.
        clips: whole ones of the data.
        encoder: of the captions.
        seed: decides all that is drawn.
        context: of processes.
    """

    PARTS = ("state", "reader")

    def __init__(
        self,
        settings: OpeningTraining,
        steps: dict[int, tuple[float, ...]],
        student: CausalWan,
        teacher: CausalWan,
        detector: LatentDetector,
        clips: LatentClips,
        encoder: TextEncoder,
        seed: int,
        context: DistributedContext,
    ) -> None:
        self.settings, self.context, self.device = settings, context, student.device
        # samplers of fewer steps have the first of these
        self.timesteps, self.encoder = steps[max(steps)], encoder
        self.schedule = FlowMatchSchedule(1.0, self.timesteps)
        self.clips, self.reader = clips.to(self.device), Reader(detector, settings.points_rate)
        self.draws = OpeningDraws(settings, len(self.timesteps), clips, seed, context)
        self.copied = copy.deepcopy(student).eval().requires_grad_(False)
        self.averaged = copy.deepcopy(self.copied)  # not compiled: it is shown clips of any number
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.requires_grad_(True)
        for model in (self.copied, self.teacher, self.student):
            compile_blocks(model)
        rates = (settings.matrix_rate, settings.other_rate)
        optimiser = matrix_optimiser(*rates, betas=(0.9, 0.95), flat=0.6)
        self.state = TrainState(self.student, optimiser, context, settings.average_decay)

    def train(
        self, folder: Path, report: Report | None = None, show: Callable[[CausalWan, int], None] | None = None
    ) -> CausalWan:
        """Trains to the end and returns the student's average; resumes from `folder`/opening.pt."""
        return self.run(self.settings, self.averaged, folder / "opening.pt", report, show)

    def iterate(self, step: int, drawn: OpeningDraw) -> dict[str, float]:
        """One update."""
        generator = torch.Generator(self.device).manual_seed(drawn.seed)
        text = self._embedded([caption.text for caption in drawn.captions])
        if drawn.lesson == "open":
            values = self._open(drawn, text, generator)
        elif drawn.lesson == "later":
            values = {"later": self._later(drawn, text, generator)}
        else:
            values = {"as before": self._match(self._noise(text, generator), self.timesteps[0], text, text)[0]}
        gradient = self.state.step(step / self.settings.iterations)
        return {name: float(value) for name, value in values.items()} | {"gradient": gradient}

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        return self.encoder(texts).embeds.to(self.device)

    def _noise(self, text: Tensor, generator: torch.Generator) -> Tensor:
        """Start noise of first chunks, (B, T, C, h, w)."""
        first = self.clips.latents[:1, : self.clips.latents.shape[1] // CLIP_CHUNKS]
        return torch.randn(len(text), *first.shape[1:], generator=generator, device=self.device)

    def _flow(self, model: CausalWan, x: Tensor, t: float, text: Tensor) -> Tensor:
        with autocast(self.device):
            flow: Tensor = model(x, t, text)
        return flow.float()

    def _match(self, x: Tensor, t: float, text: Tensor, conditioned: Tensor) -> tuple[Tensor, Tensor]:
        """Error of the student's flow against the copy's, its gradient added, and that flow."""
        with torch.no_grad():
            wanted = self._flow(self.copied, x, t, conditioned)
        flow = self._flow(self.student, x, t, text)
        return _add_gradient(nn_f.mse_loss(flow, wanted)), flow.detach()

    def _open(self, drawn: OpeningDraw, text: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Errors of the stride and of one step behind it."""
        first, timesteps, values = self.settings.first_timestep, self.timesteps[1:], {}
        noise = self._noise(text, generator)
        x = self._begin(noise, text, drawn.captions)
        if drawn.stride:
            # a first chunk starts from nothing but noise, whatever its first timestep is called
            wanted = (noise - x) * (1000 / (first - timesteps[0]))
            values["stride"] = _add_gradient(nn_f.mse_loss(self._flow(self.student, noise, first, text), wanted))
        scenes = Scenes(**{name: torch.from_numpy(value) for name, value in drawn.scenes.items()})
        is_open = left_open([caption.stated for caption in drawn.captions])
        shown = self.reader.read(self.reader.scores(x), scenes, is_open)
        fresh = partial(torch.randn, x.shape, generator=generator, device=self.device)
        with torch.no_grad():
            for number in range(drawn.calls):
                flow = self._flow(self.student, x, timesteps[number], text)
                picture = self.schedule.to_x0(x, flow, timesteps[number])
                x = self.schedule.add_noise(picture, fresh(), timesteps[number + 1])
        if drawn.calls:
            shown = self.reader.look(self.reader.scores(picture), shown, self.settings.lead, scenes, is_open)
        rng = random.Random(drawn.seed)
        conditioned = self._embedded(
            [all_of_it(caption, shown.row(i), rng) for i, caption in enumerate(drawn.captions)]
        )
        t = timesteps[drawn.calls]
        values[f"step {t:g}"], flow = self._match(x, t, text, conditioned)
        if t == timesteps[-1]:
            finished = self.reader.scores(self.schedule.to_x0(x, flow, t))
            self.reader.count(finished, scenes, is_open)
        return values

    @torch.no_grad()
    def _begin(self, noise: Tensor, text: Tensor, captions: Sequence[Caption]) -> Tensor:
        """First chunks behind their first step: on the teacher's path, or where a caption states all, on the copy's."""
        level = self.timesteps[1] / 1000
        stride = noise + (level - 1) * self._flow(self.copied, noise, self.timesteps[0], text)
        everything = torch.tensor([not leaves_open(caption.stated) for caption in captions], device=self.device)
        return torch.where(everything[:, None, None, None, None], stride, self._path(noise, level, text))

    def _path(self, x: Tensor, level: float, text: Tensor) -> Tensor:
        """Where the teacher's flow leads from noise to a noise level."""
        calls, before = self.settings.path_calls, None
        way = (level - 1) / calls
        for number in range(calls):
            flow = self._flow(self.teacher, x, 1000 * (1 + number * way), text)
            # Adams-Bashforth of second order
            x, before = x + way * (flow if before is None else 1.5 * flow - 0.5 * before), flow
        return x

    def _later(self, drawn: OpeningDraw, text: Tensor, generator: torch.Generator) -> Tensor:
        """Error of one step of a chunk behind clean ones, after the copy's steps."""
        clean = self.clips.take(Draw(drawn.clips, [])).latents
        conditioned = self._embedded(drawn.conditioned)
        frames = clean.shape[1] // CLIP_CHUNKS
        before, x = clean[:, : drawn.chunk * frames], self._noise(text, generator)
        fresh = partial(torch.randn, x.shape, generator=generator, device=self.device)

        def flow_of(model: CausalWan, t: float, text: Tensor) -> Tensor:
            levels = torch.cat((torch.zeros_like(before[:, :, 0, 0, 0]), torch.full_like(x[:, :, 0, 0, 0], t)), 1)
            with autocast(self.device):
                flow: Tensor = model(torch.cat((before, x), 1), levels, text, frames_per_chunk=frames)
            return flow[:, -frames:].float()

        with torch.no_grad():
            for number in range(drawn.calls):
                flow = flow_of(self.copied, self.timesteps[number], conditioned)
                x = self.schedule.step(x, flow, number, fresh)
            wanted = flow_of(self.copied, self.timesteps[drawn.calls], conditioned)
        t = self.timesteps[drawn.calls]
        return _add_gradient(nn_f.mse_loss(flow_of(self.student, t, text), wanted))


def all_of_it(caption: Caption, row: Mapping[str, int], rng: random.Random) -> str:
    """A caption that states all there is in a scene: this one where it does so already."""
    return random_caption(row, rng, full=True).text if leaves_open(caption.stated) else caption.text


def _add_gradient(error: Tensor) -> Tensor:
    """The error, detached, after its backward pass: the graphs of several lessons need not be held at once."""
    error.backward()  # type: ignore[no-untyped-call]
    return error.detach()
