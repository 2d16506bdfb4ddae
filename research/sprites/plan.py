"""The settings of a whole training, read from one YAML file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from causvid_adapter import FlowMatchSchedule
from research.sprites.autoencoder import AutoencoderTraining
from research.sprites.detector import DetectorTraining
from research.sprites.distill import DistillTraining
from research.sprites.flow import FlowTraining
from research.sprites.latent_detector import LatentDetectorTraining
from research.sprites.opening import OpeningTraining


@dataclass(frozen=True)
class DatasetSettings:
    """How many clips are rendered and encoded, the share of them that turns into another scene, and first chunks.

    `short_clips` more are encoded as far as their first chunk only: what a video shows is decided there, and a batch of
    them holds three times as many scenes for the same work.
    """

    clips: int = 8192
    switched_share: float = 0.25
    short_clips: int = 24576


@dataclass(frozen=True)
class EvaluationSettings:
    """What the model card measures: prompts that nothing was chosen on, and the teacher's sampler.

    The student gets `prompts` of them, and more until each texture, weather and flaw is stated by `stated_at_least`;
    base and teacher the first `teacher_prompts`. `spread_videos` are made for each shape; `long_prompts` are rolled
    out to eight times the training length.
    """

    prompts: int = 320
    stated_at_least: int = 60
    teacher_prompts: int = 120
    prompt_seed: int = 20260101
    teacher_steps: int = 20
    teacher_scale: float = 2.0
    spread_videos: int = 40
    detector_clips: int = 512
    long_prompts: int = 32


@dataclass(frozen=True)
class TrainingPlan:
    """Every stage's settings."""

    seed: int
    text_tokens: int
    autoencoder: AutoencoderTraining
    dataset: DatasetSettings
    detector: DetectorTraining
    base: FlowTraining
    latent_detector: LatentDetectorTraining
    student: DistillTraining
    reader: LatentDetectorTraining
    opening: OpeningTraining
    evaluation: EvaluationSettings

    @property
    def latent_size(self) -> tuple[int, int, int]:
        """(C, h, w) of a latent frame of a 64 x 64 picture."""
        model = self.autoencoder.model
        side = 64 // int(model["scale_factor_spatial"])
        return int(model["z_dim"]), side, side

    def schedule(self, num_steps: int) -> FlowMatchSchedule:
        """The student's sampler of so many steps.

        Raises:
            ValueError: the student was not trained for this number.
        """
        if num_steps not in self.student.steps:
            raise ValueError(f"the student takes {', '.join(map(str, self.student.steps))} steps, not {num_steps}")
        steps, opening, alone = self.student.steps[num_steps], self.opening, None
        if opening.iterations and num_steps > 1:
            alone = FlowMatchSchedule(1.0, (opening.first_timestep, *steps[1:]), euler_steps=1)
        return FlowMatchSchedule(1.0, steps, without_history=alone)


_STAGES: dict[str, type] = {
    "autoencoder": AutoencoderTraining,
    "dataset": DatasetSettings,
    "detector": DetectorTraining,
    "base": FlowTraining,
    "latent_detector": LatentDetectorTraining,
    "student": DistillTraining,
    "reader": LatentDetectorTraining,
    "opening": OpeningTraining,
    "evaluation": EvaluationSettings,
}


def load_plan(path: Path) -> TrainingPlan:
    """Reads a plan; every setting must be there and known.

    A plan that `extends` another one of its folder, by name without .yaml, holds only the settings that differ from it.

    Raises:
        ValueError: a missing or unknown setting, by name.
    """
    data = _read(path)
    _check_names(path.name, data, {"seed", "text_tokens", *_STAGES})
    stages = {}
    for name, stage in _STAGES.items():
        values = {key: _frozen(v) for key, v in data[name].items()}
        _check_names(f"{path.name}, {name}", values, {f.name for f in fields(stage)})
        if "steps" in values:
            values["steps"] = {int(n): tuple(float(t) for t in ts) for n, ts in values["steps"].items()}
        stages[name] = stage(**values)
    return TrainingPlan(seed=int(data["seed"]), text_tokens=int(data["text_tokens"]), **stages)


def _read(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if (parent := data.pop("extends", None)) is None:
        return data
    if not (source := path.with_name(f"{parent}.yaml")).exists():
        raise ValueError(f"{path.name} extends {parent}, but there is no {source}")
    whole = _read(source)
    for name, value in data.items():
        whole[name] = {**whole[name], **value} if isinstance(value, dict) and name in whole else value
    return whole


def _check_names(where: str, given: dict[str, Any], known: set[str]) -> None:
    unknown, missing = sorted(set(given) - known), sorted(known - set(given))
    if unknown:
        raise ValueError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    if missing:
        raise ValueError(f"{where}: missing settings {', '.join(missing)}")


def _frozen(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
