"""Negative prompts for few-step and one-step generators, first of all for autoregressive streaming video."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasa_video.guidance import CentredNasa, ClassifierFree, Nag, Nasa, Negative, ScaleSchedule, Vsf
    from nasa_video.integration.guided import guided
    from nasa_video.pipeline import VideoPipeline

try:
    __version__ = version("nasa-video")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

_HOMES = {
    "CentredNasa": "guidance",
    "ClassifierFree": "guidance",
    "Nag": "guidance",
    "Nasa": "guidance",
    "Negative": "guidance",
    "ScaleSchedule": "guidance",
    "Vsf": "guidance",
    "VideoPipeline": "pipeline",
    "guided": "integration.guided",
}
__all__ = [
    "CentredNasa",
    "ClassifierFree",
    "Nag",
    "Nasa",
    "Negative",
    "ScaleSchedule",
    "VideoPipeline",
    "Vsf",
    "__version__",
    "guided",
]


def __getattr__(name: str) -> Any:
    # Late, so that `nasa-video --help` does not wait for torch and diffusers.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from nasa_video.misfit import misfit

    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except Exception as error:
        known = misfit(error)
        if known is None:
            raise
        raise known from error
    return getattr(home, name)
