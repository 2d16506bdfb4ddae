"""Settings of a training run, read from one YAML file; an unknown key is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, model_validator

from nasa_video.errors import InputError
from nasa_video.models.presets import Source, Strict, configs_dir, read_yaml

Range = tuple[float, float]
PlacementName = Literal["nowhere", "teacher", "teacher+fake", "student+teacher", "all"]
PLACEMENTS: dict[PlacementName, tuple[str, ...]] = {
    "nowhere": (),
    "teacher": ("teacher",),
    "teacher+fake": ("teacher", "fake"),
    "student+teacher": ("student", "teacher"),
    "all": ("student", "teacher", "fake"),
}
"""Table 5 of arXiv 2412.02687: in which of the three networks the negative prompt takes part."""


class FileList(Strict):
    """One text a line; empty lines and lines that begin with # are left out. Without a path the command gives one."""

    kind: Literal["file"]
    path: Path | None = None


class GrammarList(Strict):
    """Negative prompts drawn from the grammar of :mod:`~nasa_video.train.lists`."""

    kind: Literal["grammar"]
    count: int = Field(default=10_000, gt=0)
    seed: int = 0


class SpritesList(Strict):
    """Captions, or negatives, of the shipped world."""

    kind: Literal["sprites"]
    count: int = Field(default=4000, gt=0)
    seed: int = 0


TextList = Annotated[FileList | GrammarList | SpritesList, Field(discriminator="kind")]


class Negatives(Strict):
    """Where the negative prompt goes, and how strongly.

    Attributes:
        placement: a row of table 5.
        texts: the list that negatives are drawn from.
        alpha: NASA scale of the student, uniform; one number a sample, for all of its chunks, steps and clean passes.
        alpha_zero_share: of samples whose alpha is 0, so that the unguided student stays what it is.
        kappa: the teacher's guidance, uniform; (1 - kappa) x(y-) + kappa x(y), 1 being none.
        empty_share: of samples without a negative: alpha is 0 and the teacher's guidance takes the empty prompt.
        avoid_overlap: draw negatives that share no word of meaning with their prompt.
        padding: whether the negative's padding takes part in the student's NASA (as published) or is masked out.
    """

    placement: PlacementName
    texts: TextList
    alpha: Range = (0.0, 1.0)
    alpha_zero_share: float = Field(default=0.0, ge=0, le=1)
    kappa: Range = (0.5, 4.0)
    empty_share: float = Field(default=0.0, ge=0, le=1)
    avoid_overlap: bool = True
    padding: bool = True

    @model_validator(mode="after")
    def _ranges(self) -> Negatives:
        for name, (low, high) in (("alpha", self.alpha), ("kappa", self.kappa)):
            if not 0 <= low <= high <= 100:
                raise ValueError(f"{name} must be a rising range within 0 to 100, got {low} to {high}")
        return self

    def reaches(self, network: Literal["student", "teacher", "fake"]) -> bool:
        """Whether the negative takes part in a network."""
        return network in PLACEMENTS[self.placement]


class Optimiser(Strict):
    """AdamW, or orthogonalised momentum for the matrices of the blocks and AdamW for the rest (small models).

    Attributes:
        rate: learning rate (of the matrices, for "matrix"); other_rate: of the rest.
        flat: share of the run at the full rate; then it falls in a straight line to ``last`` of it.
    """

    kind: Literal["adamw", "matrix"] = "adamw"
    rate: float = Field(gt=0)
    other_rate: float | None = Field(default=None, gt=0)
    betas: Range = (0.9, 0.999)
    weight_decay: float = Field(default=0.01, ge=0)
    clip: float = Field(default=1.0, gt=0)
    warmup: float = Field(default=0.0, ge=0, le=1)
    flat: float = Field(default=1.0, ge=0, le=1)
    last: float = Field(default=1.0, ge=0, le=1)


class Lora(Strict):
    """A low-rank adapter by PEFT; ``scaling`` is its lora_alpha."""

    rank: int = Field(gt=0)
    scaling: float = Field(gt=0)
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")


class Run(Strict):
    """How a run goes.

    Attributes:
        batch_size: samples of one process in one pass; accumulate: passes an update is summed over.
        average_decay: of the student's exponential moving average, which is what a run gives.
        precision: "bf16" computes matrix products in bfloat16 under autocast; weights that are trained stay float32.
        gradient_checkpointing: compute activations again in the backward pass instead of keeping them.
        shard: spread weights, gradients and optimiser states over the processes (FSDP).
        compile: compile the transformer's blocks, for fixed shapes.
        text_cache: encode every text of the lists before training, keep them on disk, and let the text encoder go.
    """

    seed: int = 0
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    accumulate: int = Field(default=1, gt=0)
    average_decay: float = Field(default=0.99, ge=0, lt=1)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    shard: bool = False
    compile: bool = False
    text_cache: bool = True
    checkpoint_every: int = Field(default=100, gt=0)
    sheet_every: int = Field(default=100, gt=0)
    sheet_samples: int = Field(default=6, ge=0)
    draw_every: int = Field(default=50, gt=0)


class CommonSettings(Strict):
    """What every training has."""

    title: str
    prompts: TextList
    negatives: Negatives
    student_optimiser: Optimiser
    fake_optimiser: Optimiser
    run: Run

    @model_validator(mode="after")
    def _check_common(self) -> Self:
        if self.run.shard and "matrix" in (self.student_optimiser.kind, self.fake_optimiser.kind):
            raise ValueError("shard needs optimisers of kind adamw: an orthogonalised update needs the whole matrix")
        if isinstance(self.prompts, GrammarList):
            raise ValueError("the grammar makes negatives, not prompts; give prompts of kind file")
        return self

    def over(self, prompts: Path | None, negatives: Path | None, run: dict[str, Any]) -> Settings:
        """The settings with files of texts and values of ``run`` instead, where they are given.

        Raises:
            InputError: they do not fit.
        """
        data = self.model_dump()
        if prompts is not None:
            data["prompts"] = {"kind": "file", "path": prompts}
        if negatives is not None:
            data["negatives"]["texts"] = {"kind": "file", "path": negatives}
        data["run"] |= run
        return parse_settings(data, "the command line's settings")


class VideoSettings(CommonSettings):
    """NASA-T of a causal video model, on its own rollouts.

    Attributes:
        student: a video preset, preset file or folder, which also names the text encoder, the VAE and the loop.
        teacher: weights of the bidirectional teacher, of the same architecture; the fake score starts from them.
        student_lora, fake_lora: train adapters of these instead of all weights. With a fake_lora the fake score is
            the teacher with its adapter on.
        step_counts: what a rollout's number of steps is drawn from.
        latent_frames: of a rollout, whole chunks.
        fake_updates: updates of the fake score for one of the student, all on the same rollout with fresh noise.
        fake_warmup: iterations at the start in which only the fake score is trained.
        score_shift: shifts the noise levels at which the scores are compared towards noise.
        fake_empty_share: of clips that the fake score sees without their prompt.
    """

    kind: Literal["video"]
    student: str
    teacher: Source
    student_lora: Lora | None = None
    fake_lora: Lora | None = None
    step_counts: tuple[int, ...]
    latent_frames: int = Field(gt=0)
    fake_updates: int = Field(default=5, gt=0)
    fake_warmup: int = Field(default=0, ge=0)
    score_shift: float = Field(default=5.0, gt=0)
    score_range: Range = (0.02, 0.98)
    fake_empty_share: float = Field(default=0.1, ge=0, le=1)


class ClipLoss(Strict):
    """max(0, margin - cosine(image, prompt)) of CLIP on decoded samples; the weight falls from first to last."""

    model: str = "openai/clip-vit-base-patch32"
    decoder: str = "madebyollin/taesd"
    margin: float = Field(default=0.37, ge=0, le=1)
    first_weight: float = Field(default=0.1, ge=0)
    last_weight: float = Field(default=0.0, ge=0)


class ImageSettings(CommonSettings):
    """NASA-T as published: image-free variational score distillation of a one-step generator.

    Attributes:
        family: the denoiser's kind; "pixart" is a transformer, "sd" a UNet.
        teacher: a pipeline in diffusers' layout, hub id or folder.
        student: denoiser to begin with (a pipeline, as the teacher); None begins with the teacher.
        max_tokens, text_dim: of the text; 77 and 768 for Stable Diffusion 1.5, 1024 for 2.1, 120 and 4096 for PixArt.
        prediction: what the teacher predicts; checked against its scheduler.
        student_timestep: at which the one-step student is asked.
        score_timesteps: at which the two teachers are compared; lora_timesteps: at which the LoRA teacher learns.
        lora_empty_share: of samples that the LoRA teacher sees without their prompt.
        clip: the clamped CLIP loss, or none.
    """

    kind: Literal["image"]
    family: Literal["sd", "pixart"]
    teacher: str
    student: str | None = None
    max_tokens: int = Field(gt=0)
    text_dim: int = Field(gt=0)
    prediction: Literal["epsilon", "v_prediction"] = "epsilon"
    size: int = Field(default=512, gt=0, multiple_of=8)
    lora: Lora
    student_timestep: int = Field(default=999, ge=0, lt=1000)
    score_timesteps: tuple[int, int] = (20, 980)
    lora_timesteps: tuple[int, int] = (0, 999)
    lora_empty_share: float = Field(default=0.1, ge=0, le=1)
    clip: ClipLoss | None = None

    @model_validator(mode="after")
    def _check_padding(self) -> Self:
        if self.family == "sd" and not self.negatives.padding:
            raise ValueError("Stable Diffusion's padding carries meaning; negatives.padding must be true for it")
        return self


Settings = VideoSettings | ImageSettings
_ADAPTER: TypeAdapter[Settings] = TypeAdapter(Annotated[Settings, Field(discriminator="kind")])


def parse_settings(data: dict[str, Any], where: str) -> Settings:
    """Validated settings of a mapping.

    Raises:
        InputError: an unknown key or a wrong value; the message names each.
    """
    try:
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        rows = "; ".join(f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']}" for e in error.errors())
        raise InputError(f"{where} is not a valid training config: {rows}") from error


def load_settings(path: Path) -> Settings:
    """Settings of a YAML file, or of a shipped one by its name, such as ``nasa-t-sd15``.

    Raises:
        InputError: no such file, an unknown key or a wrong value.
    """
    if not path.is_file():
        shipped = configs_dir() / "train" / f"{path.name}.yaml"
        if not shipped.is_file():
            raise InputError(f"{path} does not exist; give a YAML file, or one of {', '.join(shipped_names())}")
        path = shipped
    return parse_settings(read_yaml(path), path.name)


def shipped_names() -> list[str]:
    """Names of the shipped NASA-T configs."""
    return sorted(path.stem for path in (configs_dir() / "train").glob("nasa-t-*.yaml"))
