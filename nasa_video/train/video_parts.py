"""The networks of video training: loaded, made trainable, and written as a model that every command takes."""

# C latent channels, h w latent height and width

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor

from causvid_adapter import CausalWan, load_generator
from causvid_adapter.lora import merge_lora
from causvid_adapter.vae_checkpoint import load_vae
from nasa_video.errors import InputError
from nasa_video.models.loading import load_text_encoder
from nasa_video.models.presets import LoraSource, Source, VideoPreset, find_preset
from nasa_video.text import TextEncoder
from nasa_video.text.embedding_cache import CachedEncoder
from nasa_video.train.attention import compile_blocks, matrix_attention
from nasa_video.train.fleet import Fleet, whole
from nasa_video.train.lora import add_lora, save_lora
from nasa_video.train.player import Player
from nasa_video.train.settings import VideoSettings
from nasa_video.train.steering import TrainingSteering, steer


@dataclass(frozen=True)
class VideoParts:
    """What a run starts from.

    Attributes:
        student, teacher: of one architecture; the teacher runs bidirectionally.
        latent_size: (C, h, w) of a latent frame.
        vae: for contact sheets; None draws none.
    """

    preset: VideoPreset
    student: CausalWan
    teacher: CausalWan
    encoder: TextEncoder
    latent_size: tuple[int, int, int]
    vae: AutoencoderKLWan | None = None


def load_video_parts(settings: VideoSettings, device: torch.device) -> VideoParts:
    """Read everything that a config names.

    Raises:
        InputError: a part is not here; CheckpointError: it is broken or of another model.
    """
    preset = find_preset(settings.student)
    parts = preset.components
    low = torch.bfloat16 if settings.run.precision == "bf16" and device.type == "cuda" else torch.float32
    student_dtype = low if settings.student_lora else torch.float32
    student = load_generator(parts.transformer.fetch(), parts.config, dtype=student_dtype)
    for lora in parts.loras:
        merge_lora(student, lora.fetch(), lora.scale)
    teacher = load_generator(settings.teacher.fetch(), parts.config, dtype=low)
    vae = load_vae(parts.vae.fetch())
    stride = int(vae.config.scale_factor_spatial)
    size = (int(student.transformer.config.in_channels), preset.video.height // stride, preset.video.width // stride)
    encoder = load_text_encoder(parts.text_encoder, device, low)
    if isinstance(encoder, CachedEncoder):
        encoder.keep_loaded = not settings.run.text_cache
    return VideoParts(preset, student, teacher, encoder, size, vae)


def encode_beforehand(encoder: TextEncoder, texts: Sequence[str], fleet: Fleet) -> None:
    """Put every text's embedding on disk, each process its share, so that training never loads the text encoder."""
    if not isinstance(encoder, CachedEncoder) or encoder.keep_loaded:
        return
    encoder.keep_loaded = True
    own = texts[fleet.rank :: fleet.size]
    for start in range(0, len(own), 64):
        encoder(own[start : start + 64])
    encoder.keep_loaded = False
    encoder._encoder = None
    fleet.wait()


@dataclass(frozen=True)
class Networks:
    """The three networks of the game; with an adapter as the fake score, ``fake`` is the teacher's own module.

    Attributes:
        shared: whether it is, so that the real score has to switch the adapter off.
    """

    student: CausalWan
    real: CausalWan
    fake: CausalWan
    steering: TrainingSteering
    shared: bool


def prepare_networks(settings: VideoSettings, parts: VideoParts, fleet: Fleet) -> Networks:
    """Make student and fake score trainable and put everything in its place.

    Raises:
        InputError: student and teacher are of different architectures, or take other texts.
    """
    _check_alike(parts.student, parts.teacher)
    run = settings.run
    real = _rewrap(parts.teacher.requires_grad_(False), fleet)
    if settings.fake_lora is not None:
        fake = real
        add_lora(fake.transformer, settings.fake_lora, run.seed + 1)
    else:
        fake = _rewrap(copy.deepcopy(real).float().requires_grad_(True), fleet)
    student = _rewrap(parts.student, fleet)
    if settings.student_lora is not None:
        add_lora(student.transformer, settings.student_lora, run.seed + 2)
    else:
        student.requires_grad_(True)
    tokens = parts.encoder.max_tokens
    steering = steer(student.transformer, tokens)
    for score in {id(real): real, id(fake): fake}.values():
        steer(score.transformer, tokens)
        _finish(score, fleet, run.gradient_checkpointing and score is fake)
        if run.compile:
            compile_blocks(score)
    _finish(student, fleet, run.gradient_checkpointing)
    return Networks(student, real, fake, steering, settings.fake_lora is not None)


def _rewrap(model: CausalWan, fleet: Fleet) -> CausalWan:
    """On the device, with an attention that trains fast there."""
    model.to(fleet.device)
    if fleet.device.type != "cpu":
        return model.eval()
    return CausalWan(model.transformer, attend=_matrix_self_attention).eval()


def _matrix_self_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return matrix_attention(q.to(v.dtype), k.to(v.dtype), v, mask)


def _finish(model: CausalWan, fleet: Fleet, checkpointing: bool) -> None:
    if checkpointing:
        model.transformer.enable_gradient_checkpointing()
    fleet.place(model, model.transformer.blocks)


def _check_alike(student: CausalWan, teacher: CausalWan) -> None:
    ours, theirs = dict(student.transformer.config), dict(teacher.transformer.config)
    names = ("in_channels", "out_channels", "text_dim", "patch_size")
    other = [f"{name} {ours[name]} against {theirs[name]}" for name in names if ours[name] != theirs[name]]
    if other:
        raise InputError(f"student and teacher do not fit together: {', '.join(other)}; choose a teacher of its family")


def export_model(folder: Path, settings: VideoSettings, parts: VideoParts, player: Player) -> None:
    """Write the average as ``preset.yaml`` with its weights, which ``--model FOLDER`` takes; every process calls this.

    All weights in diffusers' layout, or the adapter beside the base's own source.
    """
    leads = player.fleet.leads
    with player.averaged() as model:
        weights = dict(model.named_parameters()) if settings.student_lora is None else dict(player.trained)
        tensors = whole(weights, keep=leads)
    if not leads:
        return
    components = parts.preset.components
    folder.mkdir(parents=True, exist_ok=True)
    if settings.student_lora is None:
        inner = folder / "transformer"
        inner.mkdir(exist_ok=True)
        named = {name.removeprefix("transformer."): value.contiguous() for name, value in tensors.items()}
        parts.student.transformer.save_config(inner)
        save_file(named, inner / "diffusion_pytorch_model.safetensors")
        update: dict[str, object] = {"transformer": Source(path=Path("transformer")), "loras": ()}
    else:
        save_lora(folder / "lora.safetensors", tensors, settings.student_lora)
        update = {"loras": (*components.loras, LoraSource(path=Path("lora.safetensors")))}
    name = f"{parts.preset.name}-{settings.negatives.placement}"
    preset = parts.preset.model_copy(
        update={"name": name, "title": settings.title, "components": components.model_copy(update=update)}
    )
    text = yaml.safe_dump(preset.model_dump(mode="json", exclude_none=True), sort_keys=False)
    (folder / "preset.yaml").write_text(text, encoding="utf-8")
