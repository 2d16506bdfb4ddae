"""The shipped detector recognises what the renderer draws, and says "none" where there is nothing."""

import pytest
import torch

from nasa_video.sprites.detectors import Detector
from nasa_video.sprites.world import sample_scenes
from research.sprites.detector import truth
from research.sprites.renderer import render


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load()


def test_most_answers_on_unseen_clips_are_right(detector):
    scenes = sample_scenes(48, torch.Generator().manual_seed(987654))
    found, right = detector.detect(render(scenes)), truth(scenes)
    for attribute, labels in right.items():
        share = sum(a == b for a, b in zip(found[attribute], labels, strict=True)) / len(scenes)
        assert share >= 0.8, (attribute, share)


def test_an_empty_scene_has_no_sprite(detector):
    scenes = sample_scenes(12, torch.Generator().manual_seed(5))
    clean = dict.fromkeys(("blurry", "noisy", "dim", "flickering", "pixelated", "watermark", "border"), 0)
    found = detector.detect(render(scenes.replace(count=-1, weather=0, **clean)))
    for attribute in ("count", "shape", "colour", "motion"):
        assert sum(label == "none" for label in found[attribute]) >= 10, attribute


def test_clips_of_other_lengths_are_read(detector):
    scenes = sample_scenes(8, torch.Generator().manual_seed(6))
    for frames in (9, 21, 69):
        assert len(detector.detect(render(scenes, frames))["colour"]) == 8
