"""Which weight files each VBench dimension needs: name, size, source, licence, and whether it is here."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

import yaml
from huggingface_hub import snapshot_download, try_to_load_from_cache

from nasa_video.errors import InputError, NasaVideoError, format_bytes
from nasa_video.evaluation.assets import cached_sha256
from nasa_video.files.atomic import atomic_write, explained, process_name

CACHE_VARIABLE = "VBENCH_CACHE_DIR"
"""VBench's own variable: where it looks for weights."""


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
        return f"{self.path} ({format_bytes(self.bytes)}, {self.licence}) from {self.url}"


@cache
def dimensions() -> dict[str, tuple[Weights, ...]]:
    """VBench's sixteen dimensions and what each needs."""
    table = yaml.safe_load((files("nasa_video.evaluation.benchmarks.vbench") / "weights.yaml").read_text("utf-8"))
    known = {name: Weights(**{**entry, "also": tuple(entry.get("also", ()))}) for name, entry in table["files"].items()}
    return {name: tuple(known[one] for one in needed) for name, needed in table["dimensions"].items()}


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
    names = list(dimensions()) if list(names) == ["all"] else list(names)
    unknown = [name for name in names if name not in dimensions()]
    if unknown or not names:
        raise InputError(f"no VBench dimension {', '.join(unknown) or 'given'}; choose among {', '.join(dimensions())}")
    return tuple(dict.fromkeys(names))


def missing_weights(names: Sequence[str], cache: Path) -> dict[str, list[Weights]]:
    """What is missing, by dimension; a dimension that has everything is left out."""
    missing = {name: [w for w in dimensions()[name] if not w.present(cache)] for name in names}
    return {name: weights for name, weights in missing.items() if weights}


def fingerprints(dimension: str, cache: Path) -> dict[str, str]:
    """SHA-256 of a dimension's files, so that a score says which weights gave it."""
    return {w.path: cached_sha256(cache / w.path) for w in dimensions()[dimension] if w.kind == "file"}


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
        except NasaVideoError:
            raise
        except Exception as error:  # the hub client raises many unrelated types
            raise InputError(
                f"{one.path} could not be brought from {one.url} ({error}); bring it from another machine and put it "
                f"at {cache / one.path}"
            ) from error


def _bring(one: Weights, cache: Path) -> None:
    if one.kind == "hub":
        snapshot_download(one.path, allow_patterns=["*.json", "*.txt", "model.safetensors", "pytorch_model.bin"])
    elif one.kind == "zip":
        with urllib.request.urlopen(one.url) as answer:
            _unpack(answer.read(), cache / one.path, one.member)
    else:
        _bring_file(one, cache)


def _bring_file(one: Weights, cache: Path) -> None:
    digest = hashlib.sha256()
    with urllib.request.urlopen(one.url) as answer, atomic_write(cache / one.path, parents=True) as part:
        with part.open("wb") as file:
            while block := answer.read(1 << 20):
                digest.update(block)
                file.write(block)
        # Some sources state the whole digest, some its first digits in the name.
        if one.sha256 and not digest.hexdigest().startswith(one.sha256):
            raise InputError(f"{one.url} gave another file than its name states; nothing was kept, try again")
        for place in one.also:
            (cache / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(part, cache / place)


def _unpack(archive: bytes, folder: Path, member: str) -> None:
    """Unpack the top folder of an archive that holds ``member`` as ``folder``."""
    part = folder.with_name(f"{folder.name}.{process_name()}.part")
    try:
        with explained(folder), zipfile.ZipFile(io.BytesIO(archive)) as content:
            content.extractall(part)  # zipfile keeps members inside the folder
            tops = [top for top in part.iterdir() if (top / member).is_file()]
            if not tops:
                raise InputError(f"the archive for {folder.name} has no {member}; nothing was kept")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(tops[0], folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
