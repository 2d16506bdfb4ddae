"""NASA-T for images as published: the gates, the placements, the CLIP loss, resuming."""

# B batch, C channels, h w latent height and width

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from nasa_video import Nasa, guided
from nasa_video.train.attention import guided_training
from nasa_video.train.batch import Texts, encode_texts, seeded
from nasa_video.train.distillation import descend, guided_target, score_direction
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.dry_run import NEGATIVES, PROMPTS
from nasa_video.train.image import ImageTrainer
from nasa_video.train.image_networks import clamped_loss, tiny_clip, tiny_image_parts
from nasa_video.train.run import train
from nasa_video.train.settings import PLACEMENTS, ImageSettings, parse_settings

SIZES = {"sd": (77, 24), "pixart": (12, 20)}


def new_trainer(family: str = "sd", twins: bool = False, **changes: Any) -> ImageTrainer:
    tokens, dim = SIZES[family]
    data: dict[str, Any] = {
        "kind": "image",
        "title": "tiny",
        "family": family,
        "teacher": "none",
        "max_tokens": tokens,
        "text_dim": dim,
        "lora": {"rank": 2, "scaling": 4},
        "prompts": {"kind": "file"},
        "negatives": {"placement": "student+teacher", "texts": {"kind": "grammar"}},
        "student_optimiser": {"rate": 1e-3},
        "fake_optimiser": {"rate": 1e-2},
        "run": {"iterations": 2, "batch_size": 2, "precision": "fp32", "sheet_samples": 2},
    }
    for name, value in changes.items():
        data[name] = {**data[name], **value} if isinstance(value, dict) and name in data else value
    settings = parse_settings(data, "test")
    assert isinstance(settings, ImageSettings)
    return ImageTrainer(
        settings, tiny_image_parts(settings), PROMPTS, NEGATIVES, DistributedContext(precision="fp32", cpu=True)
    )


def contexts_of(trainer: ImageTrainer, alpha: float = 0.6, kappa: float = 3.0) -> Any:
    texts = Texts(PROMPTS[:2], NEGATIVES[:2], torch.full((2,), alpha), torch.full((2,), kappa))
    return encode_texts(texts, trainer.parts.encoder, torch.device("cpu"))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("family", SIZES)
def test_an_unguided_start_has_no_direction(family, prediction) -> None:
    trainer = new_trainer(family, negatives={"placement": "nowhere"}, prediction=prediction)
    latents = torch.randn(2, 4, 8, 8)
    assert trainer.direction(latents, contexts_of(trainer, kappa=1.0), seeded(1)).abs().max() == 0
    assert trainer.direction(latents, contexts_of(trainer, kappa=3.0), seeded(1)).abs().max() > 0


@pytest.mark.parametrize("family", SIZES)
def test_an_unguided_start_gives_the_student_no_gradient(family) -> None:
    trainer = new_trainer(family, negatives={"placement": "nowhere", "kappa": (1, 1)})
    assert trainer.iterate(1)["student gradient"] == 0
    assert trainer.iterate(2)["student gradient"] > 0  # the LoRA teacher has learnt the student's pictures


@pytest.mark.parametrize("family", SIZES)
@torch.no_grad()
def test_the_trained_students_nasa_is_the_one_that_is_shipped(family) -> None:
    trainer = new_trainer(family)
    contexts, noise = contexts_of(trainer), torch.randn(2, 4, 8, 8)
    text, alpha_B, lengths = trainer.student_text(contexts)
    with guided_training(trainer.guidance, alpha_B, lengths):
        actual = trainer.generate(noise, text, None, seeded(0))
    plain = new_trainer(family, negatives={"placement": "teacher"})
    unguided = plain.generate(noise, contexts.positive, None, seeded(0))
    from diffusers.models.attention_processor import AttnProcessor2_0

    for module in plain.student.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor2_0())
    mask = None
    if family == "pixart":
        mask = torch.arange(12)[None] < contexts.negative.lengths[:, None]
    from nasa_video.backbones.base import NegativeContext

    with guided(plain.student, [NegativeContext(contexts.negative.embeds, mask)], Nasa(0.6)):
        expected = plain.generate(noise, contexts.positive, None, seeded(0))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (unguided - expected).abs().max() > 1e-3


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_placement_trains(placement) -> None:
    trainer = new_trainer(negatives={"placement": placement})
    frozen = {name: p.clone() for name, p in trainer.fake.named_parameters() if not p.requires_grad}
    trainer.iterate(1)
    values = trainer.iterate(2)
    assert values["direction"] > 0
    assert values["student gradient"] > 0
    assert (values["effect"] > 0) == ("student" in PLACEMENTS[placement])
    assert all(torch.equal(p, frozen[name]) for name, p in trainer.fake.named_parameters() if name in frozen)


@pytest.mark.parametrize("family", SIZES)
def test_checkpointing_changes_no_gradient(family) -> None:
    gradients = []
    for checkpointing in (False, True):
        trainer = new_trainer(family, run={"gradient_checkpointing": checkpointing})
        trainer._sample_and_gradient(None, seeded(5), False, 0.5)
        gradients.append(torch.cat([p.grad.flatten() for p in trainer.student.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_with_the_clip_loss_is_the_uninterrupted_one(tmp_path: Path) -> None:
    changes = {"clip": {"margin": 0.9}, "run": {"iterations": 3, "checkpoint_every": 1, "sheet_every": 3}}
    whole, stopped, gone_on = (new_trainer(**changes) for _ in range(3))
    model = train(whole, tmp_path / "whole")

    def stop(step: int, *_: Any) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(stopped, tmp_path / "parts", stop)
    train(gone_on, tmp_path / "parts")
    for name in ("student", "fake"):
        one, two = whole.states[name], gone_on.states[name]
        assert all(torch.equal(one.trained[n], two.trained[n]) for n in one.trained)
    assert (tmp_path / "whole" / "sheets" / "000003.png").exists()
    from diffusers import UNet2DConditionModel

    loaded = UNet2DConditionModel.from_pretrained(model / "unet")
    shadow = whole.states["student"].averages
    assert all(torch.equal(value, shadow[name]) for name, value in loaded.named_parameters())


def test_the_clip_loss_stops_at_its_margin_and_reaches_the_pictures() -> None:
    assert clamped_loss(torch.tensor([0.5, 0.37]), 0.37) == 0
    assert float(clamped_loss(torch.tensor([0.17]), 0.37)) == pytest.approx(0.2)
    pictures = torch.randn(2, 3, 32, 32, requires_grad=True)
    clamped_loss(tiny_clip().similarity(pictures, PROMPTS[:2]), 1.0).backward()
    assert pictures.grad is not None
    assert pictures.grad.abs().max() > 0


def test_the_formulas() -> None:
    x, y, z = torch.randn(3, 2, 4, 3, 3)
    kappa = torch.tensor([0.0, 2.5])
    target = guided_target(x, y, kappa)
    torch.testing.assert_close(target[0], y[0])
    torch.testing.assert_close(target[1], y[1] + 2.5 * (x[1] - y[1]))
    weight = torch.tensor([0.5, 2.0])
    torch.testing.assert_close(score_direction(x, y, weight)[1], 2 * (x[1] - y[1]))
    sample = z.clone().requires_grad_(True)
    descend(sample, x).backward()
    torch.testing.assert_close(sample.grad, x / x.numel())


def test_a_sheet_shows_every_prompt_without_and_with_nasa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Any, Any]] = []
    monkeypatch.setattr(
        "nasa_video.train.distillation.save_sheet", lambda clips, labels, _: drawn.append((clips, labels))
    )
    trainer = new_trainer(run={"sheet_samples": 2})
    trainer.sheet(tmp_path / "sheet.png")
    ((images, labels),) = drawn
    assert images.shape[:2] == (2, 2)  # a row a prompt, two images each
    assert len(labels) == 2
    assert all("without: " in label for label in labels)
    assert (tmp_path / "sheet.txt").read_text().splitlines() == labels
