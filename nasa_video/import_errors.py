"""Why diffusers cannot be imported: an installed torchvision that was built for another torch."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.metadata import version

from nasa_video.errors import NasaVideoError

_INDEX = "https://download.pytorch.org/whl/"


def explain_import_error(error: BaseException) -> NasaVideoError | None:
    """The reason of a failed import with the way out; None where it is another error.

    transformers, and with it diffusers, imports any torchvision that is installed, and fails at one that does not fit.
    pip installs such a one beside a torch from another index than PyPI, since both carry the same version number.
    """
    if not isinstance(error, ImportError | RuntimeError) or importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as reason:  # RuntimeError for missing operators, ImportError or OSError for missing libraries
        torch = version("torch")
        build = torch.partition("+")[2]
        index = f"--index-url {_INDEX}{build} " if build else ""
        return NasaVideoError(
            f"torchvision {version('torchvision')} does not fit torch {torch}, and diffusers cannot be imported beside "
            f"it ({reason}); nothing here needs torchvision: pip uninstall torchvision. Who wants it for other work "
            f"then brings the one for this torch: pip install {index}torch=={torch} torchvision"
        )
    return None
