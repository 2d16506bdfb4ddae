"""How many streams of a model fit, planned before it is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from nasa_video.errors import InputError, format_bytes
from nasa_video.models.loading import choose_device, default_dtype
from nasa_video.models.memory_estimate import fitting_card
from nasa_video.models.memory_plan import Plan, PlanRequest, check_plan, make_plan
from nasa_video.models.presets import find_preset
from nasa_video.serve.settings import ServeSettings


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


def plan_places(settings: ServeSettings, say: Callable[[str], None], *, fewer: bool) -> ServeSettings:
    """Say the plan of the first model; ``fewer`` leaves only as many places as there is memory for.

    Raises:
        InputError: the places do not fit; the message says how many do.
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
