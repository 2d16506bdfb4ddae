"""Bringing a preset's files from the hub, a mirror or nowhere: resumed, checked, and never asked for again."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError

from nasa_video.errors import InputError
from nasa_video.models.presets import Source

_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class HubFile:
    """One file to bring.

    Attributes:
        size: bytes, as the hub states them.
        sha256: as the hub states it for large files, else None.
    """

    repo: str
    name: str
    size: int
    sha256: str | None


def missing(sources: Iterable[Source]) -> list[Source]:
    """Those that are not on this machine, each once."""
    return [source for source in dict.fromkeys(sources) if source.find() is None]


def list_files(sources: list[Source], endpoint: str | None = None) -> list[HubFile]:
    """Every file of the sources, with size and hash, from the hub (or a mirror at ``endpoint``).

    Raises:
        InputError: a source is not of the hub, or the hub cannot be reached or does not have it.
    """
    files = []
    for source in sources:
        if source.repo is None:
            raise InputError(f"{source.description} is missing and is not on the hub; bring it, or train it")
        try:
            names = [source.file] if source.file else _folder(source.repo, str(source.folder), endpoint)
            for name in names:
                url = hf_hub_url(source.repo, name, endpoint=endpoint)
                meta = get_hf_file_metadata(url, endpoint=endpoint)
                etag = meta.etag or ""
                sha256 = etag if _SHA256.fullmatch(etag) else None
                files.append(HubFile(source.repo, name, meta.size or 0, sha256))
        except Exception as error:  # the hub client raises many unrelated types
            raise InputError(_reason(source.description, error)) from error
    return files


def pull(
    files: list[HubFile],
    *,
    endpoint: str | None = None,
    folder: Path | None = None,
    tell: Callable[[HubFile], None] = lambda file: None,
) -> None:
    """Download the files; what a broken run left is resumed, what is there is not asked for again.

    Args:
        folder: where to put ``owner/name/file``; None takes the hub's cache.

    Raises:
        InputError: a download failed, or its content is not what the hub states; such a file is removed.
    """
    for file in files:
        local = None if folder is None else folder / file.repo
        try:
            path = Path(hf_hub_download(file.repo, file.name, endpoint=endpoint, local_dir=local))
        except Exception as error:  # as above
            raise InputError(_reason(f"{file.repo}/{file.name}", error)) from error
        verify(path, file)
        tell(file)


def verify(path: Path, file: HubFile) -> None:
    """Compare a downloaded file with what the hub states, and remove it when it differs.

    Raises:
        InputError: another size or hash.
    """
    problem = None
    if file.size and path.stat().st_size != file.size:
        problem = f"{path.stat().st_size} bytes instead of {file.size}"
    elif file.sha256 is not None:
        with path.open("rb") as content:
            if hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                problem = "another SHA-256 than the hub states"
    if problem is not None:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise InputError(f"{file.repo}/{file.name} arrived damaged ({problem}) and was removed; run the command again")


def _folder(repo: str, folder: str, endpoint: str | None) -> list[str]:
    files = HfApi(endpoint=endpoint).list_repo_files(repo)
    chosen = [name for name in files if name.startswith(f"{folder}/")]
    # Where weights are there as safetensors, the pickled copies would only cost time.
    if any(name.endswith(".safetensors") for name in chosen):
        chosen = [name for name in chosen if not name.endswith((".bin", ".bin.index.json"))]
    if not chosen:
        raise InputError(f"{repo} has no folder {folder}")
    return chosen


def _reason(what: str, error: Exception) -> str:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    if status in (401, 403):
        return (
            f"the hub refuses {what} (HTTP {status}): it is gated or private; accept its terms on its page, "
            "then run: hf auth login"
        )
    if status == 404:
        return f"the hub has no {what} (HTTP 404); its repository may have moved"
    return (
        f"{what} cannot be had from the hub ({type(error).__name__}); is there a network? A mirror: --mirror URL; "
        "a folder brought from another machine: NASA_VIDEO_MODELS=FOLDER"
    )
