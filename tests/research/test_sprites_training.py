import math
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from causvid_adapter import CausalWan, FlowMatchSchedule
from nasa_video.models.presets import find_preset
from nasa_video.sprites.captions import TERMS, Caption, full_caption, is_held_out, leaves_open
from nasa_video.sprites.detectors import HEADS, Detector, DetectorNetwork, shows
from nasa_video.sprites.vocabulary import nearest_known, unknown_words
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, MOTIONS, Scenes, sample_scenes
from nasa_video.text import WordLlamaEncoder
from nasa_video.train.attention import matrix_attention
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.dry_run import HashEncoder
from nasa_video.train.rollout import RolloutPlan, roll_out
from nasa_video.train.settings import Optimiser
from nasa_video.train.state import TrainState, load_state, rate_at, save_state
from research.sprites.assessment import held_out_prompts, rare_prompts
from research.sprites.captions import caption_as_users_write
from research.sprites.dataset import LatentClips
from research.sprites.detector import truth
from research.sprites.distill import Distillation, DistillTraining, score_difference
from research.sprites.flow import (
    FlowDraws,
    FlowTraining,
    draw_noise_levels,
    flow_loss,
    new_transformer,
    train_flow,
)
from research.sprites.latent_detector import LatentDetector, stated_loss, visible_targets
from research.sprites.opening import Opening, OpeningDraw, OpeningTraining
from research.sprites.plan import load_plan
from research.sprites.reading import VALUES, Reader, left_open
from research.sprites.scenes import sample_switches
from research.sprites.stage import ConvolutionMuon, convolution_optimisers, made_ahead, matrix_optimiser

TINY = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
WIDE = TINY | {"in_channels": 12, "out_channels": 12, "text_dim": 256}
"""With the shipped model's latents and text."""


@pytest.fixture
def tiny() -> CausalWan:
    torch.manual_seed(0)
    model = new_transformer(TINY, torch.device("cpu"))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model


def test_matrix_attention_is_softmax_attention():
    q, k, v = (torch.randn(2, n, 3, 8) for n in (6, 9, 9))
    mask = torch.rand(6, 9) > 0.3
    mask[:, 0] = True
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    torch.testing.assert_close(matrix_attention(q, k, v, mask), expected.transpose(1, 2))


def test_the_training_attention_computes_what_the_shipped_one_does(tiny):
    x, context = torch.randn(1, 3, 4, 4, 4), torch.randn(1, 5, 8)
    ours = tiny(x, 500.0, context)
    from diffusers import WanTransformer3DModel

    plain = WanTransformer3DModel(**TINY)
    plain.load_state_dict(tiny.transformer.state_dict())
    torch.testing.assert_close(CausalWan(plain)(x, 500.0, context), ours, atol=1e-5, rtol=1e-4)


def rolled_out(model, context, noise, generator):
    return roll_out(model, context, noise, RolloutPlan(FlowMatchSchedule(1.0, (1000.0,)), 0, 2), generator)


def test_a_rollout_passes_no_gradient_from_a_chunk_to_an_earlier_one(tiny):
    noise, context = torch.randn(1, 4, 4, 4, 4, requires_grad=True), torch.randn(1, 5, 8)
    clip = rolled_out(tiny, context, noise, torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad(clip[:, 2:].square().sum(), noise)
    assert gradient[:, 2:].abs().max() > 0
    assert gradient[:, :2].abs().max() == 0


def test_a_fake_score_that_equals_the_teacher_gives_no_direction(tiny):
    clip, context = torch.randn(2, 4, 4, 4, 4), torch.randn(2, 5, 8)
    sigma, noise = torch.tensor([0.3, 0.8]), torch.randn(2, 4, 4, 4, 4)
    direction = score_difference(tiny, tiny, clip, context, 1.0, sigma, noise)
    assert direction.abs().max() == 0


@pytest.mark.parametrize("bidirectional", [True, False])
def test_noise_levels(bidirectional):
    settings = FlowTraining()
    for seed in range(10):
        levels = draw_noise_levels(settings, 8, 9, bidirectional, torch.Generator().manual_seed(seed))
        assert levels.frames_per_chunk == (None if bidirectional else 3)
        chunked = levels.sigma.unflatten(1, (3, 3))
        assert (chunked == chunked[..., :1]).all()
        if bidirectional:
            assert (levels.sigma == levels.sigma[:, :1]).all()
        assert (levels.counted == (levels.sigma > 0).float()).all()
        assert levels.counted.unflatten(1, (3, 3))[:, -1].all()


def test_a_text_a_chunk_is_one_text_where_all_are_the_same(tiny):
    x, context = torch.randn(2, 6, 4, 4, 4), torch.randn(2, 5, 8)
    one = tiny(x, 500.0, context, frames_per_chunk=2)
    torch.testing.assert_close(tiny(x, 500.0, context.repeat_interleave(3, 0), frames_per_chunk=2), one)


def test_the_text_of_a_chunk_acts_from_there_on(tiny):
    x, context = torch.randn(1, 6, 4, 4, 4), torch.randn(3, 5, 8)
    other = context.clone()
    other[1] += 1
    change = tiny(x, 500.0, other, frames_per_chunk=2) - tiny(x, 500.0, context, frames_per_chunk=2)
    assert change[:, :2].abs().max() == 0
    assert change[:, 2:4].abs().amax() > 0
    assert change[:, 4:].abs().amax() > 0


def test_a_rollout_takes_a_text_a_chunk(tiny):
    noise, context = torch.randn(1, 4, 4, 4, 4), torch.randn(2, 5, 8)
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    both = rolled_out(tiny, context, noise, generators[0])
    first = rolled_out(tiny, context[:1], noise, generators[1])
    torch.testing.assert_close(both[:, :2], first[:, :2])
    assert (both[:, 2:] - first[:, 2:]).abs().max() > 0


def clips_that_switch() -> LatentClips:
    scenes = sample_scenes(200, torch.Generator().manual_seed(1))
    later, chunk = sample_switches(scenes, 0.5, torch.Generator().manual_seed(2))
    return LatentClips(torch.zeros(200, 9, 4, 2, 2), torch.zeros(200, 9, 1, 2, 2), scenes, later, chunk)


def test_batches_are_of_one_kind():
    clips = clips_that_switch()
    assert len(clips.draw(8, 0).captions) == 8
    draw = clips.draw(8, 0, switching=True)
    assert len(draw.captions) == 24
    for i in range(0, 24, 3):
        assert draw.captions[i] != draw.captions[i + 2]
    emptied = draw.with_some_empty(0.5, random.Random(0)).captions
    kept = [set(map(bool, emptied[i : i + 3])) for i in range(0, 24, 3)]
    assert {frozenset(k) for k in kept} == {frozenset({True}), frozenset({False})}


def first_chunks() -> LatentClips:
    scenes = sample_scenes(40, torch.Generator().manual_seed(4))
    never = torch.zeros(40, dtype=torch.long)
    return LatentClips(torch.randn(40, 3, 4, 4, 4), torch.ones(40, 3, 1, 4, 4), scenes, scenes, never)


def whole_clips() -> LatentClips:
    scenes = sample_scenes(40, torch.Generator().manual_seed(5))
    later, chunk = sample_switches(scenes, 0.5, torch.Generator().manual_seed(6))
    return LatentClips(torch.randn(40, 9, 4, 4, 4), torch.ones(40, 9, 1, 4, 4), scenes, later, chunk)


@pytest.mark.parametrize("short_share", [0.0, 1.0])
def test_a_share_of_the_batches_holds_first_chunks_alone(tmp_path, monkeypatch, short_share):
    shapes, weights = [], []

    def record(model, batch, context, noise, levels, settings, sprite_weight):
        shapes.append((tuple(batch.latents.shape[:2]), levels.frames_per_chunk))
        weights.append(sprite_weight)
        return flow_loss(model, batch, context, noise, levels, settings, sprite_weight)

    monkeypatch.setattr("research.sprites.flow.flow_loss", record)
    monkeypatch.setattr("research.sprites.flow.compile_blocks", lambda model: None)
    model = TINY | {"text_dim": 256}
    settings = FlowTraining(model=model, iterations=4, batch_size=2, short_share=short_share, bidirectional_share=0.0)
    args = (tmp_path, 0, DistributedContext(cpu=True))
    train_flow(settings, whole_clips(), first_chunks(), WordLlamaEncoder(8), *args)
    assert shapes == [((6, 3), None)] * 4 if short_share else [((2, 9), 3)] * 4
    assert weights[:2] == [settings.sprite_weight] * 2
    assert weights[2] > weights[3] == 0


def test_a_small_sprite_counts_as_much_as_a_big_one():
    """The same error everywhere in one clip or in another: the loss does not say which."""
    clips = whole_clips()
    clips.coverage[:] = 0
    clips.coverage[::2, :, :, :3, :3] = 1
    clips.coverage[1::2, :, :, :1, :1] = 1
    batch = replace(
        clips.take(clips.draw(2, 0)), latents=torch.zeros(2, 9, 4, 4, 4), coverage=clips.coverage[:2].clone()
    )
    levels = draw_noise_levels(FlowTraining(), 2, 9, True, torch.Generator().manual_seed(0))

    def loss(wrong: int) -> float:
        def model(noisy, timestep, context, frames_per_chunk):
            return (torch.arange(2) == wrong).float()[:, None, None, None, None].expand_as(noisy)

        noise = torch.zeros_like(batch.latents)
        return float(flow_loss(model, batch, torch.zeros(2, 1, 8), noise, levels, FlowTraining(), 8.0))

    assert loss(0) == pytest.approx(loss(1))
    assert loss(0) == pytest.approx(0.5)


def test_a_first_chunk_alone_is_the_start_of_a_causal_clip(tiny):
    x, context = torch.randn(2, 6, 4, 4, 4), torch.randn(2, 5, 8)
    whole = tiny(x, torch.full((2, 6), 700.0), context, frames_per_chunk=3)
    torch.testing.assert_close(tiny(x[:, :3], torch.full((2,), 700.0), context), whole[:, :3], atol=1e-5, rtol=1e-4)


def distillation(monkeypatch, **settings) -> Distillation:
    monkeypatch.setattr("research.sprites.distill.compile_blocks", lambda model: None)
    model = new_transformer(WIDE, torch.device("cpu"))
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    settings = {"batch_size": 2, **settings}
    plan = DistillTraining(steps={1: (1000.0,)}, step_counts=(1,), fake_warmup=0, **settings)
    return Distillation(plan, model, (12, 4, 4), WordLlamaEncoder(8), 0, DistributedContext(cpu=True))


def spelt_out(text: str, values: dict, index: int) -> bool:
    """Whether a caption names the colour, the motion and the background of a scene."""
    row = {name: ATTRIBUTES[name][int(values[name][index])] for name in ("colour", "motion", "background")}
    return all(any(phrase in text for phrase in TERMS[name][value]) for name, value in row.items())


class Recorder(WordLlamaEncoder):
    """Remembers what it embedded."""

    def __call__(self, texts):
        self.texts = [*getattr(self, "texts", []), list(texts)]
        return super().__call__(texts)


@pytest.mark.parametrize("full_share", [0.0, 1.0])
def test_captions_state_everything_or_a_part_and_the_detector_says_no_more(monkeypatch, full_share):
    stage = distillation(monkeypatch, short_share=1.0, full_share=full_share, empty_share=0.0)
    recorder = Recorder(8)
    draws = replace(stage.draws, encoder=recorder)
    drawn = [draws[step] for step in range(1, 6)]
    assert len(recorder.texts) == 5  # one embedding for the student and the scores
    spelt = [
        spelt_out(text, d.values, i)
        for d, texts in zip(drawn, recorder.texts, strict=True)
        for i, text in enumerate(texts)
    ]
    told = [words for d in drawn for words in d.conditioned]
    if full_share:
        assert all(spelt)
        assert all(words == frozenset(ATTRIBUTES) for words in told)
    else:
        assert 3 < sum(spelt) < 20
        assert sum(words == frozenset(ATTRIBUTES) for words in told) <= sum(spelt)
        assert all(words for words in told)


@pytest.mark.parametrize("empty_share", [0.0, 1.0])
def test_empty_captions_ask_for_nothing(monkeypatch, empty_share):
    drawn = distillation(monkeypatch, short_share=1.0, empty_share=empty_share).draws[1]
    assert (abs(drawn.embeds).sum() == 0) == bool(empty_share)
    assert any(drawn.conditioned) != bool(empty_share)


def test_hard_scenes_show_what_is_hardest_to_draw(monkeypatch):
    values = distillation(monkeypatch, short_share=1.0, hard_share=1.0, batch_size=32).draws[1].values
    shown = {name: values[name] for name in ("count", "weather", "blurry", "pixelated")}
    shown["motion"] = values["motion"] == MOTIONS.index("spinning")
    assert all(map(any, zip(*shown.values(), strict=True)))
    assert all(0 < sum(map(bool, column)) < len(column) for column in shown.values())
    assert not any(two and big for two, big in zip(values["count"], values["size"], strict=True))


def test_a_share_of_the_whole_clips_switches(monkeypatch):
    stage = distillation(monkeypatch, short_share=0.0, switched_share=1.0)
    drawn = stage.draws[2]
    assert len(drawn.embeds) == 2 * 3
    assert not any(drawn.conditioned)
    assert (drawn.embeds[0] != drawn.embeds[2]).any()
    stage.iterate(1, drawn)


@pytest.mark.parametrize(("short_share", "clips"), [(0.0, 2), (1.0, 6)])
def test_the_student_rolls_out_first_chunks_alone_at_times(monkeypatch, short_share, clips):
    rolled = []

    def record(student, context, noise, *args):
        rolled.append(noise.shape[:2])
        return roll_out(student, context, noise, *args)

    monkeypatch.setattr("research.sprites.distill.roll_out", record)
    stage = distillation(monkeypatch, short_share=short_share, switched_share=0.0)
    before = stage.student.transformer.proj_out.weight.detach().clone()
    stage.iterate(1, stage.draws[1])
    assert rolled == [(clips, 3 if short_share else 9)]
    assert (stage.student.transformer.proj_out.weight - before).abs().max() > 0


STEPS = {4: (1000.0, 750.0, 500.0, 250.0), 2: (1000.0, 750.0), 1: (1000.0,)}


def opening(**settings) -> Opening:
    torch.manual_seed(2)
    student, teacher = (new_transformer(TINY, torch.device("cpu")) for _ in range(2))
    for seed, model in enumerate((student, teacher)):
        torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1, generator=torch.Generator().manual_seed(seed))
    plan = OpeningTraining(**{"batch_size": 6, **settings})
    detector = LatentDetector(4, 8)
    return Opening(
        plan, STEPS, student, teacher, detector, whole_clips(), HashEncoder(24, 8), 0, DistributedContext(cpu=True)
    )


def lesson_of(stage: Opening, lesson: str, calls: int = 0, open_too: bool = True) -> OpeningDraw:
    """The first draw with a lesson; where nothing may be open its captions are exchanged for full ones."""
    drawn = next(d for d in map(stage.draws.__getitem__, range(1, 400)) if d.lesson == lesson and d.calls == calls)
    if open_too:
        assert any(leaves_open(caption.stated) for caption in drawn.captions)
        return drawn
    if lesson == "later":
        rows = [stage.clips.rows[i] for i in drawn.clips]
    else:
        scenes = Scenes(**{name: torch.from_numpy(value) for name, value in drawn.scenes.items()})
        rows = [scenes.row(i) for i in range(len(scenes))]
    full = [full_caption(row, random.Random(0)) for row in rows]
    return replace(drawn, captions=full, conditioned=[caption.text for caption in full] if drawn.conditioned else [])


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr("research.sprites.opening.compile_blocks", lambda model: None)


def test_lessons_and_steps_come_as_often_as_the_plan_says():
    draws = opening(later_share=0.2, as_before_share=0.1, stride_share=0.3).draws
    drawn = [draws[step] for step in range(1, 401)]
    lessons = Counter(d.lesson for d in drawn)
    assert all(
        abs(lessons[name] / 400 - share) < 0.08 for name, share in {"open": 0.7, "later": 0.2, "as before": 0.1}.items()
    )
    calls = Counter(d.calls for d in drawn if d.lesson == "open")
    assert all(abs(calls[n] / lessons["open"] - share) < 0.09 for n, share in enumerate((1 / 3, 1 / 3, 1 / 3)))
    assert abs(sum(d.stride for d in drawn) / 400 - 0.3) < 0.08


def test_the_copy_is_told_all_that_was_read_and_the_student_what_a_user_writes():
    """What a caption states stays, what it leaves open is the reader's, and full captions are left alone."""
    stage, opened = opening(), 0
    texts_seen: list[list[str]] = []
    encoder = stage.encoder
    stage.encoder = lambda texts: (texts_seen.append(list(texts)), encoder(texts))[1]
    for calls in (0, 1, 2):
        drawn = lesson_of(stage, "open", calls)
        for name in ("shape", "colour", "motion", "background"):
            stage.reader.points[name][0] = 1e6  # whatever is seen
        stage.iterate(1, drawn)
        texts, told = texts_seen[-2:]
        assert texts == [caption.text for caption in drawn.captions]
        assert not any(map(is_held_out, [*texts, *told]))
        for index, (caption, text) in enumerate(zip(drawn.captions, told, strict=True)):
            is_open = leaves_open(caption.stated)
            assert is_open or text == caption.text
            names = ("colour", "motion", "background")
            values = {n: [0 if n in is_open and not calls else drawn.scenes[n][index]] for n in names}
            # behind a step of the student, its picture is looked at, too: only what is stated is certain
            assert spelt_out(text, values, 0) or (calls and is_open & set(names))
            opened += bool(is_open)
    assert opened > 6


def test_behind_the_data_the_copy_is_told_what_it_shows():
    stage = opening()
    drawn = lesson_of(stage, "later")
    values = {name: getattr(stage.clips.scenes, name)[drawn.clips] for name in ("colour", "motion", "background")}
    assert len(drawn.conditioned) == 2
    assert all(spelt_out(text, values, i) for i, text in enumerate(drawn.conditioned))
    assert set(drawn.clips) <= set(stage.clips.whole)


@pytest.mark.parametrize("calls", [4, 8])
def test_the_path_is_the_teachers_own(calls):
    """Against many small steps of a flow that bends; twice as many calls have a quarter of the error."""
    stage = opening(path_calls=calls)
    stage.teacher = lambda x, t, text: torch.sin(3 * x) * (t / 1000) + x
    noise = torch.randn(4, 3, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    exact, small = noise.double(), 1000
    for number in range(small):
        level = 1 - 0.25 * number / small
        exact = exact - 0.25 / small * (torch.sin(3 * exact) * level + exact)
    reached = stage._path(noise, 0.75, torch.zeros(4, 24, 8))
    error = (reached - exact).square().mean() / (noise - exact).square().mean()
    assert float(error) < (0.02 if calls == 4 else 0.006) ** 2


def test_first_steps_follow_the_teacher_or_the_copy_where_nothing_is_open():
    stage = opening()
    captions = [Caption("a star", frozenset({"shape"})), lesson_of(stage, "open", open_too=False).captions[0]]
    text, noise = stage.encoder([caption.text for caption in captions]).embeds, torch.randn(2, 3, 4, 4, 4)
    begun = stage._begin(noise, text, captions)
    with torch.no_grad():
        path, own = stage._path(noise, 0.75, text), noise - 0.25 * stage.copied(noise, 1000.0, text)
    torch.testing.assert_close(begun, torch.stack((path[0], own[1])), rtol=0.02, atol=0.02)
    assert (path[1] - own[1]).abs().max() > 0.1


def test_the_stride_leads_to_where_it_should():
    """It starts from pure noise, and is called 990: it asks for more flow by as much."""
    stage = opening(stride_share=1.0)
    straight, zero = torch.randn(6, 3, 4, 4, 4), torch.zeros(1, requires_grad=True)
    stage._flow = lambda model, x, t, text: straight + zero
    error = stage.iterate(1, lesson_of(stage, "open"))["stride"]
    assert (error / float(straight.square().mean())) ** 0.5 == pytest.approx(250 / 240 - 1, rel=0.02)


@pytest.mark.parametrize(
    ("lesson", "calls"), [("open", 0), ("open", 1), ("open", 2), ("later", 0), ("later", 3), ("as before", 0)]
)
def test_where_a_caption_states_all_there_is_nothing_to_learn_behind_the_first_step(lesson, calls):
    stage = opening(stride_share=0.0)
    same = stage.iterate(1, lesson_of(stage, lesson, calls, open_too=False))
    (name,) = [name for name in same if name != "gradient"]
    assert same[name] < 1e-9
    other = opening(stride_share=0.0).iterate(1, lesson_of(stage, lesson, calls))[name]
    assert (other < 1e-9) == (lesson == "as before"), "which is matched with the student's own caption"


@pytest.mark.parametrize("lesson", ["open", "later"])
def test_a_lesson_moves_the_student_alone(lesson):
    stage = opening()
    models = (stage.copied, stage.teacher, stage.student)
    before = [model.transformer.proj_out.weight.detach().clone() for model in models]
    values = stage.iterate(20, lesson_of(stage, lesson))
    moved = [bool((m.transformer.proj_out.weight != w).any()) for m, w in zip(models, before, strict=True)]
    assert moved == [False, False, True]
    assert all(math.isfinite(value) for value in values.values())


@pytest.mark.parametrize("chunk", [1, 2])
def test_a_later_chunk_is_what_the_sampler_makes(chunk):
    """Behind clean chunks in the cache, the copy's flow is what the student is to match."""
    stage = opening()
    drawn = replace(lesson_of(stage, "later"), chunk=chunk)
    stage.student.transformer.proj_out.weight.data.zero_()
    stage.student.transformer.proj_out.bias.data.zero_()
    error = stage.iterate(1, drawn)["later"]
    clean = stage.clips.latents[drawn.clips][:, : 3 * chunk]
    noise = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(drawn.seed))
    text, cache = stage.encoder(drawn.conditioned).embeds, stage.copied.new_cache(4, 4)
    with torch.no_grad():
        for start in range(0, 3 * chunk, 3):
            stage.copied(clean[:, start : start + 3], 0.0, text, cache=cache)
            cache.commit()
        flow = stage.copied(noise, 1000.0, text, cache=cache)
    assert error == pytest.approx(float(flow.square().mean()), rel=0.02)


def test_the_opening_resumes_with_the_readers_points(tmp_path):
    seen = []
    for iterations in (3, 4):
        stage = opening(iterations=iterations, checkpoint_every=1, later_share=0.0, as_before_share=0.0)
        before = stage.reader
        stage.train(tmp_path, lambda step, steps, values: seen.append(step))
    assert seen == [1, 2, 3, 4]
    kept = load_state(tmp_path / "opening.pt")["reader"]
    assert any(points.any() for points in kept.values())
    assert all(torch.equal(before.points[name], points) for name, points in kept.items())


def a_reader(rate: float = 0.1) -> Reader:
    return Reader(LatentDetector(4, 8), rate)


def random_scores(batch: int, seed: int, liked: float = 0.0) -> dict[str, torch.Tensor]:
    """Of pictures that differ, in which the first value of everything is likelier by `liked`."""
    generator = torch.Generator().manual_seed(seed)
    scores = {name: torch.randn(batch, values, generator=generator) for name, values in VALUES.items()}
    for each in scores.values():
        each[:, 0] += liked
    return scores


def test_what_is_read_can_be_and_agrees_with_the_caption():
    reader, scenes = a_reader(), sample_scenes(300, torch.Generator().manual_seed(3))
    captions = [caption_as_users_write(scenes.row(i), random.Random(i)) for i in range(300)]
    is_open, scores = left_open([caption.stated for caption in captions]), random_scores(300, 0)
    read = reader.read(scores, scenes, is_open)
    for name, opened in is_open.items():
        assert torch.equal(getattr(read, name)[~opened], getattr(scenes, name)[~opened])
    free = is_open["background"]
    assert torch.equal(read.background[free], scores["background"].argmax(1)[free])
    drawn = is_open["shape2"] & is_open["shape"]
    assert drawn.any()
    assert not (read.shape == read.shape2)[drawn].any()
    assert not ((read.count == 1) & (read.size == 1))[is_open["count"] & is_open["size"]].any()


def test_points_bring_back_what_students_do_not_show():
    """A student that likes first values by two and shows what it is led to where it is not sure."""
    reader, stated = a_reader(rate=0.3), [frozenset[str]()] * 200
    is_open = left_open(stated)
    for step in range(300):
        scenes = sample_scenes(200, torch.Generator().manual_seed(step))
        scores = random_scores(200, step, liked=2.0)
        read = reader.read(scores, scenes, is_open)
        picture = {n: s + 3.0 * torch.nn.functional.one_hot(getattr(read, n), s.shape[1]) for n, s in scores.items()}
        reader.count(picture, scenes, is_open)
        if step == 0:
            before = {name: float((getattr(read, name) == 0).float().mean()) for name in ("background", "dim")}
    shown = {n: float((p.argmax(1) == 0).float().mean()) for n, p in picture.items()}
    assert before["background"] > 0.5
    assert shown["background"] == pytest.approx(1 / 6, abs=0.08)
    assert shown["dim"] == pytest.approx(0.89, abs=0.08)


def test_a_picture_that_is_sure_overrules_what_was_read():
    reader, scenes = a_reader(), sample_scenes(2, torch.Generator().manual_seed(3))
    is_open = left_open([frozenset({"shape"})] * 2)
    scores = {name: torch.zeros(2, values) for name, values in VALUES.items()}
    scores["weather"][0, 1] = 5.0  # snow, plain to see in the first picture
    read = replace(scenes, weather=torch.tensor([2, 2]))
    assert reader.look(scores, read, 2.0, scenes, is_open).weather.tolist() == [1, 2]
    reader.count(scores, scenes, is_open)
    assert reader.points["weather"][2] > 0 > reader.points["weather"][1]


def test_a_soft_picture_is_not_taken_for_a_blurry_one():
    reader, scenes = a_reader(), sample_scenes(4, torch.Generator().manual_seed(3))
    is_open = left_open([frozenset({"shape"})] * 4)
    scores = {name: torch.zeros(4, values) for name, values in VALUES.items()}
    for name in ("blurry", "border"):
        scores[name][:, 1] = 9.0
    read = replace(scenes, blurry=torch.tensor([1, 0, 0, 0]), border=torch.zeros(4, dtype=torch.long))
    seen = reader.look(scores, read, 2.0, scenes, is_open)
    assert (seen.blurry.tolist(), seen.border.tolist()) == ([1, 0, 0, 0], [1, 1, 1, 1])


def test_a_reader_scores_every_value():
    scores = a_reader().scores(torch.randn(3, 3, 4, 4, 4))
    assert {name: tuple(s.shape) for name, s in scores.items()} == {name: (3, v) for name, v in VALUES.items()}
    assert all(bool((s <= 0).all()) for s in scores.values())
    torch.testing.assert_close(scores["blurry"].exp().sum(1), torch.ones(3))


@pytest.mark.parametrize("preset", ["sprites", "sprites-gpu"])
def test_the_package_samples_as_it_was_taught(repository, preset):
    """The preset of the shipped model and the plans that train it name the same timesteps."""
    plan, sampler = load_plan(repository / "research/configs" / f"{preset}.yaml"), find_preset("sprites").sampler
    for count in (4, 2, 1):
        taught, shipped = plan.schedule(count), sampler.schedule(count)
        assert (taught.timesteps, taught.without_history.timesteps) == (
            shipped.timesteps,
            shipped.without_history.timesteps,
        )
        assert taught.without_history.euler_steps == shipped.without_history.euler_steps


def test_a_plan_with_an_opening_samples_first_chunks_as_it_teaches_them(repository):
    plan = load_plan(repository / "research/configs/sprites-opening.yaml")
    for count in (4, 2):
        schedule = plan.schedule(count)
        assert schedule.timesteps == STEPS[count]
        assert schedule.without_history.timesteps == (990.0, *STEPS[count][1:])
        assert schedule.without_history.euler_steps == 1
    only = plan.schedule(1)
    assert only.without_history is only
    with pytest.raises(ValueError, match="4, 2, 1 steps, not 3"):
        plan.schedule(3)


def test_easy_clips_show_one_plain_sprite():
    clips = clips_that_switch()
    for name in ("count", "texture", "weather", *FLAWS):
        assert getattr(clips.scenes[torch.tensor(clips.draw(64, 0, easy=1.0).index)], name).max() == 0
    for share in (0.0, 0.5):
        assert clips.scenes[torch.tensor(clips.draw(64, 0, easy=share).index)].texture.max() > 0


def test_hard_clips_are_told_in_full():
    clips = clips_that_switch()

    def spelt(draw) -> list[bool]:
        values = {name: getattr(clips.scenes[torch.tensor(draw.index)], name).numpy() for name in ATTRIBUTES}
        return [spelt_out(text, values, i) for i, text in enumerate(draw.captions)]

    draw = clips.draw(64, 0, hard=1.0)
    scenes = clips.scenes[torch.tensor(draw.index)]
    spinning = MOTIONS.index("spinning")
    assert all(two or motion == spinning for two, motion in zip(scenes.count, scenes.motion, strict=True))
    assert scenes.count.float().mean() > 0.25
    assert all(spelt(draw))
    assert not any(map(is_held_out, draw.captions))
    assert 16 < sum(spelt(clips.draw(64, 0, hard=0.5))) < 56
    assert clips.draw(8, 3).captions == clips.draw(8, 3, hard=0.0).captions


def orthogonalised(matrix: torch.Tensor) -> torch.Tensor:
    """The quintic Newton-Schulz iteration of Muon (K. Jordan et al., 2024), as this project had it before PyTorch."""
    a, b, c = 3.4445, -4.7750, 2.0315
    upright = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if upright else matrix
    x = (x / (x.norm() + 1e-7)).bfloat16()
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if upright else x).float()


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (12, 8, 3, 3)])
def test_convolutions_take_muons_steps_as_matrices(shape):
    """Momentum, Nesterov's step, orthogonalised, at AdamW's size: two updates, to bfloat16's precision."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    expected, momentum = weight.detach().flatten(1).clone(), torch.zeros(shape).flatten(1)
    rate, decay = 0.02, 0.01
    optimiser = ConvolutionMuon([weight], lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    for _ in range(2):
        weight.grad = torch.randn(shape, generator=generator)
        gradient = weight.grad.flatten(1)
        momentum = momentum.lerp(gradient, 0.05)
        update = orthogonalised(gradient.lerp(momentum, 0.95))
        expected = expected * (1 - rate * decay) - rate * 0.2 * max(update.shape) ** 0.5 * update
        optimiser.step()
    torch.testing.assert_close(weight.flatten(1), expected, atol=2e-3, rtol=0)
    assert torch.linalg.svdvals(update).min() > 0.4


def test_convolutions_that_read_pixels_take_adamw():
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 8))
    trained = {
        "encoder.conv_in.weight": network[0].weight,
        "1.weight": network[1].weight,
        "2.weight": network[2].weight,
    }
    muon, adamw = convolution_optimisers(trained, matrix_optimiser(1e-3, 1e-3))
    assert muon.weights == [network[1].weight]
    assert len(adamw.param_groups[0]["params"]) == 2


def test_the_draws_of_a_step_are_the_same_made_ahead_or_not():
    settings = FlowTraining(batch_size=2, iterations=6)
    draws = FlowDraws(settings, whole_clips(), first_chunks(), WordLlamaEncoder(8), 0, DistributedContext(cpu=True))
    here = list(made_ahead(draws, range(2, 6), torch.device("cpu")))
    elsewhere = list(made_ahead(draws, range(2, 6), torch.device("cuda")))
    assert [d.draw for d in here] == [d.draw for d in elsewhere]
    assert len({tuple(d.draw.index) for d in here}) > 1
    for one, other in zip(here, elsewhere, strict=True):
        assert (one.embeds == other.embeds).all()


def test_the_learning_rate_rises_stays_and_falls():
    rates = [rate_at(matrix_optimiser(1e-3, 1e-3), p) for p in (0.01, 0.2, 0.7, 1.0)]
    assert rates[1] == 1.0
    assert rates[0] < 1 > rates[2] > rates[3] > 0


def test_the_average_starts_as_the_first_update_and_warms_up():
    network = torch.nn.Linear(2, 2, bias=False)
    state = TrainState(network, Optimiser(rate=0.1), DistributedContext(cpu=True), average_decay=0.9)
    seen = []
    for _ in range(3):
        network(torch.ones(1, 2)).sum().backward()
        state.step(0.0)
        seen.append(network.weight.detach().clone())
    expected = seen[0]
    for number, weight in enumerate(seen[1:], 1):
        expected = expected.lerp(weight, 1 - (1 + number) / (10 + number))
    torch.testing.assert_close(state.averages["weight"], expected)


def test_checkpoints_come_back(tmp_path):
    path = tmp_path / "state.pt"
    assert load_state(path) is None
    save_state(path, {"step": 3, "x": torch.ones(2)})
    state = load_state(path)
    assert state is not None
    assert state["step"] == 3
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("preset", ["sprites", "sprites-gpu", "sprites-gpu-on", "sprites-tune", "sprites-opening"])
def test_presets_are_complete(preset, repository):
    plan = load_plan(repository / "research" / "configs" / f"{preset}.yaml")
    assert plan.base.model["in_channels"] == plan.latent_size[0]
    assert set(plan.student.step_counts) <= set(plan.student.steps)


def test_a_plan_holds_what_differs_from_the_one_that_it_extends(tmp_path, repository):
    folder = repository / "research" / "configs"
    parent, plan = (load_plan(folder / f"{name}.yaml") for name in ("sprites-gpu", "sprites-tune"))
    assert plan.student.batch_size == 6
    assert replace(plan, seed=parent.seed, student=parent.student) == parent
    (tmp_path / "lost.yaml").write_text("extends: nowhere\nseed: 1")
    with pytest.raises(ValueError, match="extends nowhere"):
        load_plan(tmp_path / "lost.yaml")


def test_weights_are_averaged(tmp_path, repository):
    files = [tmp_path / name for name in ("one.safetensors", "other.safetensors", "longer.safetensors")]
    for path, value in zip(files, (1.0, 3.0, 3.0), strict=True):
        save_file({"w": torch.full((2 + ("longer" in path.name),), value).half()}, path)
    script = [sys.executable, str(repository / "research" / "average_weights.py")]
    mean = tmp_path / "new" / "mean.safetensors"
    subprocess.run([*script, *map(str, files[:2]), "0.25", str(mean)], check=True)
    assert load_file(mean)["w"].tolist() == [1.5, 1.5]
    assert load_file(mean)["w"].dtype == torch.float16
    done = subprocess.run([*script, str(files[0]), str(files[2]), "0.25", str(mean)], capture_output=True, text=True)
    assert done.returncode == 2
    assert "different tensors" in done.stderr


def test_the_better_weights_are_chosen(tmp_path, repository):
    folder = repository / "nasa_video" / "sprites" / "weights" / "transformer"
    good = load_file(folder / "diffusion_pytorch_model.safetensors")
    save_file({name: value * 0 for name, value in good.items()}, tmp_path / "nothing.safetensors")
    script = [sys.executable, str(repository / "research" / "choose_weights.py"), str(tmp_path / "nothing.safetensors")]
    command = [*script, "student", "--share", "0.5", "--prompts", "1", "--output", str(tmp_path / "best.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "best: student" in done.stdout
    assert "50% of student" in " ".join(done.stdout.split())
    best = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(best[name], value) for name, value in good.items())


def test_an_unknown_setting_is_refused(tmp_path, repository):
    text = (repository / "research" / "configs" / "sprites.yaml").read_text()
    path = tmp_path / "plan.yaml"
    path.write_text(text.replace("kl_weight", "kl_wait"))
    with pytest.raises(ValueError, match="kl_wait"):
        load_plan(path)


@pytest.fixture
def repository(request):
    return request.config.rootpath


def test_the_truth_has_a_label_for_every_attribute():
    scenes = sample_scenes(40, torch.Generator().manual_seed(0))
    labels = truth(scenes)
    assert set(labels) == set(ATTRIBUTES)
    for index in range(40):
        row = scenes.row(index)
        assert shows(labels["colour"][index], ATTRIBUTES["colour"][row["colour"]])
        assert labels["motion"][index] == ATTRIBUTES["motion"][row["motion"]]
    empty = truth(scenes.replace(count=-1))
    assert set(empty["shape"]) == {"none"}


def test_the_detector_comes_back_from_a_file(tmp_path):
    detector = Detector(DetectorNetwork())
    frames = torch.rand(2, 33, 3, 64, 64)
    detector.save(tmp_path / "detector.safetensors")
    again = Detector.load(tmp_path / "detector.safetensors")
    assert set(again.detect(frames)) == set(ATTRIBUTES)


def test_words_outside_the_world_are_found():
    encoder = WordLlamaEncoder(8)
    assert unknown_words("A small red star, bouncing on a dark background!", encoder) == []
    assert unknown_words("crimson stars and a sphere that jumps", encoder) == []
    assert unknown_words("an elephant playing piano", encoder) == ["elephant", "playing", "piano"]
    assert unknown_words("") == []
    assert "ball" in nearest_known("sphere", encoder)


def test_what_the_latent_detector_tells_makes_the_clip_show_what_is_stated(monkeypatch):
    torch.manual_seed(1)
    stage = distillation(monkeypatch, short_share=1.0, conditioned_noise=0.0, empty_share=0.0)
    stage.detector = detector = LatentDetector(12, 16).eval().requires_grad_(False)
    drawn, clip = stage.draws[1], torch.randn(6, 3, 12, 4, 4)
    scenes = Scenes(**{name: torch.from_numpy(value) for name, value in drawn.values.items()})

    def loss(clip):
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            return float(stated_loss(detector(clip), scenes, visible_targets(drawn.conditioned, scenes)))

    told = stage._conditioned(clip.clone(), drawn, torch.Generator().manual_seed(0))
    assert loss(clip - 1e-2 * told / told.abs().max()) < loss(clip)
    untold = stage._conditioned(clip.clone(), replace(drawn, conditioned=[frozenset()] * 6), torch.Generator())
    assert untold.abs().max() == 0


def test_a_clip_that_is_to_be_blurred_is_not_told_its_details():
    scenes = sample_scenes(2, torch.Generator().manual_seed(0)).replace(blurry=0, pixelated=0)
    told = [frozenset({"shape", "colour", "blurry"})] * 2
    assert visible_targets(told, scenes) == told
    assert visible_targets(told, scenes.replace(blurry=1)) == [frozenset({"colour", "blurry"})] * 2


def test_only_what_is_stated_counts():
    scenes = sample_scenes(3, torch.Generator().manual_seed(0)).replace(count=0)
    logits = {name: torch.zeros(3, size, requires_grad=True) for name, size in HEADS.items()}
    stated_loss(logits, scenes, [frozenset({"colour"}), frozenset({"blurry"}), frozenset()]).backward()
    touched = {name for name, value in logits.items() if value.grad is not None and value.grad.abs().max() > 0}
    assert touched == {"colour", "flaws"}
    assert logits["colour"].grad[1:].abs().max() == 0
    assert (logits["flaws"].grad != 0).sum() == 1


def test_the_card_asks_for_what_is_rare_as_often_as_it_must():
    prompts = held_out_prompts(40, 5)
    rare = rare_prompts(prompts, 6, 6)
    for name in ("texture", "weather", *FLAWS):
        assert sum(name in prompt.stated for prompt in [*prompts, *rare]) >= 6
    assert all(len(prompt.stated) == 1 for prompt in rare)
    assert all(is_held_out(prompt.text) for prompt in rare)
    assert not {prompt.text for prompt in rare} & {prompt.text for prompt in prompts}
