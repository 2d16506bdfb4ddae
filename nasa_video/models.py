"""Presets: which weights a model is made of, how its loop runs, and whether they are here."""

from __future__ import annotations

import importlib.resources
import json
import os
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from huggingface_hub import hf_hub_download, snapshot_download
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.stored import MODELS_FOLDER, WEIGHT_SUFFIXES, find_file, find_folder

DEFAULT_MODEL = "sprites"


class Strict(BaseModel):
    """Settings in which an unknown key is an error, and which do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
        size = f" ({self.bytes / 1e9:.2f} GB)" if self.bytes else ""
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
            return "train it with: python scripts/train_sprites.py"
        return "give a path that exists"


class WordLlamaText(Strict):
    """The offline text encoder of the shipped model."""

    kind: Literal["wordllama"]
    max_tokens: int = Field(gt=0)


class Umt5Text(Source):
    """UMT5, Wan's text encoder, in transformers' layout."""

    kind: Literal["umt5"]
    tokenizer_folder: str = "tokenizer"
    tokenizer_also: tuple[str, ...] = ()
    max_tokens: int = Field(default=512, gt=0)

    @property
    def tokenizer(self) -> tuple[Source, ...]:
        """The tokenizer's source, where it is in a repository; else it lies beside the encoder."""
        if self.repo is None:
            return ()
        return (Source(repo=self.repo, folder=self.tokenizer_folder, also=self.tokenizer_also),)


class LoraSource(Source):
    """A LoRA that is part of a published model."""

    scale: float = 1.0


class TinyDecoderSource(Source):
    """A tiny decoder, and the scale of the latents that it was trained on."""

    latents: Literal["normalized", "raw"] = "normalized"


class Components(Strict):
    """The parts of a video model; ``config`` is the transformer's, for checkpoints that carry none."""

    transformer: Source
    vae: Source
    text_encoder: Annotated[WordLlamaText | Umt5Text, Field(discriminator="kind")]
    config: dict[str, Any] | None = None
    loras: tuple[LoraSource, ...] = ()
    tiny_decoder: TinyDecoderSource | None = None

    @property
    def extras(self) -> tuple[Source, ...]:
        """What an option needs (``--decoder tiny``)."""
        return () if self.tiny_decoder is None else (self.tiny_decoder,)

    @property
    def sources(self) -> tuple[Source, ...]:
        """Everything that has to be on the machine."""
        encoder: tuple[Source, ...] = ()
        if isinstance(self.text_encoder, Umt5Text):
            encoder = (self.text_encoder, *self.text_encoder.tokenizer)
        return (self.transformer, *self.loras, self.vae, *encoder)


OnChange = Literal["keep", "recompute", "remake"]
"""As causvid_adapter.OnChange, which cannot be had without loading torch."""


class SamplerSettings(Strict):
    """The chunk loop; see causvid_adapter.ChunkSampler, FlowMatchSchedule and rollouts.

    ``rollout_frames`` are latent frames: a longer video is made in rollouts of that length, which overlap by a chunk.
    ``on_change``: what becomes of the window where prompt, negatives or guidance change, unless somebody says.
    """

    shift: float = Field(gt=0)
    warp: bool = False
    steps: dict[int, tuple[float, ...]] | Literal["any"]
    default_steps: int = Field(gt=0)
    frames_per_chunk: int = Field(gt=0)
    window_frames: int | None = None
    sink_frames: int = 0
    rollout_frames: int | None = Field(default=None, gt=0)
    rope: Literal["absolute", "window"] = "absolute"
    on_change: OnChange = "keep"

    @model_validator(mode="after")
    def _steps_fit(self) -> SamplerSettings:
        rollout, chunk = self.rollout_frames, self.frames_per_chunk
        if rollout is not None and (rollout <= chunk or rollout % chunk):
            raise ValueError(f"rollout_frames must be a multiple of {chunk} and more than one chunk, got {rollout}")
        if self.steps != "any":
            if self.default_steps not in self.steps:
                raise ValueError(f"default_steps {self.default_steps} is not among steps {sorted(self.steps)}")
            for count, timesteps in self.steps.items():
                if count != len(timesteps):
                    raise ValueError(f"steps: {count} lists {len(timesteps)} timesteps")
        return self

    def with_window(self, window_frames: int | None, sink_frames: int | None, rope: str | None) -> SamplerSettings:
        """The same loop with another window and sink in latent frames (a window of 0 is none) or other positions.

        Raises:
            InputError: no such positions, or the window cannot hold its sink and a chunk.
        """
        from causvid_adapter.errors import ShapeError
        from causvid_adapter.kv_cache import check_window

        window = self.window_frames if window_frames is None else window_frames or None
        given = self.sink_frames if sink_frames is None else sink_frames
        sink = 0 if window is None and sink_frames is None else given
        if rope not in (None, "absolute", "window"):
            raise InputError(f"--rope must be absolute or window, got {rope!r}")
        if window is None and sink:
            raise InputError(f"a sink of {sink} latent frames needs a window; give --window too")
        try:
            check_window(window, sink, self.frames_per_chunk)
        except ShapeError as error:
            raise InputError(str(error)) from error
        update = {"window_frames": window, "sink_frames": sink, "rope": rope or self.rope}
        return self.model_copy(update=update)

    def timesteps(self, num_steps: int) -> tuple[float, ...]:
        """The timesteps of a step count.

        Raises:
            InputError: the model was not made for it.
        """
        if self.steps == "any":
            if not 1 <= num_steps <= 200:
                raise InputError(f"steps must be from 1 to 200, got {num_steps}")
            shifted = [
                self.shift * u / (1 + (self.shift - 1) * u) for u in (1 - i / num_steps for i in range(num_steps))
            ]
            return tuple(1000 * sigma for sigma in shifted)
        if num_steps not in self.steps:
            allowed = ", ".join(str(count) for count in sorted(self.steps))
            raise InputError(f"this model runs in {allowed} steps, got {num_steps}")
        return self.steps[num_steps]


class VideoSettings(Strict):
    """Sizes of the pictures that the model was trained on; ``upscale`` is how much larger files are written."""

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    fps: int = Field(gt=0)
    frames: int = Field(gt=0)
    upscale: int = Field(default=1, ge=1, le=16)


class VideoPreset(Strict):
    """A complete video model."""

    name: str
    kind: Literal["video"]
    title: str
    licence: str
    components: Components
    sampler: SamplerSettings
    video: VideoSettings
    guidance: dict[Literal["nasa", "nag", "vsf", "cfg"], dict[str, float | bool]] = Field(default_factory=dict)
    vocabulary: Literal["sprites"] | None = None

    @property
    def needs(self) -> list[str]:
        """What must be here, for people."""
        return [source.description for source in self.components.sources]

    @property
    def present(self) -> bool:
        """Whether every part is on this machine."""
        return all(source.find() is not None for source in self.components.sources)


def package_root() -> Path:
    """Folder of the installed package."""
    return Path(str(importlib.resources.files("nasa_video")))


def configs_dir() -> Path:
    """Folder of the presets: inside the wheel, or beside the package in a checkout."""
    packaged = package_root() / "configs"
    return packaged if packaged.is_dir() else package_root().parent / "configs"


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} must hold a mapping of settings, got {type(data).__name__}")
    return data


def parse_preset(path: Path) -> VideoPreset:
    """Read and validate one preset file.

    Raises:
        InputError: an unknown key or a wrong value; the message names each.
    """
    data = read_yaml(path)
    try:
        return VideoPreset.model_validate(data)
    except ValidationError as error:
        rows = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise InputError(f"{path.name} is not a valid preset: {rows}") from error


@cache
def video_presets() -> dict[str, VideoPreset]:
    """All shipped video presets by name."""
    presets = [parse_preset(path) for path in sorted((configs_dir() / "video").glob("*.yaml"))]
    return {preset.name: preset for preset in presets}


def find_preset(model: str | os.PathLike[str]) -> VideoPreset:
    """The preset of a name, a preset file, a checkpoint of any causal Wan, a folder in diffusers' layout, or a hub id.

    Raises:
        InputError: it is none of them; the message lists what there is.
    """
    presets = video_presets()
    if str(model) in presets:
        return presets[str(model)]
    path = Path(model).expanduser()
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return parse_preset(path)
    if path.is_dir():
        return preset_of_folder(path)
    if path.suffix in WEIGHT_SUFFIXES and path.is_file():
        return preset_of_checkpoint(path)
    if str(model).count("/") == 1 and path.suffix not in WEIGHT_SUFFIXES and not str(model).startswith((".", "/", "~")):
        return preset_of_repository(str(model))
    raise InputError(
        f"unknown model {str(model)!r}; use a preset ({', '.join(presets)}), a checkpoint file, a folder, or a hub id "
        "owner/name"
    )


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
    root = os.environ.get(MODELS_FOLDER)
    if root and Path(root, repo).is_dir():
        return preset_of_folder(Path(root, repo))
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
