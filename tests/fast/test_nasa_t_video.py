"""NASA-T for causal video: the gates, the five placements, checkpointing, resuming."""

# B batch, T latent frames, C channels, h w latent height and width

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule
from causvid_adapter.window import Window
from nasa_video.backbones import wan
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import Nasa
from nasa_video.guidance.state import GuidanceState
from nasa_video.models.presets import find_preset
from nasa_video.text import TextContext
from nasa_video.train.attention import add_guidance, doubled, guided_training
from nasa_video.train.batch import Texts, draw_texts, encode_texts, seeded
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.dry_run import HashEncoder
from nasa_video.train.rollout import RolloutPlan, roll_out
from nasa_video.train.run import differences, train
from nasa_video.train.settings import PLACEMENTS, VideoSettings, parse_settings
from nasa_video.train.video import VideoParts, VideoTrainer

TOKENS, DIM = 8, 10
LATENT = (4, 4, 6)
PROMPTS = ["a red ball", "a blue box on a table", "a green star moving left"]
NEGATIVES = ["dark background", "snow", "blurry, noisy"]


def settings(**changes: Any) -> VideoSettings:
    data: dict[str, Any] = {
        "kind": "video",
        "title": "tiny",
        "student": "sprites",
        "teacher": {"package": "sprites/weights/teacher/transformer"},
        "prompts": {"kind": "file"},
        "negatives": {"placement": "student+teacher", "texts": {"kind": "file"}},
        "step_counts": [2],
        "latent_frames": 6,
        "fake_updates": 1,
        "student_optimiser": {"rate": 1e-3},
        "fake_optimiser": {"rate": 1e-3},
        "run": {"iterations": 2, "batch_size": 2, "precision": "fp32", "sheet_samples": 0},
    }
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) and name in data else value
    parsed = parse_settings(data, "test")
    assert isinstance(parsed, VideoSettings)
    return parsed


@pytest.fixture
def new_trainer(new_wan: Callable[..., WanTransformer3DModel]) -> Callable[..., VideoTrainer]:
    def new(teacher_seed: int = 0, window: int | None = None, **changes: Any) -> VideoTrainer:
        preset = find_preset("sprites")
        sampler = preset.sampler.model_copy(update={"window_frames": window, "sink_frames": 0, "rope": "absolute"})
        preset = preset.model_copy(update={"sampler": sampler})
        student, teacher = CausalWan(new_wan()), CausalWan(new_wan(teacher_seed))
        parts = VideoParts(preset, student, teacher, HashEncoder(TOKENS, DIM), LATENT)
        return VideoTrainer(
            settings(**changes), parts, PROMPTS, NEGATIVES, DistributedContext(precision="fp32", cpu=True)
        )

    return new


def plan(window: int | None = None, exit_step: int = 0, rope: Any = "absolute") -> RolloutPlan:
    return RolloutPlan(FlowMatchSchedule(1.0, (1000.0, 600.0)[: exit_step + 1]), exit_step, 2, Window(window, 0, rope))


def student_of(transformer: WanTransformer3DModel) -> tuple[CausalWan, Any]:
    model = CausalWan(transformer)
    model.requires_grad_(True)
    return model, add_guidance(model.transformer, TOKENS)


def contexts_of(new_context: Callable[..., TextContext], batch: int = 1) -> Tensor:
    positive, negative = new_context([3] * batch, seed=1), new_context([2] * batch, seed=2)
    return doubled(positive.embeds, negative.embeds)


# -- gates


def test_cached_chunks_are_one_masked_pass_under_nasa(new_wan, new_context, new_latents, distance) -> None:
    model, steering = student_of(new_wan())
    context, x = contexts_of(new_context, 2), new_latents(6, batch=2)
    with torch.no_grad(), guided_training(steering, torch.tensor([0.7, 0.2])):
        masked = model(x, 0.0, context, frames_per_chunk=2)
        cache, parts = model.new_cache(*LATENT[1:]), []
        for start in range(0, 6, 2):
            parts.append(model(x[:, start : start + 2], 0.0, context, cache=cache))
            cache.commit()
    assert distance(torch.cat(parts, 1), masked) < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("window", "exit_step"), [(None, 0), (None, 1), (4, 1)])
def test_a_chunks_loss_reaches_no_earlier_chunk(new_wan, new_context, window, exit_step, checkpointing) -> None:
    for chunk in (1, 2):
        model, steering = student_of(new_wan())
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        noise = torch.randn(1, 6, *LATENT, requires_grad=True)
        own = slice(2 * chunk, 2 * chunk + 2)
        with guided_training(steering, torch.tensor([0.5])):
            generator = torch.Generator().manual_seed(0)
            clip = roll_out(model, contexts_of(new_context), noise, plan(window, exit_step), generator)
            (gradient,) = torch.autograd.grad(clip[:, own].square().sum(), noise)
        assert gradient[:, own].abs().max() > 0
        assert gradient[:, : own.start].abs().max() == 0


def test_an_earlier_chunk_changes_a_later_one(new_wan, new_context) -> None:
    """The gate above would also hold if chunks did not see each other."""
    model, steering = student_of(new_wan())
    noise, context = torch.randn(1, 6, *LATENT), contexts_of(new_context)
    other = torch.cat([noise[:, :2] + 1, noise[:, 2:]], 1)
    with torch.no_grad(), guided_training(steering, torch.tensor([0.5])):
        clips = [roll_out(model, context, x, plan(), torch.Generator().manual_seed(0)) for x in (noise, other)]
    assert (clips[0][:, 4:] - clips[1][:, 4:]).abs().max() > 1e-3


def test_an_unguided_start_has_no_direction(new_trainer) -> None:
    for lora in (None, {"rank": 2, "scaling": 4}):
        trainer = new_trainer(negatives={"placement": "nowhere", "kappa": (1, 1)}, fake_lora=lora)
        contexts = encode_texts(
            draw_texts(trainer.settings.negatives, PROMPTS, NEGATIVES, 2, seeded(0)),
            trainer.parts.encoder,
            torch.device("cpu"),
        )
        clip = torch.randn(2, 6, *LATENT)
        assert trainer.direction(clip, contexts, seeded(1)).abs().max() == 0
        assert trainer.iterate(1)["student gradient"] == 0
        assert trainer.iterate(2)["student gradient"] > 0  # the fake score has learnt the student's clips


def test_guidance_and_another_fake_give_a_direction(new_trainer) -> None:
    for placement in PLACEMENTS:
        trainer = new_trainer(negatives={"placement": placement, "kappa": (3, 3)})
        texts = Texts(PROMPTS[:1], NEGATIVES[:1], torch.ones(1), torch.full((1,), 3.0))
        contexts = encode_texts(texts, trainer.parts.encoder, torch.device("cpu"))
        direction = trainer.direction(torch.randn(1, 6, *LATENT), contexts, seeded(1))
        if "fake" in PLACEMENTS[placement]:
            assert direction.abs().max() == 0  # the same guidance on both sides, of the same network
        else:
            assert direction.abs().max() > 0


# -- NASA in the student


def test_the_trained_students_nasa_is_the_one_that_is_shipped(new_wan, new_context, new_latents, distance) -> None:
    transformer, x = new_wan(), new_latents(2)
    positive, negative = new_context([3], seed=1), new_context([2], seed=2)
    for padding in (True, False):
        shipped = CausalWan(transformer)
        pos, neg = (wan.prompt_keys(transformer, c, padding=p) for c, p in ((positive, True), (negative, padding)))
        steering = GuidanceState(SdpaAttend(), 2, Nasa(0.6), pos, [(neg, 1.0)])
        with torch.no_grad(), wan.install(transformer, steering):
            expected = shipped(x, 500.0, None)
        model, training = student_of(transformer)
        with torch.no_grad(), guided_training(training, torch.tensor([0.6]), None if padding else negative.lengths):
            actual = model(x, 500.0, doubled(positive.embeds, negative.embeds))
        assert distance(actual, expected) < 1e-5


def test_alpha_zero_is_the_unguided_student(new_wan, new_context, new_latents) -> None:
    model, steering = student_of(new_wan())
    context, x = contexts_of(new_context), new_latents(2)
    with torch.no_grad():
        plain = model(x, 500.0, context[:, :TOKENS])
        with guided_training(steering, torch.zeros(1)):
            assert torch.equal(model(x, 500.0, context), plain)
        with guided_training(steering, torch.ones(1)):
            assert not torch.equal(model(x, 500.0, context), plain)


def test_the_negatives_keys_have_a_gradient(new_wan, new_context, new_latents) -> None:
    model, steering = student_of(new_wan())
    context = contexts_of(new_context).requires_grad_(True)
    with guided_training(steering, torch.tensor([0.5])):
        model(new_latents(2), 500.0, context).square().sum().backward()
    assert context.grad is not None
    assert context.grad[:, TOKENS:].abs().max() > 0


def test_a_pass_outside_its_scope_is_refused(new_wan, new_context, new_latents) -> None:
    model, steering = student_of(new_wan())
    model.transformer.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="one scope"):
        model(new_latents(2), 500.0, contexts_of(new_context))
    with guided_training(steering, torch.ones(1)):
        loss = model(new_latents(2), 500.0, contexts_of(new_context)).sum()
    with pytest.raises(RuntimeError, match="one scope"):
        loss.backward()


@pytest.mark.parametrize("euler_steps", [None, 0, 1])
@pytest.mark.parametrize("window", [None, 4])
def test_a_rollout_is_what_the_sampler_makes(new_wan, new_context, distance, window, euler_steps) -> None:
    """What training sees is what `generate` shows: the same chunks from the same noise, under the shipped NASA."""
    transformer, noise = new_wan(), torch.randn(1, 8, *LATENT)
    positive, negative = new_context([3], seed=1), new_context([2], seed=2)
    timesteps, generator = (1000.0, 600.0), torch.Generator().manual_seed(0)

    def source(frames: range, draw: int) -> Tensor:
        chunk = noise[:, frames.start : frames.stop]
        return chunk if draw == 0 else torch.randn(chunk.shape, generator=generator)

    pos, neg = (wan.prompt_keys(transformer, context, padding=True) for context in (positive, negative))
    steering = GuidanceState(SdpaAttend(), 2, Nasa(0.6), pos, [(neg, 1.0)])
    alone = None if euler_steps is None else FlowMatchSchedule(1.0, (990.0, 500.0), euler_steps=euler_steps)
    schedule = FlowMatchSchedule(1.0, timesteps, without_history=alone)
    with wan.install(transformer, steering):
        sampler = ChunkSampler(CausalWan(transformer), schedule, 2, Window(window))
        expected = torch.cat(list(sampler.stream(None, source, num_frames=8)), 1)
    model, training = student_of(transformer)
    with torch.no_grad(), guided_training(training, torch.tensor([0.6])):
        both = doubled(positive.embeds, negative.embeds)
        whole = replace(plan(window, 1), schedule=schedule)
        actual = roll_out(model, both, noise, whole, torch.Generator().manual_seed(0))
    assert distance(actual, expected) < 1e-5


# -- gradient checkpointing over a rolling cache


@pytest.mark.parametrize("rope", ["absolute", "window"])
@pytest.mark.parametrize("window", [None, 4])
def test_checkpointing_changes_no_gradient(new_wan, new_context, window, rope) -> None:
    context, noise = contexts_of(new_context), torch.randn(1, 8, *LATENT)
    gradients = []
    for checkpointing in (False, True):
        model, steering = student_of(new_wan())
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        with guided_training(steering, torch.tensor([0.5])):
            clip = roll_out(model, context, noise, plan(window, 1, rope), torch.Generator().manual_seed(0))
            clip.square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


def test_without_the_guard_a_rolling_cache_gives_other_gradients(new_wan, new_context, monkeypatch) -> None:
    """What the guard is for: the history that the second run of a block sees has moved along."""
    from nasa_video.train import rollout

    monkeypatch.setattr(
        rollout, "FrozenHistory", type("Views", (rollout.FrozenHistory,), {
            "__init__": lambda self, cache, size, copy: original(self, cache, size, copy=False)})
    )  # fmt: skip
    original = rollout.FrozenHistory.__mro__[1].__init__
    context, noise = contexts_of(new_context), torch.randn(1, 8, *LATENT)
    gradients = []
    for checkpointing in (False, True):
        model, steering = student_of(new_wan())
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        with guided_training(steering, torch.tensor([0.5])):
            rollout.roll_out(model, context, noise, plan(4), torch.Generator().manual_seed(0)).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() > 1e-3 * gradients[0].norm()


# -- draws


def test_draws_are_as_the_settings_say() -> None:
    negatives = settings(
        negatives={"alpha": (0.2, 0.8), "alpha_zero_share": 0.3, "empty_share": 0.2, "kappa": (1, 2)}
    ).negatives
    texts = draw_texts(negatives, PROMPTS, ["snow", "a red ball"], 4000, seeded(3))
    zero = texts.alpha_B == 0
    assert abs(float(zero.float().mean()) - (1 - 0.8 * 0.7)) < 0.04
    assert float(texts.alpha_B[~zero].min()) >= 0.2
    assert float(texts.alpha_B.max()) <= 0.8
    assert 1 <= float(texts.kappa_B.min()) <= float(texts.kappa_B.max()) <= 2
    assert all(alpha == 0 for alpha, text in zip(texts.alpha_B.tolist(), texts.negatives, strict=True) if not text)
    assert not any(p == "a red ball" and n == "a red ball" for p, n in zip(texts.prompts, texts.negatives, strict=True))
    again = draw_texts(negatives, PROMPTS, ["snow", "a red ball"], 4000, seeded(3))
    assert again.prompts == texts.prompts
    assert torch.equal(again.alpha_B, texts.alpha_B)


# -- whole runs


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_trains(new_trainer, placement) -> None:
    trainer = new_trainer(teacher_seed=1, negatives={"placement": placement})
    before = {name: p.detach().clone() for name, p in trainer.states["student"].trained.items()}
    trainer.iterate(1)
    values = trainer.iterate(2)  # before the fake score's first update it is the teacher
    assert values["direction"] > 0
    assert values["student gradient"] > 0
    assert (values["effect"] > 0) == ("student" in PLACEMENTS[placement])
    moved = [name for name, p in trainer.states["student"].trained.items() if not torch.equal(p, before[name])]
    assert len(moved) > len(before) * 0.9


@pytest.mark.parametrize("kind", ["adamw", "matrix", "lora"])
def test_a_resumed_run_is_the_uninterrupted_one(new_trainer, tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {"run": {"iterations": 4, "accumulate": 2, "checkpoint_every": 2}, "fake_warmup": 1}
    if kind == "lora":
        changes |= {"student_lora": {"rank": 2, "scaling": 2}, "fake_lora": {"rank": 2, "scaling": 2}}
    else:
        changes |= {"student_optimiser": {"kind": kind, "flat": 0.5, "last": 0.1}}
    whole, stopped, gone_on = (new_trainer(teacher_seed=1, **changes) for _ in range(3))
    train(whole, tmp_path / "whole")
    calls: list[int] = []

    def stop(step: int, steps: int, values: dict[str, float]) -> None:
        calls.append(step)
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "parts", stop)
    train(gone_on, tmp_path / "parts", lambda step, *_: calls.append(step))
    assert calls == [1, 2, 3, 3, 4]
    for name in ("student", "fake"):
        one, two = whole.states[name], gone_on.states[name]
        assert all(torch.equal(one.trained[n], two.trained[n]) for n in one.trained)
        assert all(torch.equal(one.averages[n], two.averages[n]) for n in one.averages)
    lines = [(tmp_path / run / "curves.jsonl").read_text().splitlines() for run in ("whole", "parts")]
    assert [len(rows) for rows in lines] == [4, 4]
    assert (tmp_path / "parts" / "curves.png").exists()
    whole.settings = whole.settings.model_copy(update={"step_counts": (1,)})
    with pytest.raises(InputError, match="step_counts"):
        train(whole, tmp_path / "parts")
    checkpoint = tmp_path / "parts" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(InputError, match="is broken"):
        train(gone_on, tmp_path / "parts")


def test_what_a_run_writes_is_a_model(new_trainer, tmp_path: Path) -> None:
    trainer = new_trainer(teacher_seed=1)
    folder = train(trainer, tmp_path)
    preset = find_preset(folder)
    loaded = WanTransformer3DModel.from_pretrained(preset.components.transformer.fetch())
    shadow = trainer.states["student"].averages
    assert all(torch.equal(value, shadow[f"transformer.{name}"]) for name, value in loaded.named_parameters())
    assert preset.name == "sprites-student+teacher"


def test_a_lora_that_a_run_writes_merges_to_the_trained_model(
    new_trainer, new_wan, new_latents, tmp_path: Path
) -> None:
    from causvid_adapter.lora import merge_lora

    trainer = new_trainer(teacher_seed=1, student_lora={"rank": 2, "scaling": 4}, student_optimiser={"rate": 0.05})
    folder = train(trainer, tmp_path)
    merged = CausalWan(new_wan())
    merge_lora(merged, folder / "lora.safetensors")
    x, context = new_latents(2), torch.randn(1, TOKENS, DIM)
    with torch.no_grad(), trainer.states["student"].averaged() as trained:
        expected = trained(x, 500.0, context)
        plain = CausalWan(new_wan())(x, 500.0, context)
        torch.testing.assert_close(merged(x, 500.0, context), expected, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-3


def test_the_average_comes_off_again(new_trainer) -> None:
    trainer = new_trainer(teacher_seed=1)
    state = trainer.states["student"]
    trainer.iterate(1)
    trainer.iterate(2)
    before = {name: p.detach().clone() for name, p in state.trained.items()}
    with state.averaged():
        assert any(not torch.equal(p, before[name]) for name, p in state.trained.items())
    with pytest.raises(ZeroDivisionError), state.averaged():
        raise ZeroDivisionError
    assert all(torch.equal(p, before[name]) for name, p in state.trained.items())


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(InputError, match="kapa"):
        settings(negatives={"kapa": (1, 2)})
    with pytest.raises(InputError, match="placement"):
        settings(negatives={"placement": "everywhere"})
    with pytest.raises(InputError, match="rising"):
        settings(negatives={"alpha": (1, 0)})
    with pytest.raises(InputError, match="whole matrix"):
        settings(run={"shard": True}, fake_optimiser={"kind": "matrix"})
    with pytest.raises(InputError, match="grammar"):
        settings(prompts={"kind": "grammar"})


def test_settings_that_differ_are_named() -> None:
    one = settings().model_dump(mode="json")
    two = settings(run={"iterations": 9, "batch_size": 3}, negatives={"kappa": (1, 2)}).model_dump(mode="json")
    assert sorted(differences(one, two)) == ["negatives.kappa", "run.batch_size"]


def test_a_rollout_of_broken_chunks_is_refused(new_trainer) -> None:
    with pytest.raises(InputError, match="multiple of 3"):
        new_trainer(latent_frames=5)
    with pytest.raises(InputError, match="runs in"):
        new_trainer(step_counts=[3])
