"""Files that an evaluation needs and that are not ours: where they come from, and what to say when they are missing."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from nasa_video.errors import InputError
from nasa_video.models.stored import MODELS_FOLDER

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asset:
    """One file of the hub.

    Attributes:
        what: for people.
        gigabytes: size of the download; None where its source does not state it.
        dataset: whether the repository is one of data.
    """

    what: str
    repo: str
    file: str
    gigabytes: float | None
    licence: str
    dataset: bool = False

    @property
    def description(self) -> str:
        """What, where from, how large, under which licence."""
        size = "size unknown" if self.gigabytes is None else _size(self.gigabytes)
        kind = "dataset " if self.dataset else ""
        return f"{self.what}: {self.file} of the hub's {kind}{self.repo} ({size}; licence: {self.licence})"

    def find(self) -> Path | None:
        """Where it is on this machine, without asking the network."""
        root = os.environ.get(MODELS_FOLDER)
        local = Path(root, self.repo, self.file) if root else None
        if local is not None and local.is_file():
            return local
        kind = "dataset" if self.dataset else "model"
        found = try_to_load_from_cache(self.repo, self.file, repo_type=kind)
        return Path(found) if isinstance(found, str) else None

    def fetch(self, option: str) -> Path:
        """Its path, downloaded when it is not here.

        Args:
            option: with which a person names a file of their own.

        Raises:
            InputError: it is not here and cannot be had.
        """
        path = self.find()
        if path is not None:
            return path
        self.tell()
        try:
            return Path(hf_hub_download(self.repo, self.file, repo_type="dataset" if self.dataset else "model"))
        except Exception as error:  # the hub client raises many unrelated types; each means "not to be had"
            raise self.missing(option, error) from error

    def tell(self) -> None:
        """Say that it is about to be downloaded."""
        _log.warning("about to download, where the network allows it: %s", self.description)

    def missing(self, option: str, error: Exception) -> InputError:
        """The error for a file that cannot be had."""
        return InputError(
            f"{self.description} is not on this machine and could not be downloaded ({type(error).__name__}). Bring "
            f"it here and give it with {option}, or put it into the hub's cache (HF_HOME) or under "
            f"{MODELS_FOLDER}=FOLDER as {self.repo}/{self.file}"
        )


def _size(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB" if gigabytes >= 0.1 else f"{1000 * gigabytes:.1f} MB"
