"""Resuming after a kill: the finished latents of a run, kept on disk until its file is finished.

A resumed run reads them, writes their keys in clean passes as the killed run did, decodes them again, and denoises only
what is missing: the frames are those of an uninterrupted run, for about a fifth of the time of the part that was made.
"""

# B batch, T latent frames, C channels, h w latent height and width

from __future__ import annotations

import math
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nasa_video.errors import InputError
from nasa_video.files.atomic import atomic_write
from nasa_video.video.request import VideoRequest


class ResumeLog:
    """The folder ``OUTPUT.resume`` beside an output: the recipe, and one file a chunk."""

    def __init__(self, output: str, recipe: VideoRequest) -> None:
        self.folder = Path(f"{output.rstrip('/')}.resume")
        # The version is not part of what makes the frames.
        self._recipe = recipe.model_copy(update={"version": None})

    def open(self) -> Tensor | None:
        """The finished latents (1, T, C, h, w) of an earlier run of the same recipe, or None; starts the log.

        They are in float32, as the sampler makes them, and stay on disk until they are used.

        Raises:
            InputError: the log is of another recipe, or the folder cannot be written.
        """
        path = self.folder / "recipe.json"
        if path.exists():
            if VideoRequest.model_validate_json(path.read_text(encoding="utf-8")) != self._recipe:
                raise InputError(
                    f"{self.folder} belongs to a run with other settings; give the same options as then, or remove it "
                    "to start again"
                )
            return self._read()
        try:
            self.folder.mkdir(exist_ok=True)
            path.write_text(self._recipe.model_dump_json(), encoding="utf-8")
        except OSError as error:
            reason = f"{self.folder} cannot be written ({error.strerror}); --resume keeps its state there"
            raise InputError(reason) from error
        return None

    def add(self, index: int, latents: Tensor) -> None:
        """Keep a finished chunk; a kill in the middle leaves no half file under its name."""
        with atomic_write(self._chunk(index)) as part:
            save_file({"latents": latents.contiguous().cpu()}, part)

    def close(self) -> None:
        """The output is finished: nothing is left to resume."""
        shutil.rmtree(self.folder)

    def _chunk(self, index: int) -> Path:
        return self.folder / f"{index:06}.safetensors"

    def _read(self) -> Tensor | None:
        names = sorted(self.folder.glob("[0-9]*.safetensors"))  # what a kill left half written begins with a dot
        if not names:
            return None
        first = int(names[0].stem)
        shape: list[int] = []
        # Into one file that is mapped, not read: the latents of hours need not be in memory.
        whole, frames = self.folder / "whole.bin", 0
        whole.unlink(missing_ok=True)  # and never written over: it may still be mapped
        with whole.open("wb") as file:
            for offset, path in enumerate(names):
                if int(path.stem) != first + offset:
                    break
                try:
                    latents = load_file(path)["latents"].float()
                except (SafetensorError, OSError, KeyError):
                    break  # what comes from here on is made again
                file.write(latents.contiguous().numpy().tobytes())
                shape, frames = list(latents.shape), frames + latents.shape[1]
        if not frames:
            return None
        shape[1] = frames
        mapped: Tensor = torch.from_file(str(whole), shared=False, size=math.prod(shape), dtype=torch.float32)
        return mapped.reshape(shape)
