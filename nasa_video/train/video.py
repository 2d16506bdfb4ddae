"""NASA-T for causal video: the student rolls out its own chunks under NASA, and two bidirectional scores teach it.

Self-forcing distribution matching (arXiv 2506.08009, 2311.18828) with the negative prompt in the teacher's guidance
and NASA in the student (arXiv 2412.02687, section 5.3, which has it for one-step image models).
"""

# B batch, T latent frames, C channels, h w latent height and width

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import AutoencoderKLWan
from safetensors.torch import save_file
from torch import Tensor, nn

from causvid_adapter import CausalWan, StreamingDecoder, denormalize, load_generator
from causvid_adapter.lora import merge_lora
from causvid_adapter.vae_checkpoint import load_vae
from nasa_video.errors import InputError
from nasa_video.models.loading import load_text_encoder
from nasa_video.models.presets import LoraSource, Source, VideoPreset, find_preset
from nasa_video.text import TextContext, TextEncoder
from nasa_video.text.embedding_cache import CachedEncoder
from nasa_video.train.attention import add_guidance, compile_blocks, matrix_self_attention
from nasa_video.train.batch import seeded
from nasa_video.train.distillation import Distillation, matching_direction, per_sample, shifted, stratified
from nasa_video.train.distributed import DistributedContext, whole
from nasa_video.train.rollout import RolloutPlan, roll_out
from nasa_video.train.settings import VideoSettings
from nasa_video.train.state import TrainState, add_lora, save_lora, without_lora


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


class VideoTrainer(Distillation):
    """Student, teacher and fake score of a causal video model.

    Raises:
        InputError: the settings do not fit the student's loop, or student and teacher do not fit together.
    """

    settings: VideoSettings
    student: CausalWan
    real: CausalWan
    fake: CausalWan

    def __init__(
        self,
        settings: VideoSettings,
        parts: VideoParts,
        prompts: Sequence[str],
        negatives: Sequence[str],
        context: DistributedContext,
    ) -> None:
        super().__init__(parts.encoder, prompts, negatives, context)
        self.settings, self.parts, self.sampler = settings, parts, parts.preset.sampler
        if settings.latent_frames % self.sampler.frames_per_chunk:
            raise InputError(
                f"latent_frames must be a multiple of {self.sampler.frames_per_chunk}, a chunk of {settings.student}, "
                f"got {settings.latent_frames}"
            )
        for count in settings.step_counts:
            self.sampler.timesteps(count)  # a wrong one is refused here, not in the middle of a run
        _check_alike(parts.student, parts.teacher)
        self.sample_shape = (settings.latent_frames, *parts.latent_size)
        self.fake_updates, self.fake_warmup = settings.fake_updates, settings.fake_warmup
        self.fake_empty_share = settings.fake_empty_share
        self._prepare_networks()
        self.states = {
            "student": TrainState(self.student, settings.student_optimiser, context, settings.run.average_decay),
            "fake": TrainState(self.fake, settings.fake_optimiser, context),
        }

    def _prepare_networks(self) -> None:
        """Make student and fake score trainable and put everything in its place."""
        settings, run, tokens = self.settings, self.settings.run, self.encoder.max_tokens
        self.real = self._on_device(self.parts.teacher.requires_grad_(False))
        if settings.fake_lora is not None:
            self.fake = self.real
            add_lora(self.fake.transformer, settings.fake_lora, run.seed + 1)
        else:
            self.fake = self._on_device(copy.deepcopy(self.real).float().requires_grad_(True))
        self.student = self._on_device(self.parts.student)
        if settings.student_lora is not None:
            add_lora(self.student.transformer, settings.student_lora, run.seed + 2)
        else:
            self.student.requires_grad_(True)
        self.guidance = add_guidance(self.student.transformer, tokens)
        for score in {id(self.real): self.real, id(self.fake): self.fake}.values():
            add_guidance(score.transformer, tokens)
            self._place(score, run.gradient_checkpointing and score is self.fake)
            if run.compile:
                compile_blocks(score)
        self._place(self.student, run.gradient_checkpointing)

    def _on_device(self, model: CausalWan) -> CausalWan:
        """On the device, with an attention that trains fast there."""
        model.to(self.context.device)
        if self.context.device.type != "cpu":
            return model.eval()
        return CausalWan(model.transformer, attend=matrix_self_attention).eval()

    def _place(self, model: CausalWan, checkpointing: bool) -> None:
        if checkpointing:
            model.transformer.enable_gradient_checkpointing()
        self.context.place(model, model.transformer.blocks)

    def plan(self, step: int) -> RolloutPlan:
        """A number of steps, and the one that a rollout stops at; the same in every process, so that nobody waits."""
        generator = seeded(self.settings.run.seed, "plan", step)
        counts = self.settings.step_counts
        count = counts[int(torch.randint(len(counts), (1,), generator=generator))]
        return self.plan_of(count, int(torch.randint(count, (1,), generator=generator)))

    def plan_of(self, count: int, exit_step: int) -> RolloutPlan:
        """A rollout in so many steps that stops after one of them."""
        sampler = self.sampler
        return RolloutPlan(sampler.schedule(count), exit_step, sampler.frames_per_chunk, sampler.window)

    def generate(
        self, noise: Tensor, text: TextContext, plan: RolloutPlan | None, generator: torch.Generator
    ) -> Tensor:
        """Clips (B, T, C, h, w) by a rollout; without a plan, in the most steps that are trained."""
        count = max(self.settings.step_counts)
        plan = plan or self.plan_of(count, count - 1)
        return roll_out(self.student, text.embeds, noise, plan, generator, self.context.autocast)

    def draw_levels(self, batch: int, generator: torch.Generator, for_fake: bool) -> Tensor:
        """Noise levels sigma (B,), one in each part of the range."""
        low, high = self.settings.score_range
        sigma_B = shifted(stratified(batch, generator), self.settings.score_shift).clamp(low, high)
        return sigma_B.to(self.context.device)

    def add_noise(self, x: Tensor, noise: Tensor, level_B: Tensor) -> Tensor:
        """A rectified flow's ``(1 - sigma) x + sigma noise``."""
        sigma = per_sample(level_B, x)
        return (1 - sigma) * x + sigma * noise

    def predict(self, model: nn.Module, noisy: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """A score's clean clip, bidirectional, one noise level a clip."""
        return noisy - per_sample(level_B, noisy) * self._flow(model, noisy, level_B, text)

    def _flow(self, model: nn.Module, noisy: Tensor, sigma_B: Tensor, text: TextContext) -> Tensor:
        with self.context.autocast():
            flow: Tensor = model(noisy, sigma_B * 1000, text.embeds)
        return flow.float()

    def real_score(self) -> AbstractContextManager[None]:
        """The teacher; where the fake score is its adapter, without that."""
        return nullcontext() if self.settings.fake_lora is None else without_lora(self.real)

    def compare(self, x: Tensor, real: Tensor, fake: Tensor, level_B: Tensor) -> Tensor:
        """Distribution matching's direction."""
        return matching_direction(x, real, fake)

    def fake_error(self, x: Tensor, noise: Tensor, level_B: Tensor, text: TextContext) -> Tensor:
        """Flow matching on the student's clips."""
        flow = self._flow(self.fake, self.add_noise(x, noise, level_B), level_B, text)
        return (flow - (noise - x)).square().mean()

    def measure(self, x: Tensor) -> dict[str, float]:
        """Motion, and how much chunks jump."""
        return _continuity(x, self.sampler.frames_per_chunk)

    def decode(self, samples: Tensor) -> Tensor | None:
        """Frames of latents (B, S, T, C, h, w)."""
        if self.parts.vae is None:
            return None
        vae = self.parts.vae.to(self.context.device)
        latents = samples.flatten(0, 1)
        return torch.cat([StreamingDecoder(vae).decode(denormalize(vae, x)).float().cpu() for x in latents.split(4)])

    def export(self, folder: Path) -> None:
        """Write the averaged student as a model folder."""
        export_model(folder, self.settings, self.parts, self.states["student"])


def _continuity(clip: Tensor, size: int) -> dict[str, float]:
    """Motion, the mean change between latent frames; and the change over chunks' borders in units of that inside."""
    change = (clip[:, 1:] - clip[:, :-1]).abs().mean((0, 2, 3, 4))
    border = torch.arange(1, clip.shape[1], device=clip.device) % size == 0
    inside = change[~border].mean() if bool((~border).any()) else change.new_ones(())
    jump = change[border].mean() / (inside + 1e-6) if bool(border.any()) else change.new_zeros(())
    return {"motion": float(change.mean()) if len(change) else 0.0, "chunk jump": float(jump)}


def _check_alike(student: CausalWan, teacher: CausalWan) -> None:
    ours, theirs = dict(student.transformer.config), dict(teacher.transformer.config)
    names = ("in_channels", "out_channels", "text_dim", "patch_size")
    other = [f"{name} {ours[name]} against {theirs[name]}" for name in names if ours[name] != theirs[name]]
    if other:
        raise InputError(f"student and teacher do not fit together: {', '.join(other)}; choose a teacher of its family")


def export_model(folder: Path, settings: VideoSettings, parts: VideoParts, state: TrainState) -> None:
    """Write the average as ``preset.yaml`` with its weights, which ``--model FOLDER`` takes; every process calls this.

    All weights in diffusers' layout, or the adapter beside the base's own source.
    """
    leads = state.context.leads
    with state.averaged() as model:
        weights = dict(model.named_parameters()) if settings.student_lora is None else dict(state.trained)
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
