"""Where weights come from: inside the package, a path, or a repository of the hub; and whether they are here."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from nasa_video.errors import InputError, format_bytes
from nasa_video.models.stored import MODELS_FOLDER, WEIGHT_SUFFIXES, find_file, find_folder


class Strict(BaseModel):
    """Settings in which an unknown key is an error, and which do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def validated(cls, data: Any, what: str) -> Self:
        """A record from a mapping; InputError where ``what`` has an unknown key or a wrong value, which names each."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            rows = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"{what}: {rows}") from error


class Source(Strict):
    """Where one component's weights come from: exactly one of ``package``, ``path`` or ``repo``.

    Attributes:
        package: folder inside the installed package.
        path: file or folder on this machine.
        repo, file, folder: hub repository, and the file or folder in it.
        also: the same weights in other repositories or layouts, as ``owner/name/path``: taken where they are on this
            machine, never downloaded.
        bytes: size of the download, as its source states it.
    """

    package: str | None = None
    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    folder: str | None = None
    also: tuple[str, ...] = ()
    bytes: int | None = None

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if sum(place is not None for place in (self.package, self.path, self.repo)) != 1:
            raise ValueError("give exactly one of package, path, repo")
        if self.repo is not None and (self.file is None) == (self.folder is None):
            raise ValueError("a repo needs either a file or a folder")
        return self

    @property
    def description(self) -> str:
        """The place, for people."""
        if self.package is not None:
            return f"{self.package}, shipped in the package"
        if self.path is not None:
            return str(self.path)
        size = f" ({format_bytes(self.bytes)})" if self.bytes else ""
        return f"{self.repo}/{self.file or self.folder}{size}"

    def find(self) -> Path | None:
        """The local path when it is here, without asking the network."""
        if self.package is not None:
            path = package_root() / self.package
            return path if path.exists() else None
        if self.path is not None:
            return self.path if self.path.exists() else None
        assert self.repo is not None
        found = find_file(self.repo, self.file) if self.file else find_folder(self.repo, str(self.folder))
        if found is not None:
            return found
        for place in self.also:
            owner, name, inside = place.split("/", 2)
            find = find_file if inside.endswith(WEIGHT_SUFFIXES) else find_folder
            found = find(f"{owner}/{name}", inside)
            if found is not None:
                return found
        return None

    def fetch(self) -> Path:
        """The local path, downloaded from the hub when it is not here.

        Raises:
            InputError: it is not here and cannot be had; the message says how to bring it.
        """
        path = self.find()
        if path is not None:
            return path
        if self.repo is None:
            raise InputError(f"{self.package or self.path} is missing; {self._remedy()}")
        # Late: the hub's client takes longer to import than a first line to show.
        from huggingface_hub import hf_hub_download, snapshot_download

        try:
            if self.file is not None:
                return Path(hf_hub_download(self.repo, self.file))
            return Path(snapshot_download(self.repo, allow_patterns=[f"{self.folder}/*"])) / str(self.folder)
        except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
            raise InputError(
                f"{self.description} is not on this machine and could not be downloaded ({type(error).__name__}). "
                f"Where there is a network, run: nasa-video models pull NAME --to FOLDER; bring the folder here, and "
                f"set {MODELS_FOLDER}=FOLDER"
            ) from error

    def _remedy(self) -> str:
        if self.package is not None:
            return "train it with: python research/train_sprites.py"
        return "give a path that exists"


def package_root() -> Path:
    """Folder of the installed package."""
    return Path(str(importlib.resources.files("nasa_video")))
