"""The models that a server offers, loaded when they are first wanted."""

from __future__ import annotations

import logging
import threading
from typing import Any

from nasa_video.errors import InputError
from nasa_video.models.memory_plan import check_plan
from nasa_video.models.placement import RESIDENT
from nasa_video.models.presets import find_preset, video_presets
from nasa_video.serve.places import plan_streams
from nasa_video.serve.settings import ServeSettings
from nasa_video.video.pipeline import VideoPipeline

log = logging.getLogger(__name__)


class Library:
    """Pipelines by the names under which the operator offers them."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self._loaded: dict[str, VideoPipeline] = {}
        self._lock = threading.Lock()

    def name(self, wanted: str | None) -> str:
        """The name of an offered model; None takes the first.

        Raises:
            InputError: the operator does not offer it. It is compared, never opened.
        """
        if wanted is None:
            return self.settings.models[0]
        if wanted not in self.settings.models:
            raise InputError(f"this server does not offer that model; it offers {', '.join(self.settings.models)}")
        return wanted

    def get(self, name: str) -> VideoPipeline:
        """The pipeline, loaded now if it was not.

        Raises:
            InputError: its weights are missing, or it does not fit beside what is loaded.
        """
        settings = self.settings
        with self._lock:
            if name not in self._loaded:
                # The places are the first one's; another model must find room for a stream beside it.
                plan = plan_streams(settings, name, settings.max_streams if name == settings.models[0] else 1)
                placement = RESIDENT if plan is None else check_plan(plan, settings.memory, log.info)
                self._loaded[name] = VideoPipeline.from_pretrained(
                    name, settings.device, attention=settings.attention, placement=placement
                )
            return self._loaded[name]

    def describe(self) -> list[dict[str, Any]]:
        """For ``GET /models``: what is offered, then what else there is."""
        others = [name for name in video_presets() if name not in self.settings.models]
        return [_describe(name, offered=True) for name in self.settings.models] + [
            _describe(name, offered=False) for name in others
        ]


def _describe(name: str, *, offered: bool) -> dict[str, Any]:
    preset = find_preset(name)
    video, sampler = preset.video, preset.sampler
    return {
        "name": name,
        "title": preset.title,
        "licence": preset.licence,
        "offered": offered,
        "present": preset.present,
        "width": video.width,
        "height": video.height,
        "fps": video.fps,
        "upscale": video.upscale,
        "frames": video.frames,
        "steps": sorted(sampler.steps) if sampler.steps != "any" else None,
        "default_steps": sampler.default_steps,
        "scales": {method: settings.get("scale") for method, settings in preset.guidance.items()},
        "guidance": preset.default_guidance,
        "on_change": sampler.on_change,
        "vocabulary": preset.vocabulary,
    }
