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
from typing import Any

# Packages whose own __init__ imports everything in them.
_PARENTS = (
    "diffusers.hooks",
    "diffusers.models",
    "diffusers.models.autoencoders",
    "diffusers.models.transformers",
    "diffusers.models.unets",
)
_NEEDED = ("diffusers.models.autoencoders.autoencoder_kl_wan", "diffusers.models.transformers.transformer_wan")
_BLOCKED = ("torch._dynamo", "transformers")
_UNNEEDED = ("peft", "torchao", "transformers", "bitsandbytes", "optimum_quanto", "gguf", "nvidia_modelopt", "scipy")


def import_lean() -> bool:
    """Import Wan's transformer and autoencoder alone; False, and nothing, where diffusers is imported already.

    Afterwards every module is as if it were imported the usual way, but those of Wan know no peft, torchao or compiler:
    do not call it for a run that compiles, or that loads LoRAs.
    """
    if "diffusers" in sys.modules:
        return False
    with suppress(ImportError, AttributeError, KeyError), _blocked():
        import diffusers
        from diffusers.utils import import_utils

        with _unavailable(import_utils), _empty_parents(diffusers):
            for name in _NEEDED:
                importlib.import_module(name)
        return True
    return False


@contextmanager
def _blocked() -> Iterator[None]:
    """What is tried and done without cannot be imported, and nothing has to be kept from a compiler."""
    import torch

    blocked = [name for name in _BLOCKED if name not in sys.modules]
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


@contextmanager
def _empty_parents(diffusers: ModuleType) -> Iterator[None]:
    """Modules of packages are found without running the packages' __init__, which is run by the next who imports it."""
    made = {}
    for name in _PARENTS:
        spec = importlib.util.spec_from_loader(name, loader=None, is_package=True)
        assert spec is not None
        made[name] = importlib.util.module_from_spec(spec)
        made[name].__path__ = [f"{diffusers.__path__[0]}/{'/'.join(name.split('.')[1:])}"]
        sys.modules[name] = made[name]
    try:
        yield
    finally:
        sys.modules.pop("diffusers.loaders", None)  # which lists what it offers without those packages
        for name in made:
            if sys.modules.get(name) is made[name]:
                del sys.modules[name]
