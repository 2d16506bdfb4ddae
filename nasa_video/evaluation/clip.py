"""CLIP models of open_clip: how alike a picture and a text are.

clip = Clip(Backbone.parse("ViT-L-14:openai"))
cosine = clip.texts(["a red ball"]) @ clip.pictures([picture]).T
"""

# N samples, D embedding dim, H W picture height and width; embeddings have length 1

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import MagicMock

import numpy as np
import torch
from PIL import Image
from pydantic import JsonValue
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.evaluation.assets import Asset
from nasa_video.files.atomic import file_sha256

Resize = Literal["shortest", "longest", "squash"]
INSTALL = "pip install 'nasa-video[evaluation]'"
# From the sizes of the published files (float32), for people who have to bring them.
_GIGABYTES = {"ViT-B-32": 0.61, "ViT-B-16": 0.60, "ViT-L-14": 1.71, "ViT-H-14": 3.94, "ViT-g-14": 5.47}
_BATCH = 32


@dataclass(frozen=True)
class Backbone:
    """An architecture of open_clip (a name, or a config file of its own form) and its weights (a tag or a file)."""

    architecture: str
    weights: str

    @classmethod
    def parse(cls, text: str) -> Backbone:
        """``ARCHITECTURE:WEIGHTS``, such as ``ViT-L-14:openai`` or ``ViT-L-14:weights.safetensors``.

        Raises:
            InputError: one of the two is missing.
        """
        architecture, _, weights = text.partition(":")
        if not architecture or not weights:
            raise InputError(
                f"a CLIP backbone is ARCHITECTURE:WEIGHTS, such as ViT-L-14:openai or ViT-L-14:FILE, got {text!r}"
            )
        return cls(architecture, weights)

    def __str__(self) -> str:
        return f"{self.architecture}:{self.weights}"


class Clip:
    """A loaded model.

    Args:
        resize: "shortest" cuts the middle out of an oblong picture, "longest" pads it with black, "squash" distorts;
            None takes what the weights were trained with.

    Raises:
        InputError: open_clip is not installed, or the weights are missing, broken or of another architecture.
    """

    def __init__(self, backbone: Backbone, device: torch.device | str | None = None, resize: Resize | None = None):
        self.backbone = backbone
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        library = import_open_clip()
        name = _architecture(library, backbone.architecture)
        settings = library.get_pretrained_cfg(name, backbone.weights)
        file = _find_weights(library, name, backbone, settings)
        self._model = _load(library, name, file, bool(settings.get("quick_gelu")), settings).to(self.device)
        self._tokenize = library.get_tokenizer(name)
        self._fit = Fit.of(library.get_model_preprocess_cfg(self._model), resize)
        self._texts: dict[str, Tensor] = {}
        self.identity: dict[str, JsonValue] = {
            "library": f"open_clip {library.__version__}",
            "architecture": name,
            "weights": backbone.weights if settings else file.name,  # a tag, or a file wherever it lies
            "sha256": file_sha256(file),
            "precision": "float16" if self.device.type == "cuda" else "float32",
            "resize": self._fit.mode,
            "picture_size": list(self._fit.size),
        }

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied by before a softmax, as the model was trained."""
        return float(self._model.logit_scale.exp())

    @torch.no_grad()
    def pictures(self, pictures: Sequence[np.ndarray[Any, Any] | Image.Image]) -> Tensor:
        """Embeddings (N, D), float32 on the CPU, of pictures: PIL, or uint8 (H, W, 3)."""
        batches = [pictures[start : start + _BATCH] for start in range(0, len(pictures), _BATCH)]
        found = []
        for batch in batches:
            inputs = torch.stack([self._fit(_as_image(picture)) for picture in batch]).to(self.device)
            with self._autocast():
                found.append(self._model.encode_image(inputs, normalize=True).float().cpu())
        return torch.cat(found)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (N, D), float32 on the CPU; texts are kept, since a benchmark asks for each many times."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            with self._autocast():
                rows = self._model.encode_text(self._tokenize(batch).to(self.device), normalize=True).float().cpu()
            self._texts.update(zip(batch, rows, strict=True))
        return torch.stack([self._texts[text] for text in texts])

    def cosine(self, frames: Sequence[np.ndarray[Any, Any] | Image.Image], text: str) -> float:
        """Mean cosine of a text and pictures."""
        return float((self.pictures(frames) @ self.texts([text])[0]).mean())

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.float16, enabled=self.device.type == "cuda")


@dataclass(frozen=True)
class Fit:
    """From a picture to a model's input, as open_clip prepares it for inference (bicubic), without torchvision.

    ``size`` is (height, width).
    """

    size: tuple[int, int]
    mode: Resize
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, form: dict[str, Any], mode: Resize | None = None) -> Fit:
        """From open_clip's description of a model's preprocessing."""
        size = form["size"]
        height, width = (size, size) if isinstance(size, int) else (size[-2], size[-1])
        return cls((height, width), mode or form["resize_mode"], tuple(form["mean"]), tuple(form["std"]))

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 (3, H, W), normalised."""
        height, width = self.size
        scaled = image.convert("RGB").resize(self._scaled(*image.size), Image.Resampling.BICUBIC)
        left, top = _offset(scaled.width, width), _offset(scaled.height, height)
        # Beyond the picture's edge a crop is black: it cuts for "shortest" and pads for "longest".
        cut = np.asarray(scaled.crop((left, top, left + width, top + height)), dtype=np.float32) / 255
        normal = (cut - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return torch.from_numpy(normal).permute(2, 0, 1).contiguous()

    def _scaled(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) before cutting or padding."""
        goal_height, goal_width = self.size
        if self.mode == "squash":
            return goal_width, goal_height
        by_width = goal_width / width > goal_height / height
        if self.mode == "longest":
            zoom = min(goal_width / width, goal_height / height)
            return max(1, round(width * zoom)), max(1, round(height * zoom))
        return (goal_width, goal_width * height // width) if by_width else (goal_height * width // height, goal_height)


def _offset(have: int, want: int) -> int:
    """Where a crop in the middle begins; negative for padding."""
    return round((have - want) / 2) if have >= want else -((want - have) // 2)


def import_open_clip() -> Any:
    """The library, also where torchvision is missing or does not fit the torch that is installed.

    open_clip needs torchvision only for pictures' augmentation in training and for ResNets with frozen norms; pictures
    are prepared by :class:`Fit` here.

    Raises:
        InputError: it is not installed; the message says how to.
    """
    if "open_clip" in sys.modules:
        return sys.modules["open_clip"]
    if importlib.util.find_spec("open_clip") is None:
        raise InputError(f"CLIP scores need open_clip: {INSTALL}")
    try:
        with _torchvision():
            return importlib.import_module("open_clip")
    except Exception as error:  # a library that does not fit its neighbours fails in many ways
        _forget("open_clip")
        raise InputError(
            f"open_clip is installed but cannot be imported ({type(error).__name__}: {error}); install it with the "
            f"torchvision that was built for torch {torch.__version__}: {INSTALL}"
        ) from error


@contextmanager
def _torchvision() -> Iterator[None]:
    """Put stand-ins where torchvision cannot be imported, for as long as open_clip is being imported."""
    # These ask once whether torchvision is there, and must not find a stand-in.
    importlib.import_module("transformers.utils.import_utils").is_torchvision_available()
    names = ("torchvision", "torchvision.ops", "torchvision.ops.misc", "torchvision.transforms",
             "torchvision.transforms.functional")  # fmt: skip
    stands_in = False
    try:
        for name in names:
            importlib.import_module(name)
    except Exception:  # absent, or built for another torch (RuntimeError)
        stands_in = True
        _forget("torchvision")
        for name in names:
            sys.modules[name] = MagicMock(__path__=[], __spec__=importlib.machinery.ModuleSpec(name, None))
    try:
        yield
    finally:
        if stands_in:
            _forget("torchvision")


def _forget(package: str) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]


def _architecture(library: Any, architecture: str) -> str:
    """Its name in the library; a config file is registered under its stem."""
    if architecture.endswith(".json"):
        path = Path(architecture)
        if not path.is_file():
            raise InputError(f"the CLIP config {path} does not exist")
        library.add_model_config(path)
        architecture = path.stem
    if library.get_model_config(architecture) is None:
        known = ", ".join(name for name in library.list_models() if name in _GIGABYTES)
        raise InputError(
            f"open_clip has no model {architecture!r}; it has {known} and many more, or give a config.json"
        )
    return architecture


def _find_weights(library: Any, name: str, backbone: Backbone, settings: dict[str, Any]) -> Path:
    path = Path(backbone.weights).expanduser()
    if path.is_file():
        return path
    tags = library.list_pretrained_tags_by_model(name)
    if not settings:
        raise InputError(
            f"{backbone.weights!r} is neither a file nor weights of {name} that open_clip knows; it knows "
            f"{', '.join(tags) or 'none'}"
        )
    repo = (settings.get("hf_hub") or settings.get("url") or "").strip("/")
    size = _GIGABYTES.get(name.removesuffix("-quickgelu"))
    asset = Asset(f"the CLIP weights {backbone}", repo, "open_clip_model.safetensors", size, "see its page")
    if not settings.get("hf_hub") or asset.find() is None:
        asset.tell()
    try:
        return Path(library.download_pretrained(settings))
    except Exception as error:  # the hub client raises many unrelated types
        quick = "-quickgelu" if settings.get("quick_gelu") and not name.endswith("-quickgelu") else ""
        raise asset.missing(f"{name}{quick}:FILE", error) from error


def _load(library: Any, name: str, file: Path, quick_gelu: bool, settings: dict[str, Any]) -> Any:
    form = {key: settings[key] for key in ("mean", "std", "interpolation", "resize_mode") if settings.get(key)}
    try:
        with _quiet():
            model = library.create_model(
                name, force_quick_gelu=quick_gelu, force_preprocess_cfg=form, load_weights=False, pretrained=None
            )
            library.load_checkpoint(model, str(file), strict=True, weights_only=True)
    except Exception as error:  # torch, safetensors and pickle raise many unrelated types
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{file} does not hold the weights of the CLIP model {name} ({type(error).__name__}: {reason}); give the "
            "architecture that it was trained with"
        ) from error
    return model.eval().requires_grad_(False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without open_clip's warning that a model has no weights yet."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(action="ignore"):
        try:
            yield
        finally:
            logging.disable(level)


def _as_image(picture: np.ndarray[Any, Any] | Image.Image) -> Image.Image:
    return picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
