"""A preset made of what a user has: a checkpoint, a folder, a repository without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from nasa_video.errors import InputError
from nasa_video.models.presets import Components, Umt5Text, VideoPreset, VideoSettings, parse_preset, video_presets
from nasa_video.models.sources import Source
from nasa_video.models.stored import WEIGHT_SUFFIXES, find_repository

# Where the parts that a bare generator needs are published, by its latent channels: Wan 2.1 (and 2.2's 14B), Wan 2.2's
# 5B with its own VAE. All read prompts with the same encoder.
_VAE_REPOSITORIES = {16: "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 48: "Wan-AI/Wan2.2-TI2V-5B-Diffusers"}


def preset_of_checkpoint(path: Path) -> VideoPreset:
    """Any causal Wan 2.1 or 2.2 generator in one file; its sizes are read off its tensors.

    It runs Self-Forcing's loop, the most common one, at its size; a preset file of its own says otherwise (see
    configs/video, ``transformer: {path: FILE}``). VAE and text encoder are the published ones of its family.

    Raises:
        InputError: it takes more than noise and text (image-to-video), or is of a family without a published VAE.
        CheckpointError: it is broken, or no Wan generator.
    """
    from causvid_adapter.checkpoint import infer_config, read_shapes, to_diffusers, unwrap

    config = infer_config(to_diffusers(unwrap(read_shapes(path)), source=str(path)))
    channels = config["in_channels"]
    if channels != config["out_channels"]:
        raise InputError(
            f"{path} takes {channels} channels and makes {config['out_channels']}: it is an image-to-video generator, "
            "which wants a picture beside the noise; use a text-to-video one, which --image gives a first picture"
        )
    if channels not in _VAE_REPOSITORIES:
        known = " or ".join(str(number) for number in _VAE_REPOSITORIES)
        raise InputError(
            f"{path} works on {channels} latent channels, the published VAEs on {known}; name its VAE in a preset file"
        )
    base = video_presets()["self-forcing"]
    vae = Source(repo=_VAE_REPOSITORIES[channels], folder="vae")
    components = base.components.model_copy(
        update={
            "transformer": Source(path=path.absolute()),
            "vae": vae if channels != 16 else base.components.vae,
            "tiny_decoder": base.components.tiny_decoder if channels == 16 else None,
            "config": config,
        }
    )
    update: dict[str, Any] = {"name": path.stem, "title": str(path), "licence": "see where the file is from"}
    if channels == 48:
        update["video"] = VideoSettings(width=1280, height=704, fps=24, frames=81)
    return base.model_copy(update={**update, "components": components})


def preset_of_repository(repo: str) -> VideoPreset:
    """A hub repository with ``preset.yaml`` or in diffusers' layout; only its configs are downloaded here.

    Raises:
        InputError: it is not on this machine and cannot be had, or is neither.
    """
    if (folder := find_repository(repo)) is not None:
        return preset_of_folder(folder)
    try:
        configs = Path(snapshot_download(repo, allow_patterns=["preset.yaml", "*/config.json"]))
    except Exception as error:  # see Source.fetch
        raise InputError(
            f"{repo} is not on this machine and could not be downloaded from the hub ({type(error).__name__}). "
            f"Presets: {', '.join(video_presets())}"
        ) from error
    return preset_of_folder(configs, repo)


def preset_of_folder(folder: Path, repo: str | None = None) -> VideoPreset:
    """A folder with ``preset.yaml`` (its relative paths count from there), or in diffusers' pipeline layout.

    The latter runs Self-Forcing's loop, the most common one among causal Wan checkpoints. With ``repo`` the folder
    holds a repository's configs, and the weights are still in the repository.
    """
    own = folder / "preset.yaml"
    if own.is_file():
        return _with_root(parse_preset(own), folder, repo)
    parts = ("transformer", "vae", "text_encoder", "tokenizer")[: 4 if repo is None else 3]
    missing = [part for part in parts if not (folder / part).is_dir()]
    if missing:
        raise InputError(
            f"{repo or folder} has neither a preset.yaml nor diffusers' layout: {', '.join(missing)} missing; "
            "see configs/video for examples of a preset"
        )
    base = video_presets()["self-forcing"]
    components = Components(
        transformer=Source(path=Path("transformer")),
        vae=Source(path=Path("vae")),
        text_encoder=Umt5Text(kind="umt5", path=Path("text_encoder")),
        config=_diffusers_config(folder / "transformer" / "config.json"),
    )
    update = {"name": folder.name if repo is None else repo, "title": str(repo or folder)}
    update["licence"] = "see the folder" if repo is None else f"see the card of {repo}"
    return _with_root(base.model_copy(update={**update, "components": components}), folder, repo)


def _diffusers_config(path: Path) -> dict[str, Any] | None:
    """A model's config without diffusers' own notes; None where it cannot be read, which is said when it is loaded."""
    try:
        return {key: value for key, value in json.loads(path.read_text()).items() if not key.startswith("_")}
    except (OSError, ValueError, AttributeError):
        return None


def _with_root(preset: VideoPreset, folder: Path, repo: str | None) -> VideoPreset:
    """The preset with its relative paths inside the folder, or inside the repository."""

    def rooted(part: Any) -> Any:
        if not isinstance(part, Source) or part.path is None or part.path.is_absolute():
            return part
        if repo is None:
            return part.model_copy(update={"path": folder / part.path})
        kind = "file" if part.path.suffix in WEIGHT_SUFFIXES else "folder"
        return part.model_copy(update={"path": None, "repo": repo, kind: part.path.as_posix()})

    parts = preset.components
    update: dict[str, Any] = {
        name: rooted(getattr(parts, name)) for name in ("transformer", "vae", "text_encoder", "tiny_decoder")
    }
    components = parts.model_copy(update={**update, "loras": tuple(rooted(lora) for lora in parts.loras)})
    return preset.model_copy(update={"components": components})
