"""Stage three: what a prompt leaves open is decided by the student's start noise, as in the data.

A student of distribution matching shows its favourites, whatever its noise (docs/variety.md). Here it learns to begin
as its teacher does, by following the flow from the noise that it has, and to end as its frozen copy does when the
prompt tells it what is there. Three lessons, one an iteration:

* *path*: of first chunks the first steps lead in one stride each to where many small ones of the teacher lead, with
  the noise that they have. What is decided on that way differs from noise to noise as much as in the data. (First step
  by the teacher's path and distribution matching for the rest: compare DP-DMD, arXiv 2602.03139.)
* *end*: of clips of the data, noised, the other steps lead to what the copy makes of them with a caption that states
  everything, whatever the student's own caption leaves open. Some are noised more than that, and brought back along the
  teacher's flow: what comes from there is smoother than noised clips are, and would be taken for blurry. Steps after
  the first begin from the student's own picture, so that it sharpens what it was unsure of.
* *later*: behind clean chunks, the same for the steps of later chunks, which have the copy's timesteps.

At one step there is no way to follow: it is kept *as before*, by matching the copy with the student's own caption. The
first timesteps of first chunks are no other sampler's, which tells the student what is asked of it.

Shape legend: B batch, T latent frames, C channels, h w latent height and width.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as nn_f
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.sprites.captions import caption_as_users_write, random_caption
from nasa_video.sprites.world import CLIP_CHUNKS
from nasa_video.text import TextEncoder
from nasa_video.training.attention import compile_blocks
from nasa_video.training.autoencoder import autocast
from nasa_video.training.checkpoint import Average
from nasa_video.training.dataset import Draw, LatentClips
from nasa_video.training.journal import Journal
from nasa_video.training.optimiser import MatrixOptimiser, block_matrix, warm_then_linear
from nasa_video.training.parallel import Team
from nasa_video.training.stage import Stage

Lesson = Literal["path", "end", "as before", "later"]


@dataclass(frozen=True)
class OpeningTraining:
    """Settings of the opening.

    `alone` maps a number of steps to the timesteps of first chunks; those above `euler_until`, where all of them meet,
    follow the flow. `path_calls` are the teacher's calls on its way there. `batch_size` are first chunks of one
    process, of whole clips a third as many. Shares are of the iterations; what they leave is for *end*, whose clips are
    noised to one of `end_levels`.
    """

    alone: dict[int, tuple[float, ...]] = field(default_factory=dict)
    euler_until: float = 500.0
    iterations: int = 600
    batch_size: int = 48
    matrix_rate: float = 1.2e-3
    other_rate: float = 8e-4
    average_decay: float = 0.98
    path_calls: int = 6
    path_share: float = 0.45
    end_levels: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8)
    later_share: float = 0.3
    as_before_share: float = 0.04
    checkpoint_every: int = 50
    sheet_every: int = 200

    def euler_steps(self, num_steps: int) -> int:
        """How many steps of a first chunk follow the flow."""
        return sum(t > self.euler_until for t in self.alone[num_steps])

    @property
    def ends(self) -> tuple[float, ...]:
        """The timesteps behind the path: the longest sampler's, of which the others have the first."""
        longest = max(self.alone)
        return self.alone[longest][self.euler_steps(longest) :]


@dataclass(frozen=True)
class OpeningDraw:
    """One iteration: its lesson, its clips, and captions, embedded: the student's and those that tell all.

    `chunk` is the one that counts of whole clips, `calls` the steps of the sampler before the one that counts, `level`
    what a clip is noised to.
    """

    lesson: Lesson
    index: list[int]
    embeds: NDArray[np.float32]
    told_embeds: NDArray[np.float32]
    chunk: int
    calls: int
    level: float
    seed: int


@dataclass(frozen=True, eq=False)
class OpeningDraws(Dataset[OpeningDraw]):
    """Draws by iteration: they follow from the seed and the iteration alone."""

    settings: OpeningTraining
    steps: dict[int, tuple[float, ...]]
    clips: LatentClips
    short_clips: LatentClips
    encoder: TextEncoder
    seed: int
    team: Team

    def __getitem__(self, step: int) -> OpeningDraw:
        settings = self.settings
        # the lesson is the same in the whole team, so that nobody waits
        plan = random.Random(self.seed * 5_000_011 + step)
        lesson = self._lesson(plan.random())
        clips = self.clips if lesson == "later" else self.short_clips
        size = max(1, settings.batch_size // CLIP_CHUNKS) if lesson == "later" else settings.batch_size
        most = max(self.steps) if lesson == "later" else len(settings.ends)
        chunk, calls = plan.randrange(1, CLIP_CHUNKS), plan.randrange(most)
        level = plan.choice(settings.end_levels)
        number = (self.seed * 11_000_003 + step) * self.team.size + self.team.rank
        rng = random.Random(number)
        index = rng.choices(clips.whole, k=size)
        captions = [caption_as_users_write(clips.rows[i], rng).text for i in index]
        told = [random_caption(clips.rows[i], rng, full=True).text for i in index]
        embeds, told_embeds = (self.encoder(texts).embeds.numpy() for texts in (captions, told))
        return OpeningDraw(lesson, index, embeds, told_embeds, chunk, calls, level, number)

    def _lesson(self, drawn: float) -> Lesson:
        settings = self.settings
        shares: tuple[tuple[Lesson, float], ...] = (
            ("path", settings.path_share),
            ("later", settings.later_share),
            ("as before", settings.as_before_share),
        )
        for lesson, share in shares:
            if drawn < share:
                return lesson
            drawn -= share
        return "end"


class Opening(Stage[OpeningDraw]):
    """The student, its frozen copy, their teacher, and one iteration."""

    PARTS = ("student", "optimiser", "average")

    def __init__(
        self,
        settings: OpeningTraining,
        steps: dict[int, tuple[float, ...]],
        student: CausalWan,
        teacher: CausalWan,
        clips: LatentClips,
        short_clips: LatentClips,
        encoder: TextEncoder,
        seed: int,
        team: Team,
    ) -> None:
        self.settings, self.steps, self.team, self.device = settings, steps, team, student.device
        self.clips, self.short_clips = clips.to(self.device), short_clips.to(self.device)
        self.draws = OpeningDraws(settings, steps, clips, short_clips, encoder, seed, team)
        self.told = copy.deepcopy(student).eval().requires_grad_(False)
        self.averaged = copy.deepcopy(self.told)  # not compiled: it is shown clips of any number
        self.teacher = teacher.eval().requires_grad_(False)
        self.student = student.requires_grad_(True)
        for model in (self.told, self.teacher, self.student):
            compile_blocks(model)
        rates = (settings.matrix_rate, settings.other_rate)
        self.optimiser = MatrixOptimiser(self.student, block_matrix, *rates, betas=(0.9, 0.95))
        self.average = Average(self.student, settings.average_decay)

    def train(self, folder: Path, journal: Journal, show: Callable[[CausalWan, int], None] | None = None) -> CausalWan:
        """Trains to the end and returns the student's average; resumes from `folder`/opening.pt."""
        return self.run(self.settings, self.averaged, folder / "opening.pt", journal, show)

    def iterate(self, step: int, drawn: OpeningDraw) -> dict[str, float]:
        """One update."""
        settings = self.settings
        generator = torch.Generator(self.device).manual_seed(drawn.seed)
        text, told = (torch.from_numpy(e).to(self.device) for e in (drawn.embeds, drawn.told_embeds))
        clips = self.clips if drawn.lesson == "later" else self.short_clips
        clean = clips.take(Draw(drawn.index, [])).latents
        if drawn.lesson == "path":
            values = self._follow(torch.randn(clean.shape, generator=generator, device=self.device), text)
        elif drawn.lesson == "later":
            values = self._later(clean, drawn, text, told, generator)
        elif drawn.lesson == "end":
            values = self._end(clean, drawn, text, told, generator)
        else:
            noise = torch.randn(clean.shape, generator=generator, device=self.device)
            values = {"as before": self._match(noise, self.steps[1][0], text, text)}
        self.team.average_gradients(self.student)
        gradient = self.optimiser.step(warm_then_linear(step / settings.iterations))
        self.average.update(self.student)
        return {name: float(value) for name, value in values.items()} | {"gradient": gradient}

    def _flow(self, model: CausalWan, x: Tensor, t: float, text: Tensor) -> Tensor:
        with autocast(self.device):
            flow: Tensor = model(x, t, text)
        return flow.float()

    def _match(self, x: Tensor, t: float, text: Tensor, told: Tensor) -> Tensor:
        """Error of the student's flow against the copy's, its gradient added."""
        with torch.no_grad():
            wanted = self._flow(self.told, x, t, told)
        return _add_gradient(nn_f.mse_loss(self._flow(self.student, x, t, text), wanted))

    def _follow(self, noise: Tensor, text: Tensor) -> dict[str, Tensor]:
        """Errors of all strides from the noise on."""
        settings, values = self.settings, {}
        strides = [
            (t, following, number == 0)
            for count, steps in settings.alone.items()
            for number, (t, following) in enumerate(pairwise(steps[: settings.euler_steps(count) + 1]))
        ]
        levels = sorted({following / 1000 for _, following, _ in strides}, reverse=True)
        places = {1.0: noise, **self._path(noise, 1.0, levels, text)}
        for t, following, first in strides:
            # a first chunk starts from nothing but noise, whatever its first timestep is called
            start, end = places[1.0 if first else t / 1000], places[following / 1000]
            wanted = (start - end) * (1000 / (t - following))
            error = nn_f.mse_loss(self._flow(self.student, start, t, text), wanted)
            values[f"path {t:g}"] = _add_gradient(error)
        return values

    @torch.no_grad()
    def _path(self, x: Tensor, level: float, levels: Sequence[float], text: Tensor) -> dict[float, Tensor]:
        """Where the teacher's flow leads from clips at a noise level, at each of these falling levels."""
        whole = 1 - self.settings.euler_until / 1000
        places, before = {}, None
        for start, end in pairwise((level, *levels)):
            calls = max(1, round(self.settings.path_calls * (start - end) / whole))
            way = (end - start) / calls
            for number in range(calls):
                flow = self._flow(self.teacher, x, 1000 * (start + number * way), text)
                # Adams-Bashforth of second order, with the stride before of another length
                slope = flow if before is None else flow + way / before[1] / 2 * (flow - before[0])
                x, before = x + way * slope, (flow, way)
            places[end] = x
        return places

    def _end(
        self, clean: Tensor, drawn: OpeningDraw, text: Tensor, told: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Error of one step behind the path, after the student's own steps from a clip of the data."""
        ends, calls, level = self.settings.ends, drawn.calls, drawn.level
        schedule, behind = FlowMatchSchedule(1.0, ends), ends[0] / 1000
        x = (1 - level) * clean + level * self._like(clean, generator)
        if level > behind:
            x = self._path(x, level, [behind], text)[behind]
        with torch.no_grad():
            for number in range(calls):
                flow = self._flow(self.student, x, ends[number], text)
                x = schedule.step(x, flow, number, partial(self._like, clean, generator))
        return {f"end {ends[calls]:g}": self._match(x, ends[calls], text, told)}

    def _later(
        self, clean: Tensor, drawn: OpeningDraw, text: Tensor, told: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Error of one step of a chunk behind clean ones, after the copy's steps."""
        timesteps = self.steps[max(self.steps)]
        schedule = FlowMatchSchedule(1.0, timesteps)
        frames = clean.shape[1] // CLIP_CHUNKS
        before = clean[:, : drawn.chunk * frames]
        fresh = partial(self._like, clean[:, :frames], generator)
        x = fresh()

        def flow_of(model: CausalWan, t: float, text: Tensor) -> Tensor:
            levels = torch.cat((torch.zeros_like(before[:, :, 0, 0, 0]), torch.full_like(x[:, :, 0, 0, 0], t)), 1)
            with autocast(self.device):
                flow: Tensor = model(torch.cat((before, x), 1), levels, text, frames_per_chunk=frames)
            return flow[:, -frames:].float()

        with torch.no_grad():
            for number in range(drawn.calls):
                flow = flow_of(self.told, timesteps[number], told)
                x = schedule.step(x, flow, number, fresh)
            wanted = flow_of(self.told, timesteps[drawn.calls], told)
        return {"later": _add_gradient(nn_f.mse_loss(flow_of(self.student, timesteps[drawn.calls], text), wanted))}

    def _like(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=self.device)


def _add_gradient(error: Tensor) -> Tensor:
    """The error, detached, after its backward pass: the graphs of several lessons need not be held at once."""
    error.backward()  # type: ignore[no-untyped-call]
    return error.detach()
