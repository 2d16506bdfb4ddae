"""Stage three: what a prompt leaves open is decided by the student's start noise, as often as in the data.

A student of distribution matching shows its favourites, whatever its noise (docs/variety.md). Told what to show, it
shows it. Here it learns to tell itself, in first chunks, where all is settled. Three lessons:

* *open*: the first step leads in one stride to where many small ones of the teacher lead, with the noise that it has:
  what is settled on that way differs from noise to noise. There a detector that sees through noise reads what this
  looks most like (`nasa_video.training.reading`), and from there on the student does what its frozen copy does when a
  caption tells it all that was read. Where a caption states everything, stride and steps are the copy's own. (First
  step by the teacher's path: compare DP-DMD, arXiv 2602.03139.) In some iterations the stride is the student's own,
  guided away from negatives: that leads elsewhere, and there the student must not see flaws that nobody asked for.
* *later*: behind clean chunks of the data, the student does what its copy does when told what the clip shows. In some
  clips it is the prompt that changes there.
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

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise
from nasa_video.attention import SdpaAttend
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.guidance import CentredNasa, Nag, Nasa, Vsf
from nasa_video.sprites.captions import (
    TERMS,
    Caption,
    caption_as_users_write,
    leaves_open,
    random_caption,
    switched_captions,
    term,
    value_names,
)
from nasa_video.sprites.world import ATTRIBUTES, CLIP_CHUNKS, Scenes, sample_scenes
from nasa_video.steering import Steering
from nasa_video.text import TextEncoder
from nasa_video.training.attention import compile_blocks
from nasa_video.training.autoencoder import autocast
from nasa_video.training.checkpoint import Average
from nasa_video.training.dataset import Draw, LatentClips
from nasa_video.training.journal import Journal
from nasa_video.training.latent_detector import LatentDetector
from nasa_video.training.optimiser import MatrixOptimiser, block_matrix, warm_then_linear
from nasa_video.training.parallel import Team
from nasa_video.training.reading import Reader, left_open
from nasa_video.training.stage import Stage

Lesson = Literal["open", "later", "as before"]
STEERED_BY = (Nasa(1.25), CentredNasa(0.5, conflict=2.0), Nag(4.0, negative_padding=False), Vsf(1.4))
"""Guidance of first steps: of every method what the removal table found best."""
UNREMARKABLE = frozenset({"none", "plain", "one"})
FULL_CHANGES = 0.3
"""Share of changing prompts that state everything."""


@dataclass(frozen=True)
class OpeningTraining:
    """Settings of the opening.

    `first_timestep` is the timestep of the stride. `path_calls` are the teacher's calls on the way that it takes the
    place of; it is taught in `stride_share` of the iterations with a lesson *open*, of which the other shares leave the
    rest. `batch_size` are first chunks of one process, of whole clips a third as many; in `switching_share` of them the
    prompt changes. `lead` and `points_rate` are the reader's; every `count_every` iterations it counts what the student
    shows. In `steered_share` of the iterations with a lesson *open* the stride is guided, and not taught.
    """

    first_timestep: float = 990.0
    iterations: int = 600
    batch_size: int = 48
    matrix_rate: float = 8e-4
    other_rate: float = 5e-4
    average_decay: float = 0.98
    path_calls: int = 4
    stride_share: float = 0.5
    steered_share: float = 0.5
    later_share: float = 0.2
    as_before_share: float = 0.14
    switching_share: float = 0.4
    count_every: int = 4
    lead: float = 2.0
    points_rate: float = 0.3
    checkpoint_every: int = 50
    sheet_every: int = 200


@dataclass(frozen=True)
class OpeningDraw:
    """One iteration: its lesson, its captions, and scenes that they are true of, (B,) by name.

    *later* takes place behind the first `chunk` chunks of these `clips` of the data. It has captions for each of their
    chunks (B * (`chunk` + 1), a clip's side by side), and `told` say all of what they are about. `calls` are the steps
    before the one that counts, `stride` is whether the first one counts, too. `negatives` are what the stride is guided
    away from, an attribute and a value of each scene; without, it is not guided.
    """

    lesson: Lesson
    captions: list[Caption]
    scenes: dict[str, NDArray[Any]]
    clips: list[int]
    told: list[str]
    chunk: int
    calls: int
    stride: bool
    negatives: list[tuple[str, str]]
    seed: int


@dataclass(frozen=True, eq=False)
class OpeningDraws(Dataset[OpeningDraw]):
    """Draws by iteration: they follow from the seed and the iteration alone."""

    settings: OpeningTraining
    steps: int
    clips: LatentClips
    seed: int
    team: Team

    def __getitem__(self, step: int) -> OpeningDraw:
        settings = self.settings
        # the lesson is the same in the whole team, so that nobody waits
        plan = random.Random(self.seed * 5_000_011 + step)
        lesson = self._lesson(plan.random())
        calls = plan.randrange(self.steps - 1)
        chunk, stride = plan.randrange(1, CLIP_CHUNKS), plan.random() < settings.stride_share
        steered = lesson == "open" and plan.random() < settings.steered_share
        number = (self.seed * 11_000_003 + step) * self.team.size + self.team.rank
        rng = random.Random(number)
        values, clips, told, negatives = dict[str, NDArray[Any]](), list[int](), list[str](), list[tuple[str, str]]()
        if lesson == "later":
            calls = plan.randrange(self.steps)
            share = settings.switching_share if self.clips.switching else 0.0
            pools = [
                self.clips.switching if rng.random() < share else self.clips.whole
                for _ in range(max(1, settings.batch_size // CLIP_CHUNKS))
            ]
            clips = [rng.choice(pool) for pool in pools]
            told_too = [pair for clip in clips for pair in self._captions(clip, chunk, rng)]
            captions, told = [caption for caption, _ in told_too], [text for _, text in told_too]
        else:
            scenes = sample_scenes(settings.batch_size, torch.Generator().manual_seed(number))
            captions = [caption_as_users_write(scenes.row(i), rng) for i in range(len(scenes))]
            values = {f.name: getattr(scenes, f.name).numpy() for f in fields(Scenes)}
            if steered:
                pairs = zip(captions, range(len(scenes)), strict=True)
                negatives = [a_negative(caption, scenes.row(i), rng) for caption, i in pairs]
        return OpeningDraw(
            lesson, captions, values, clips, told, chunk, calls, stride and not steered, negatives, number
        )

    def _captions(self, clip: int, chunk: int, rng: random.Random) -> list[tuple[Caption, str]]:
        """For chunks 0 to `chunk` of a clip: what a user writes, and all of it told."""
        rows, change = [self.clips.rows[clip], self.clips.later_rows[clip]], self.clips.chunk[clip]
        if change == 0:
            captions = [caption_as_users_write(rows[0], rng)]
        elif rng.random() < FULL_CHANGES:
            captions = [random_caption(row, rng, full=True) for row in rows]
        else:
            captions = [Caption(text, frozenset()) for text in switched_captions(rows[0], rows[1], rng)]
        pairs = [(caption, all_told(caption, row, rng)) for caption, row in zip(captions, rows, strict=False)]
        return [pairs[number >= change > 0] for number in range(chunk + 1)]

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
        team: of processes.
    """

    PARTS = ("student", "optimiser", "average", "reader", "steered_reader")

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
        team: Team,
    ) -> None:
        self.settings, self.team, self.device = settings, team, student.device
        # samplers of fewer steps have the first of these
        self.timesteps, self.encoder = steps[max(steps)], encoder
        alone = FlowMatchSchedule(1.0, (settings.first_timestep, *self.timesteps[1:]), euler_steps=1)
        self.schedule = FlowMatchSchedule(1.0, self.timesteps, alone=alone)
        self.clips, self.reader = clips.to(self.device), Reader(detector, settings.points_rate)
        self.steered_reader = Reader(detector, settings.points_rate)  # guidance likes other values
        self.draws = OpeningDraws(settings, len(self.timesteps), clips, seed, team)
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
        generator = torch.Generator(self.device).manual_seed(drawn.seed)
        text = self._embedded([caption.text for caption in drawn.captions])
        if drawn.lesson == "open":
            values = self._open(drawn, text, generator)
        elif drawn.lesson == "later":
            values = {"later": self._later(drawn, text, generator)}
        else:
            noise = self._noise(len(text), generator)
            values = {"as before": self._match(noise, self.timesteps[0], text, text)[0]}
        self.team.average_gradients(self.student)
        gradient = self.optimiser.step(warm_then_linear(step / self.settings.iterations, flat=0.6))
        self.average.update(self.student)
        if drawn.lesson == "open" and not drawn.negatives and step % self.settings.count_every == 0:
            self._count(drawn, text)
        return {name: float(value) for name, value in values.items()} | {"gradient": gradient}

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        return self.encoder(texts).embeds.to(self.device)

    def _noise(self, count: int, generator: torch.Generator) -> Tensor:
        """Start noise of so many chunks, (B, T, C, h, w)."""
        first = self.clips.latents[:1, : self.clips.latents.shape[1] // CLIP_CHUNKS]
        return torch.randn(count, *first.shape[1:], generator=generator, device=self.device)

    def _flow(self, model: CausalWan, x: Tensor, t: float, text: Tensor) -> Tensor:
        with autocast(self.device):
            flow: Tensor = model(x, t, text)
        return flow.float()

    def _match(self, x: Tensor, t: float, text: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Error of the student's flow against the copy's, its gradient added, and that flow."""
        with torch.no_grad():
            wanted = self._flow(self.told, x, t, told)
        flow = self._flow(self.student, x, t, text)
        return _add_gradient(nn_f.mse_loss(flow, wanted)), flow.detach()

    def _open(self, drawn: OpeningDraw, text: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Errors of the stride and of one step behind it."""
        first, timesteps, values = self.settings.first_timestep, self.timesteps[1:], {}
        noise, reader = self._noise(len(text), generator), self.steered_reader if drawn.negatives else self.reader
        x = self._steer(noise, text, drawn) if drawn.negatives else self._begin(noise, text, drawn.captions)
        if drawn.stride:
            # a first chunk starts from nothing but noise, whatever its first timestep is called
            wanted = (noise - x) * (1000 / (first - timesteps[0]))
            values["stride"] = _add_gradient(nn_f.mse_loss(self._flow(self.student, noise, first, text), wanted))
        scenes, is_open = _scenes(drawn)
        shown = reader.read(_without(reader.scores(x), drawn.negatives), scenes, is_open)
        fresh = partial(torch.randn, x.shape, generator=generator, device=self.device)
        with torch.no_grad():
            for number in range(drawn.calls):
                flow = self._flow(self.student, x, timesteps[number], text)
                picture = self.schedule.to_x0(x, flow, timesteps[number])
                x = self.schedule.add_noise(picture, fresh(), timesteps[number + 1])
        if drawn.calls:
            seen = _without(reader.scores(picture), drawn.negatives)
            shown = reader.look(seen, shown, self.settings.lead, scenes, is_open)
        rng = random.Random(drawn.seed)
        told = self._embedded([all_told(caption, shown.row(i), rng) for i, caption in enumerate(drawn.captions)])
        t = timesteps[drawn.calls]
        values[f"{'steered' if drawn.negatives else 'step'} {t:g}"], flow = self._match(x, t, text, told)
        if drawn.negatives and t == timesteps[-1]:
            reader.count(reader.scores(self.schedule.to_x0(x, flow, t)), scenes, is_open)
        return values

    @torch.no_grad()
    def _steer(self, noise: Tensor, text: Tensor, drawn: OpeningDraw) -> Tensor:
        """First chunks behind a first step of the student's average, guided in one of the methods' ways."""
        self.average.copy_to(self.averaged)
        transformer = self.averaged.transformer
        guidance = random.Random(drawn.seed).choice(STEERED_BY)
        context = self.encoder([term(*negative) for negative in drawn.negatives])
        keys = prompt_keys(transformer, context, padding=guidance.negative_padding)
        steering = Steering(SdpaAttend(), self.averaged.num_layers, guidance, negatives=[(keys, 1.0)])
        first, second = self.settings.first_timestep, self.timesteps[1]
        with install(transformer, steering):
            flow: Tensor = self.averaged(noise, first, text)
        return noise + (second - first) / 1000 * flow

    @torch.no_grad()
    def _count(self, drawn: OpeningDraw, text: Tensor) -> None:
        """Moves the reader's points by what the student's average makes of captions, from first to last chunk."""
        self.average.copy_to(self.averaged)
        length, channels, height, width = self.clips.latents.shape[1:]
        seeds = range(drawn.seed * len(text), (drawn.seed + 1) * len(text))
        noise = SeededNoise(seeds, (channels, height, width), self.device)
        sampler = ChunkSampler(self.averaged, self.schedule, length // CLIP_CHUNKS)
        with autocast(self.device):
            chunks = [chunk.float() for chunk in sampler.stream(text, noise, num_frames=length)]
        self.reader.count(self.reader.scores(torch.cat(chunks, 1)), *_scenes(drawn))

    @torch.no_grad()
    def _begin(self, noise: Tensor, text: Tensor, captions: Sequence[Caption]) -> Tensor:
        """First chunks behind their first step: on the teacher's path, or where a caption states all, on the copy's."""
        level = self.timesteps[1] / 1000
        stride = noise + (level - 1) * self._flow(self.told, noise, self.timesteps[0], text)
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
        told = self._embedded(drawn.told)
        frames = clean.shape[1] // CLIP_CHUNKS
        before, x = clean[:, : drawn.chunk * frames], self._noise(len(clean), generator)
        fresh = partial(torch.randn, x.shape, generator=generator, device=self.device)

        def flow_of(model: CausalWan, t: float, text: Tensor) -> Tensor:
            levels = torch.cat((torch.zeros_like(before[:, :, 0, 0, 0]), torch.full_like(x[:, :, 0, 0, 0], t)), 1)
            with autocast(self.device):
                flow: Tensor = model(torch.cat((before, x), 1), levels, text, frames_per_chunk=frames)
            return flow[:, -frames:].float()

        with torch.no_grad():
            for number in range(drawn.calls):
                flow = flow_of(self.told, self.timesteps[number], told)
                x = self.schedule.step(x, flow, number, fresh)
            wanted = flow_of(self.told, self.timesteps[drawn.calls], told)
        t = self.timesteps[drawn.calls]
        return _add_gradient(nn_f.mse_loss(flow_of(self.student, t, text), wanted))


def all_told(caption: Caption, row: Mapping[str, int], rng: random.Random) -> str:
    """A caption that states all there is in a scene: this one where it does so already."""
    return random_caption(row, rng, full=True).text if leaves_open(caption.stated) else caption.text


def a_negative(caption: Caption, row: Mapping[str, int], rng: random.Random) -> tuple[str, str]:
    """An attribute and a value to be guided away from: as often as not one that the caption states."""
    names, worth = value_names(row), {n: [v for v in values if v not in UNREMARKABLE] for n, values in TERMS.items()}
    named = [name for name in sorted(caption.stated) if names[name] in worth[name]]
    if named and rng.random() < 0.5:
        attribute = rng.choice(named)
        return attribute, names[attribute]
    attribute = rng.choice([name for name in worth if name not in caption.stated] or list(worth))
    return attribute, rng.choice(worth[attribute])


def _without(scores: dict[str, Tensor], negatives: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Scores (B, V) by attribute, with the value that each of B scenes is guided away from made unlikely."""
    for index, (attribute, value) in enumerate(negatives):
        scores[attribute][index, ATTRIBUTES[attribute].index(value)] -= 100
    return scores


def _scenes(drawn: OpeningDraw) -> tuple[Scenes, dict[str, Tensor]]:
    """Scenes that a draw's captions are true of, and what these leave open."""
    scenes = Scenes(**{name: torch.from_numpy(value) for name, value in drawn.scenes.items()})
    return scenes, left_open([caption.stated for caption in drawn.captions])


def _add_gradient(error: Tensor) -> Tensor:
    """The error, detached, after its backward pass: the graphs of several lessons need not be held at once."""
    error.backward()  # type: ignore[no-untyped-call]
    return error.detach()
