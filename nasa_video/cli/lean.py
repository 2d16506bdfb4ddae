"""A short start: of diffusers only what a video needs is imported, without the models and tools around it.

``from diffusers import WanTransformer3DModel`` imports every autoencoder and transformer, peft, torchao, transformers'
models and torch's compiler, which take longer than a short video. Only the command line does this, in a process that is
its own: a library must leave its user's diffusers whole.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasa_video.video.request import LoadOptions, VideoRequest

# Packages whose own __init__ imports everything in them.
_PARENTS = (
    "diffusers.hooks",
    "diffusers.models",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
_NEEDED = ("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan")
_UNNEEDED = ("peft", "torchao", "transformers", "bitsandbytes", "optimum_quanto", "gguf", "nvidia_modelopt", "scipy")


def start_lean(request: VideoRequest, options: LoadOptions) -> None:
    """:func:`import_lean` for a run that needs nothing of what it leaves out."""
    from nasa_video.models.presets import DEFAULT_MODEL, find_preset

    own = find_preset(request.model or DEFAULT_MODEL).components.loras
    if options.compile == "off" and not request.loras and not own:
        import_lean()


def import_lean() -> bool:
    """Import Wan's transformer and autoencoder alone; False, and nothing, where diffusers is imported already.

    Afterwards every module is as if it were imported the usual way, but those of Wan know no peft, torchao or compiler:
    do not call it for a run that compiles, or that loads LoRAs.
    """
    if "diffusers" in sys.modules:
        return False
    with suppress(ImportError, AttributeError, KeyError), _blocked("torch._dynamo"):
        import diffusers
        from diffusers.utils import import_utils

        for name in ("diffusers.loaders", "diffusers.schedulers"):  # which list what they offer when they are imported
            importlib.import_module(name)
        _postpone_parents(diffusers)
        diffusers.utils.USE_PEFT_BACKEND = False  # else the first pass imports peft, to scale no LoRAs
        with _unavailable(import_utils), _blocked("transformers"):  # which diffusers looks for when it starts
            for name in _NEEDED:
                importlib.import_module(name)
        return True
    return False


@contextmanager
def _blocked(*names: str) -> Iterator[None]:
    """What is tried and done without cannot be imported, and nothing has to be kept from a compiler."""
    import torch

    blocked = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(blocked))  # type: ignore[arg-type]
    disable = torch.compiler.disable

    def left_alone(fn: Any = None, recursive: bool = True, **more: Any) -> Any:
        return fn if fn is not None else lambda fn: fn

    torch.compiler.disable = left_alone
    try:
        yield
    finally:
        torch.compiler.disable = disable
        for name in blocked:
            sys.modules.pop(name, None)


@contextmanager
def _unavailable(import_utils: ModuleType) -> Iterator[None]:
    """Diffusers finds none of the packages that it can do without."""
    flags = [f"_{name}_available" for name in _UNNEEDED]
    before = {flag: getattr(import_utils, flag) for flag in flags if hasattr(import_utils, flag)}
    for flag in before:
        setattr(import_utils, flag, False)
    try:
        yield
    finally:
        for flag, value in before.items():
            setattr(import_utils, flag, value)


class _Later(ModuleType):
    """A package whose __init__ is run when somebody wants something of it that is not there yet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or self.__spec__ is None or self.__spec__.loader is None:
            raise AttributeError(name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        self.__spec__.loader.exec_module(self)
        return getattr(sys.modules[self.__name__], name)  # which may have put another module in its place


def _postpone_parents(diffusers: ModuleType) -> None:
    """Their modules can be imported without them."""
    for name in _PARENTS:
        folder = f"{diffusers.__path__[0]}/{'/'.join(name.split('.')[1:])}"
        spec = importlib.util.spec_from_file_location(
            name, f"{folder}/__init__.py", submodule_search_locations=[folder]
        )
        assert spec is not None
        package = sys.modules[name] = _Later(name)
        package.__spec__, package.__path__, package.__package__ = spec, [folder], name
        package.__file__, package.__loader__ = spec.origin, spec.loader
        above, _, own = name.rpartition(".")
        setattr(sys.modules[above], own, package)
