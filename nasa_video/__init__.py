"""Negative prompts for few-step and one-step generators, first of all for autoregressive streaming video."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasa_video.guidance.methods import AttentionGuidance, CentredNasa, ClassifierFree, Nag, Nasa, Vsf, register
    from nasa_video.guidance.schedule import ScaleSchedule
    from nasa_video.guidance.terms import Negative
    from nasa_video.integrations.diffusers.guided import guided
    from nasa_video.video.pipeline import VideoPipeline
    from nasa_video.video.result import Video

try:
    __version__ = version("nasa-video")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "CentredNasa": "guidance.methods",
    "ClassifierFree": "guidance.methods",
    "Nag": "guidance.methods",
    "Nasa": "guidance.methods",
    "Negative": "guidance.terms",
    "ScaleSchedule": "guidance.schedule",
    "Vsf": "guidance.methods",
    "AttentionGuidance": "guidance.methods",
    "Video": "video.result",
    "VideoPipeline": "video.pipeline",
    "register": "guidance.methods",
    "guided": "integrations.diffusers.guided",
}
__all__ = [
    "AttentionGuidance",
    "CentredNasa",
    "ClassifierFree",
    "Nag",
    "Nasa",
    "Negative",
    "ScaleSchedule",
    "Video",
    "VideoPipeline",
    "Vsf",
    "__version__",
    "guided",
    "register",
]


def __getattr__(name: str) -> Any:
    # Late, so that `nasa-video --help` does not wait for torch and diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib
    import logging

    from nasa_video.import_errors import explain_import_error

    # An installed torchao tells of kernels for other machines as it is imported; nobody can do anything about it.
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except Exception as error:
        known = explain_import_error(error)
        if known is None:
            raise
        raise known from error
    finally:
        logging.disable(before)
    return getattr(home, name)
