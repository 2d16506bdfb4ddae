"""Prompt embeddings kept on disk, so that a text encoder of many gigabytes is loaded only for new prompts."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from platformdirs import user_cache_path
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nasa_video.errors import OutputError
from nasa_video.files.atomic import atomic_write
from nasa_video.text import TextContext, TextEncoder

FOLDER_VARIABLE = "NASA_VIDEO_CACHE"


def cache_folder() -> Path:
    """Where embeddings are kept: ``$NASA_VIDEO_CACHE``, or the user's cache folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or user_cache_path("nasa-video")) / "embeddings"


class CachedEncoder:
    """A text encoder that is loaded when a prompt is new, and let go after it.

    Only the real tokens are stored: padding is zero by definition.

    Args:
        load: makes the encoder.
        identity: what the embeddings depend on beside the prompt (the weights, their dtype).
        max_tokens: of the encoder.
        folder: where to keep the embeddings.
        keep_loaded: keep the encoder in memory after its first use (a live session, where prompts are typed).
    """

    def __init__(
        self,
        load: Callable[[], TextEncoder],
        identity: str,
        max_tokens: int,
        folder: Path | None = None,
        keep_loaded: bool = False,
    ) -> None:
        self.max_tokens = max_tokens
        self.keep_loaded = keep_loaded
        self._load = load
        self._identity = identity
        self._folder = folder or cache_folder()
        self._encoder: TextEncoder | None = None

    def __call__(self, prompts: Sequence[str]) -> TextContext:
        """Encode a batch; (B, max_tokens, E), on the CPU."""
        stored = {prompt: self._read(prompt) for prompt in dict.fromkeys(prompts)}
        new = [prompt for prompt, entry in stored.items() if entry is None]
        if new:
            self._encoder = self._encoder or self._load()
            for prompt in new:
                context = self._encoder([prompt])
                length = int(context.lengths[0])
                entry = (context.embeds[0, :length].cpu().contiguous(), context.cut[0] if context.cut else "")
                self._write(prompt, *entry)
                stored[prompt] = entry
            if not self.keep_loaded:
                self._encoder = None
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
        entries = [entry for entry in (stored[prompt] for prompt in prompts) if entry is not None]
        tokens = [tokens for tokens, _ in entries]
        embeds = tokens[0].new_zeros(len(prompts), self.max_tokens, tokens[0].shape[1])
        for row, real in zip(embeds, tokens, strict=True):
            row[: len(real)] = real
        return TextContext(embeds, torch.tensor([len(real) for real in tokens]), tuple(cut for _, cut in entries))

    def holds(self, prompts: Sequence[str]) -> bool:
        """Whether every prompt is on disk, so that the encoder will not be loaded."""
        return all(self._read(prompt) is not None for prompt in prompts)

    def _path(self, prompt: str) -> Path:
        digest = hashlib.sha256(f"{self._identity}\0{self.max_tokens}\0{prompt}".encode()).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def _read(self, prompt: str) -> tuple[Tensor, str] | None:
        path = self._path(prompt)
        try:
            state = load_file(path)
            return state["tokens"], bytes(state["cut"].tolist()).decode()
        except (OSError, SafetensorError, KeyError, UnicodeDecodeError):
            return None  # not there, or damaged: made again

    def _write(self, prompt: str, tokens: Tensor, cut: str) -> None:
        path = self._path(prompt)
        state = {"tokens": tokens, "cut": torch.tensor(list(cut.encode()), dtype=torch.uint8)}
        # A cache that cannot be written costs time, not the video.
        with contextlib.suppress(OutputError), atomic_write(path, parents=True) as part:
            save_file(state, part)


def identity_of(path: Path, dtype: torch.dtype) -> str:
    """Name of an encoder's weights: sizes and times of its files, which change when it is exchanged."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    parts = [f"{file.name}:{file.stat().st_size}:{file.stat().st_mtime_ns}" for file in files]
    return f"{dtype}|" + "|".join(parts)
