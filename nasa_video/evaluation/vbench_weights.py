"""Which weight files each VBench dimension needs: name, size, source, licence, and whether it is here."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download, try_to_load_from_cache

from nasa_video.errors import InputError, OutputError
from nasa_video.evaluation.identity import cached_sha256

CACHE_VARIABLE = "VBENCH_CACHE_DIR"
"""VBench's own variable: where it looks for weights."""

_OPENAI = "https://openaipublic.azureedge.net/clip/models"
_HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Weights:
    """One thing to bring.

    Attributes:
        path: where it belongs, relative to the cache; for kind "hub" the repository.
        bytes: size of the download; rounded where the source only says "4.48 GB".
        licence: of the weights, as their source states it.
        sha256: where the source states one.
        kind: "file"; "zip", an archive that is unpacked beside; "hub", files of a hub repository in the hub's cache.
        member: a file that is there when it is complete (of an archive or repository).
        also: second places where the same file is looked for.
    """

    path: str
    bytes: int
    url: str
    licence: str
    sha256: str | None = None
    kind: Literal["file", "zip", "hub"] = "file"
    member: str = ""
    also: tuple[str, ...] = ()

    def present(self, cache: Path) -> bool:
        """Whether it is here, whole as far as its size tells."""
        if self.kind == "hub":
            return isinstance(try_to_load_from_cache(self.path, self.member), str)
        if self.kind == "zip":
            return (cache / self.path / self.member).is_file()
        return all((cache / place).is_file() and (cache / place).stat().st_size > 0 for place in self.places)

    @property
    def places(self) -> tuple[str, ...]:
        """Every place where a file has to be."""
        return (self.path, *self.also)

    def describe(self) -> str:
        """Path, size, source and licence, for people."""
        return f"{self.path} ({_size(self.bytes)}, {self.licence}) from {self.url}"


CLIP_L14 = Weights(
    "clip_model/ViT-L-14.pt", 932_768_134,
    f"{_OPENAI}/b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt", "MIT",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836",
)  # fmt: skip
CLIP_B32 = Weights(
    "clip_model/ViT-B-32.pt", 353_976_522,
    f"{_OPENAI}/40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af/ViT-B-32.pt", "MIT",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af",
)  # fmt: skip
AESTHETIC = Weights(
    "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth", 4_000,
    "https://github.com/LAION-AI/aesthetic-predictor/blob/main/sa_0_4_vit_l_14_linear.pth?raw=true", "MIT",
)  # fmt: skip
MUSIQ = Weights(
    "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth", 109_000_000,
    "https://github.com/chaofengc/IQA-PyTorch/releases/download/v0.1-weights/musiq_spaq_ckpt-358bb6af.pth",
    "comes with pyiqa, PolyForm-Noncommercial: not for commercial use", "358bb6af",
)  # fmt: skip
DINO = Weights(
    "dino_model/dino_vitbase16_pretrain.pth", 343_000_000,
    "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth", "Apache-2.0",
    also=("torch/hub/checkpoints/dino_vitbase16_pretrain.pth",),
)  # fmt: skip
DINO_CODE = Weights(
    "dino_model/facebookresearch_dino_main", 25_000_000,
    "https://github.com/facebookresearch/dino/archive/refs/heads/main.zip", "Apache-2.0", kind="zip",
    member="hubconf.py",
)  # fmt: skip
AMT = Weights(
    "amt_model/amt-s.pth", 12_000_000, f"{_HUB}/lalala125/AMT/resolve/main/amt-s.pth",
    "CC BY-NC-SA 4.0: not for commercial use",
)  # fmt: skip
RAFT = Weights(
    "raft_model/models", 81_000_000, "https://dl.dropboxusercontent.com/s/4j4z58wuv8o0mfz/models.zip",
    "BSD-3-Clause", kind="zip", member="raft-things.pth",
)  # fmt: skip
UMT = Weights(
    "umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth", 607_000_000,
    f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main/l16_ptk710_ftk710_ftk400_f16_res224.pth",
    "its page names none: ask OpenGVLab before other than private use",
    "bfee78a03bf806fbc0c216309e8f92792011b7db6556fa860e9d869c1e69fecd",
)  # fmt: skip
VICLIP = Weights(
    "ViCLIP/ViClip-InternVid-10M-FLT.pth", 1_710_000_000,
    f"{_HUB}/OpenGVLab/VBench_Used_Models/resolve/main/ViClip-InternVid-10M-FLT.pth", "MIT",
    "7a4d6ad6eac6632db3693f4b97f9f8f6445b65b1e139a6fc6686150522238c56",
)  # fmt: skip
VICLIP_WORDS = Weights(
    "ViCLIP/bpe_simple_vocab_16e6.txt.gz", 1_360_000,
    "https://raw.githubusercontent.com/openai/CLIP/main/clip/bpe_simple_vocab_16e6.txt.gz", "MIT",
)  # fmt: skip
GRIT = Weights(
    "grit_model/grit_b_densecap_objectdet.pth", 840_000_000,
    "https://datarelease.blob.core.windows.net/grit/models/grit_b_densecap_objectdet.pth",
    "MIT (that of GRiT's code; the file states none)",
)  # fmt: skip
TAG2TEXT = Weights(
    "caption_model/tag2text_swin_14m.pth", 4_480_000_000,
    f"{_HUB}/spaces/xinyu1205/recognize-anything/resolve/main/tag2text_swin_14m.pth", "Apache-2.0",
)  # fmt: skip
BERT = Weights("bert-base-uncased", 441_000_000, f"{_HUB}/bert-base-uncased", "Apache-2.0", kind="hub",
               member="config.json")  # fmt: skip

DIMENSIONS: dict[str, tuple[Weights, ...]] = {
    "subject_consistency": (DINO, DINO_CODE),
    "background_consistency": (CLIP_B32,),
    "temporal_flickering": (),
    "motion_smoothness": (AMT,),
    "dynamic_degree": (RAFT,),
    "aesthetic_quality": (CLIP_L14, AESTHETIC),
    "imaging_quality": (MUSIQ,),
    "object_class": (GRIT, BERT),
    "multiple_objects": (GRIT, BERT),
    "human_action": (UMT,),
    "color": (GRIT, BERT),
    "spatial_relationship": (GRIT, BERT),
    "scene": (TAG2TEXT, BERT),
    "appearance_style": (CLIP_B32,),
    "temporal_style": (VICLIP, VICLIP_WORDS),
    "overall_consistency": (VICLIP, VICLIP_WORDS),
}
"""VBench's sixteen dimensions and what each needs."""

DEFAULT_DIMENSIONS = ("aesthetic_quality", "imaging_quality")
"""Those of table 4 of arXiv 2412.02687."""


def cache_folder() -> Path:
    """``$VBENCH_CACHE_DIR``, or VBench's own default."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "vbench")


def check_dimensions(names: Sequence[str]) -> tuple[str, ...]:
    """The names without repetition.

    Raises:
        InputError: one is no dimension; the message lists them.
    """
    names = list(DIMENSIONS) if list(names) == ["all"] else list(names)
    unknown = [name for name in names if name not in DIMENSIONS]
    if unknown or not names:
        raise InputError(f"no VBench dimension {', '.join(unknown) or 'given'}; choose among {', '.join(DIMENSIONS)}")
    return tuple(dict.fromkeys(names))


def missing_weights(dimensions: Sequence[str], cache: Path) -> dict[str, list[Weights]]:
    """What is missing, by dimension; a dimension that has everything is left out."""
    missing = {name: [w for w in DIMENSIONS[name] if not w.present(cache)] for name in dimensions}
    return {name: weights for name, weights in missing.items() if weights}


def fingerprints(dimension: str, cache: Path) -> dict[str, str]:
    """SHA-256 of a dimension's files, so that a score says which weights gave it."""
    return {w.path: cached_sha256(cache / w.path) for w in DIMENSIONS[dimension] if w.kind == "file"}


def download(weights: Sequence[Weights], cache: Path, tell: Callable[[str], None]) -> None:
    """Bring files into the cache, each checked and then renamed into its place.

    Raises:
        InputError: a file cannot be had, or its content is not what its source states.
        OutputError: it cannot be written.
    """
    for one in dict.fromkeys(weights):
        if one.present(cache):
            continue
        tell(f"downloading {one.describe()}")
        try:
            _bring(one, cache)
        except InputError:
            raise
        except OSError as error:
            raise InputError(
                f"{one.path} could not be brought from {one.url} ({error}); bring it from another machine and put it "
                f"at {cache / one.path}"
            ) from error
        except Exception as error:  # the hub client raises many unrelated types
            raise InputError(f"{one.path} could not be brought from {one.url} ({type(error).__name__})") from error


def _bring(one: Weights, cache: Path) -> None:
    if one.kind == "hub":
        snapshot_download(one.path, allow_patterns=["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"])
    elif one.kind == "zip":
        with urllib.request.urlopen(one.url) as answer:
            _unpack(answer.read(), cache / one.path, one.member)
    else:
        _bring_file(one, cache)


def _bring_file(one: Weights, cache: Path) -> None:
    target = cache / one.path
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        digest = hashlib.sha256()
        with urllib.request.urlopen(one.url) as answer, part.open("wb") as file:
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
        # Some sources state the whole digest, some its first digits in the name.
        if one.sha256 and not digest.hexdigest().startswith(one.sha256):
            raise InputError(f"{one.url} gave another file than its name states; nothing was kept, try again")
        for place in one.also:
            (cache / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part, cache / place)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def _unpack(archive: bytes, folder: Path, member: str) -> None:
    """Unpack the top folder of an archive that holds ``member`` as ``folder``."""
    part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        with zipfile.ZipFile(io.BytesIO(archive)) as content:
            content.extractall(part)  # zipfile keeps members inside the folder
        tops = [top for top in part.iterdir() if (top / member).is_file()]
        if not tops:
            raise InputError(f"the archive for {folder.name} has no {member}; nothing was kept")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(tops[0], folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _size(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.0f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"
