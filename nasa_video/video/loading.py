"""The pipeline of a request: its memory is planned before anything is downloaded, and then it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

from nasa_video.errors import InputError
from nasa_video.guidance.attention import AttentionError, Backend
from nasa_video.models.loading import DecoderKind, choose_device, default_dtype
from nasa_video.models.memory_plan import PlanRequest, check_plan, make_plan
from nasa_video.models.placement import Placement
from nasa_video.models.presets import DEFAULT_MODEL, find_preset
from nasa_video.video.pipeline import CompileKind, VideoPipeline
from nasa_video.video.request import LoadOptions, VideoRequest


def load_pipeline(
    request: VideoRequest,
    options: LoadOptions,
    say: Callable[[str], None],
    load: Callable[..., VideoPipeline] | None = None,
    *,
    endless: bool = False,
    processes: int = 1,
) -> VideoPipeline:
    """Load the model of a request, in the placement that its plan chooses; says what it takes.

    Args:
        load: in place of :meth:`VideoPipeline.from_pretrained`.
        processes: that share each pass and its history.

    Raises:
        InputError: it cannot be had, or the run does not fit.
    """
    placement = plan_placement(request, options, say, endless=endless, processes=processes)
    try:
        return (load or VideoPipeline.from_pretrained)(
            request.model or DEFAULT_MODEL,
            options.device,
            attention=cast(Backend, options.attention),
            fold_padding=request.fold_padding is not False,
            loras=[(Path(lora.path), lora.scale) for lora in request.loras or ()],
            decoder=cast(DecoderKind, request.decoder or "full"),
            placement=placement,
            decode_ahead=options.decode_ahead,
            compiled=cast(CompileKind, options.compile),
        )
    except (AttentionError, ValueError) as error:
        raise InputError(str(error)) from error


def plan_placement(
    request: VideoRequest,
    options: LoadOptions,
    say: Callable[[str], None],
    *,
    endless: bool = False,
    processes: int = 1,
) -> Placement:
    """How the model is placed, planned before anything of it is downloaded; says what it takes.

    Raises:
        InputError: the run does not fit.
    """
    preset, device = find_preset(request.model or DEFAULT_MODEL), choose_device(options.device)
    request.check_extension(preset)
    preset = preset.model_copy(update={"sampler": request.sampler(preset.sampler)})
    classifier_free = str(request.guidance).startswith("cfg")
    wanted = PlanRequest(
        width=request.width,
        height=request.height,
        frames=request.most_frames(1 + 4 * (preset.sampler.frames_per_chunk - 1)),
        endless=endless,
        memory=options.memory,
        weights=options.weights,
        offload=options.offload,
        tiny_decoder=request.decoder == "tiny",
        overlapped=options.decode_ahead > 0,
        prompts=None if endless else request.texts or [""],
        rollout=request.rollout,
        branches=(2 if classifier_free else 1) + bool(request.compare),
        videos=2 if request.compare else 1,
        processes=processes,
    )
    before = request.placement if options.memory is None else None
    plan = make_plan(preset, device, default_dtype(device), wanted, before)
    if plan is None:
        return Placement(options.weights or "plain", offload=bool(options.offload))
    return check_plan(plan, options.memory, say)
