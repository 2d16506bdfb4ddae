"""The models that a server offers: loaded when they are first wanted, with room for as many streams as were planned."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable
from typing import Any

from nasa_video.errors import InputError, format_bytes
from nasa_video.models.loading import choose_device, default_dtype
from nasa_video.models.memory_estimate import fitting_card
from nasa_video.models.memory_plan import Plan, PlanRequest, check_plan, make_plan
from nasa_video.models.placement import RESIDENT
from nasa_video.models.presets import find_preset, video_presets
from nasa_video.serve.protocol import describe_model
from nasa_video.serve.settings import ServeSettings
from nasa_video.video.pipeline import VideoPipeline

log = logging.getLogger(__name__)


class ModelRegistry:
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
                # The capacity is the first one's; another model must find room for a stream beside it.
                plan = plan_streams(settings, name, settings.max_streams if name == settings.models[0] else 1)
                placement = RESIDENT if plan is None else check_plan(plan, settings.memory, log.info)
                self._loaded[name] = VideoPipeline.from_pretrained(
                    name, settings.device, attention=settings.attention, placement=placement
                )
            return self._loaded[name]

    def describe(self) -> list[dict[str, Any]]:
        """For ``GET /models``: what is offered, then what else there is."""
        offered = self.settings.models
        others = [name for name in video_presets() if name not in offered]
        return [describe_model(name, find_preset(name), offered=name in offered) for name in (*offered, *others)]


def plan_streams(settings: ServeSettings, model: str, streams: int) -> Plan | None:
    """The plan of a model that makes so many endless streams in turns; None where its sizes are not known.

    Each stream has a history and a decoder of its own. What one takes beyond that, to be compared or for CFG's second
    branch, is looked at when it begins.

    Raises:
        InputError: they fit the wanted memory in no way.
    """
    device = choose_device(settings.device)
    request = PlanRequest(endless=True, memory=settings.memory, branches=streams, videos=streams)
    return make_plan(find_preset(model), device, default_dtype(device), request)


def plan_capacity(settings: ServeSettings, say: Callable[[str], None], *, fewer: bool) -> ServeSettings:
    """Say the plan of the first model; ``fewer`` leaves only as many streams at once as there is memory for.

    Raises:
        InputError: the streams do not fit; the message says how many do.
    """
    wanted = settings.max_streams
    refusal = None
    for streams in range(wanted, 0, -1):
        try:
            plan = plan_streams(settings, settings.models[0], streams)
        except InputError as error:
            refusal = refusal or str(error)
            continue
        if plan is not None and plan.enough is False:
            refusal = refusal or _refusal(settings, plan)
            continue
        if refusal is not None and not fewer:
            raise InputError(f"{refusal}; --streams {streams} would fit")
        if plan is not None:
            check_plan(plan, settings.memory, say)
        if streams < wanted:
            say(f"there is memory for {streams} of {wanted} streams at once")
        return dataclasses.replace(settings, max_streams=streams)
    raise InputError(f"{refusal}; fewer streams do not fit either")


def _refusal(settings: ServeSettings, plan: Plan) -> str:
    assert plan.free is not None
    card = fitting_card(plan.run, plan.free, plan.host_free)
    less = "" if card is None else f"; --memory {card} would fit"
    return (
        f"not enough memory on {plan.device}: {settings.models[0]} with {plan.run.decoders} streams needs "
        f"{format_bytes(plan.needs.peak)}, {format_bytes(plan.free)} are free{less}"
    )
