"""Every image preset: parses, builds from tiny weights in the true format, draws, and says what is missing."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub.constants
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from nasa_video import ClassifierFree, Nasa, Negative
from nasa_video.cli.image import image as image_command
from nasa_video.errors import InputError
from nasa_video.images.pipeline import ImagePipeline
from nasa_video.images.presets import (
    SchedulerSettings,
    configs_dir,
    find_image_preset,
    image_presets,
    parse_image_preset,
)
from nasa_video.images.schedulers import StraightFlowScheduler, make_scheduler

NAMES = sorted(path.stem for path in (configs_dir() / "image").glob("*.yaml"))
NEGATIVES = [Negative("blurry")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny pipelines of each family on disk, in diffusers' layout."""
    root = tmp_path_factory.mktemp("bases")
    for kind in ("pixart", "sd", "sdxl", "flux"):
        base_pipe(kind).save_pretrained(root / kind)
    rename_class(root / "pixart" / "model_index.json")
    rename_class(root / "pixart" / "transformer" / "config.json")
    return {kind: root / kind for kind in ("pixart", "sd", "sdxl", "flux")}


def base_pipe(kind: str) -> Any:
    """A tiny base, with the scheduler that PixArt's is published with."""
    pipe = tiny.PIPES[kind]()
    if kind == "pixart":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    return pipe


def write_weights(preset: Any, folder: Path) -> Path | None:
    """Weights of another seed in the preset's own format."""
    if preset.weights is None:
        return None
    torch.manual_seed(99)
    extra = {"time_cond_proj_dim": 16} if preset.name == "lcm-sdxl" else {}
    make = {"pixart": tiny.pixart_transformer, "sd": tiny.unet, "sdxl": tiny.sdxl_unet}[preset.family]
    model = make(**extra)
    if preset.weights.kind == "folder":
        model.save_pretrained(folder / "weights", safe_serialization=preset.name != "dmd-pixart-512")
        if preset.family == "pixart":
            rename_class(folder / "weights" / "config.json")
        return folder / "weights"
    if preset.weights.kind == "state_dict":
        path = folder / "pytorch_model.bin"
        torch.save(model.state_dict(), path)
        return path
    return write_lora(folder)


def rename_class(config: Path) -> None:
    """The published PixArt checkpoints name the class by which diffusers knew them when they were made."""
    config.write_text(config.read_text().replace("PixArtTransformer2DModel", "Transformer2DModel"))


def write_lora(folder: Path) -> Path:
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet = tiny.sdxl_unet()
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(unet))
    return folder / "pytorch_lora_weights.safetensors"


def load(name: str, bases: dict[str, Path], folder: Path) -> ImagePipeline:
    preset = find_image_preset(name)
    return ImagePipeline.from_preset(
        preset, base=bases[preset.family], weights=write_weights(preset, folder), device="cpu"
    )


def publish(preset: Any, root: Path) -> None:
    """Tiny weights where the preset says that its files are: owner/name, subfolder, file, variant."""
    base = root / preset.base.repo
    base_pipe(preset.family).save_pretrained(base, variant=preset.base.variant)
    if preset.family == "pixart":
        rename_class(base / "model_index.json")
        rename_class(base / "transformer" / "config.json")
    own = preset.weights
    if own is None:
        return
    place = root / own.repo / (own.file or own.subfolder or "")
    place.parent.mkdir(parents=True, exist_ok=True)
    made = write_weights(preset, root)
    assert made is not None
    if own.kind == "folder":
        shutil.copytree(made, place, dirs_exist_ok=True)
        if own.variant is not None:
            name = "diffusion_pytorch_model"
            (place / f"{name}.safetensors").rename(place / f"{name}.{own.variant}.safetensors")
    else:
        shutil.copy(made, place)


def pixels(picture: Image.Image) -> bytes:
    return picture.tobytes()


def test_the_papers_models_are_there() -> None:
    assert len(NAMES) >= 14
    assert set(NAMES) == set(image_presets())
    for name, preset in image_presets().items():
        assert preset.name == name
        assert preset.guidance.keys() == {"nasa", "nag", "vsf", "cfg"}
        for method in preset.guidance:
            assert preset.make_guidance(method).active
        assert preset.sweep()[0] == 0
        assert preset.sweep()[2] == preset.make_guidance().scale
        for method in ("nasa-centred", "cfg"):
            assert not preset.make_guidance(method, preset.sweep(method)[0]).active


@pytest.mark.parametrize("name", NAMES)
def test_builds_and_draws(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    pipeline = load(name, bases, tmp_path)
    preset, pipe = pipeline.preset, pipeline.pipe
    size = {"width": 16, "height": 16}
    calls: list[tuple[float, int]] = []
    handle = tiny.denoiser(pipe).register_forward_hook(
        lambda m, a, k, out: calls.append((float(_time(m, a, k)), len(out[0]))), with_kwargs=True
    )
    plain = pipeline.draw("a fox", NEGATIVES, None, count=2, **size)
    handle.remove()
    assert len(calls) == preset.sampling.steps
    assert all(batch == 2 for _, batch in calls)  # no classifier-free guidance behind our back
    if preset.sampling.timesteps is not None:
        assert [time for time, _ in calls] == list(preset.sampling.timesteps)
    guided = pipeline.draw("a fox", NEGATIVES, preset.make_guidance(), count=2, **size)
    assert guided.effect is not None
    assert pixels(guided.images[1]) != pixels(plain.images[1])
    alone = pipeline.draw("a fox", NEGATIVES, preset.make_guidance(), seed=1, **size)
    assert max(abs(a - b) for a, b in zip(pixels(alone.images[0]), pixels(guided.images[1]), strict=True)) <= 1
    off = pipeline.draw("a fox", NEGATIVES, Nasa(0.0), count=2, **size)
    assert [pixels(one) for one in off.images] == [pixels(one) for one in plain.images]
    assert off.effect is None
    wrong = 3 if preset.sampling.timesteps else None
    if wrong:
        with pytest.raises(InputError, match="runs in"):
            pipeline.draw("a fox", steps=wrong, **size)


PUBLIC = [name for name, preset in image_presets().items() if preset.weights is None or preset.weights.repo]


@pytest.mark.parametrize("name", PUBLIC)
def test_builds_from_the_published_files(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they lie on the hub, in a folder of owner/name: nothing else is asked for."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(tmp_path))
    preset = find_image_preset(name)
    assert not preset.present
    publish(preset, tmp_path)
    assert preset.present
    pipe = ImagePipeline.from_preset(preset, device="cpu").pipe
    if preset.weights is None:
        return
    plain = tiny.PIPES[preset.family]()
    weights = (next(p for n, p in tiny.denoiser(one).named_parameters() if "attn2.to_k" in n) for one in (pipe, plain))
    assert not torch.equal(*weights)  # the preset's own, not the base's


def test_a_folder_that_counts_as_here_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under the repository's name alone, without its owner's."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(tmp_path))
    preset = find_image_preset("flux-schnell")
    publish(preset, tmp_path)
    shutil.move(tmp_path / preset.base.repo, tmp_path / preset.base.repo.split("/")[1])
    assert preset.present
    assert ImagePipeline.from_preset(preset, device="cpu").preset is preset


def _time(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    time = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return time.flatten()[0]


@pytest.mark.parametrize("name", NAMES)
def test_missing_weights_are_explained(name: str, monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path]) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    preset = find_image_preset(name)
    with pytest.raises(InputError) as caught:
        ImagePipeline.from_preset(preset, device="cpu")
    message = str(caught.value)
    assert name in message
    if preset.weights is not None and preset.weights.missing:
        assert "--weights" in message
        assert preset.weights.missing in message
        assert "--weights" in preset.weights.description
        with pytest.raises(InputError, match="does not exist"):
            ImagePipeline.from_preset(preset, base=bases[preset.family], weights=Path("/nowhere"), device="cpu")
    else:
        assert any(repo in message for repo in (preset.base.repo, getattr(preset.weights, "repo", None)) if repo)
        assert "--base" in message
    with pytest.raises(InputError, match=r"model_index\.json"):
        ImagePipeline.from_preset(preset, base=bases["sd"] / "unet", weights=bases["sd"], device="cpu")


def test_presets_of_sd21_know_that_it_left_the_hub(
    monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path], tmp_path: Path
) -> None:
    from nasa_video.cli.models import models

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(tmp_path))
    assert not any(preset.base.repo.startswith("stabilityai/stable-diffusion-2") for preset in image_presets().values())
    preset = find_image_preset("sbv2-sd21")
    weights = write_weights(preset, tmp_path)
    for given in (None, weights):  # without the weights, and with them but without the base
        with pytest.raises(InputError, match=r"took Stable Diffusion 2\.1 from the hub.* --base FOLDER"):
            ImagePipeline.from_preset(preset, weights=given, device="cpu")
    assert ImagePipeline.from_preset(preset, base=bases["sd"], weights=weights, device="cpu").preset is preset
    assert "a community's copy" in CliRunner().invoke(models, ["check", "sbv2-sd21"]).output
    with pytest.raises(InputError, match=r"thuanz123/swiftbrush .*all parts of the pipeline included"):
        ImagePipeline.from_preset(find_image_preset("swiftbrush-v1"), device="cpu")


def test_models_check_names_what_an_image_model_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from nasa_video.cli.models import models

    monkeypatch.setenv("NASA_VIDEO_MODELS", str(tmp_path))
    result = CliRunner().invoke(models, ["check", "dmd2-sd15", "--json"])
    assert result.exit_code == 1
    missing = json.loads(result.stdout.strip().splitlines()[-1])["missing"]
    assert missing[0] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert missing[1].startswith("tianweiy/DMD2/model/sdv1.5/")
    (tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5").mkdir(parents=True)
    (tmp_path / "stable-diffusion-v1-5/stable-diffusion-v1-5/model_index.json").write_text("{}")
    result = CliRunner().invoke(models, ["check", "dmd2-sd15"])
    assert result.exit_code == 1
    assert result.output.count("missing:") == 1
    for args in (["pull", "flux-schnell"], ["check", "flux-schnell", "--width", "64"]):
        assert "image model" in str(CliRunner().invoke(models, args).exception)


def test_wrong_weights_are_explained(bases: dict[str, Path], tmp_path: Path) -> None:
    preset = find_image_preset("dmd2-sdxl-1step")
    path = tmp_path / "unet.bin"

    def build() -> None:
        ImagePipeline.from_preset(preset, base=bases["sdxl"], weights=path, device="cpu")

    path.write_bytes(b"not a pickle")
    with pytest.raises(InputError, match="no checkpoint"):
        build()
    torch.save({"a": Path("code")}, path)  # an object that only an unsafe load would make
    with pytest.raises(InputError, match="could run code"):
        build()
    torch.save(tiny.unet().state_dict(), path)
    with pytest.raises(InputError, match=r"missing|other sizes"):
        build()
    lora = find_image_preset("dmd2-sdxl-4step-lora")
    with pytest.raises(InputError, match=r"LoRA|no tensor"):
        ImagePipeline.from_preset(lora, base=bases["sdxl"], weights=path, device="cpu")


def test_unknown_keys_are_refused(tmp_path: Path) -> None:
    source = (configs_dir() / "image" / "dmd2-sdxl-4step.yaml").read_text()
    for change, word in (
        (source + "colour: red\n", "colour"),
        (source.replace("steps: 4", "steps: 3"), "4 timesteps"),
        (source.replace("repo: tianweiy/DMD2, ", ""), "missing"),
        (source.replace("family: sdxl", "family: sd9"), "family"),
    ):
        path = tmp_path / "own.yaml"
        path.write_text(change)
        with pytest.raises(InputError, match=word):
            parse_image_preset(path)
    path.write_text(source.replace("name: dmd2-sdxl-4step", "name: own"))
    assert find_image_preset(str(path)).name == "own"
    with pytest.raises(InputError, match="flux-schnell"):
        find_image_preset("midjourney")
    with pytest.raises(InputError, match="nasa, nasa-centred, nag, vsf"):
        find_image_preset("flux-schnell").make_guidance("magic")


def test_instaflow_adds_the_predicted_flow(bases: dict[str, Path], tmp_path: Path) -> None:
    pipe = load("instaflow-sd15", bases, tmp_path).pipe
    assert isinstance(pipe.scheduler, StraightFlowScheduler)
    seen: list[Any] = []
    pipe.unet.register_forward_hook(lambda m, a, out: seen.append((a, out[0])))
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = pipe("a fox", latents=noise, output_type="latent", num_inference_steps=1, guidance_scale=0,
                   width=16, height=16).images  # fmt: skip
    ((x, t), flow) = seen[0][0][:2], seen[0][1]
    assert float(t) == 1000
    assert torch.equal(x, noise)
    torch.testing.assert_close(latents, noise + flow)
    scheduler = StraightFlowScheduler()
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == [1000, 750, 500, 250]
    assert float(scheduler.step(torch.ones(1), 1000, torch.zeros(1))[0]) == 0.25


BASES = ("PNDMScheduler", "EulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "LCMScheduler")
MADE = [preset for preset in image_presets().values() if preset.scheduler is not None and preset.scheduler.from_base]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", [preset.name for preset in MADE])
def test_no_scheduler_changes_what_a_perfect_model_predicts(name: str, base: str) -> None:
    """Latents are not of [-1, 1]: a scheduler that is not told so clamps them, or takes another default of its own."""
    preset = find_image_preset(name)
    assert preset.scheduler is not None
    prediction = preset.scheduler.changes.get("prediction_type", "epsilon")
    config = {"beta_schedule": "scaled_linear", "prediction_type": prediction}
    config |= {"clip_sample": False} if base == "DDIMScheduler" else {}  # as the published ones state it
    scheduler = make_scheduler(preset.scheduler, getattr(diffusers, base)(**config))
    assert type(scheduler).__name__ == preset.scheduler.name
    time = preset.sampling.timesteps[-1] if preset.sampling.timesteps else 999
    scheduler.set_timesteps(1) if preset.sampling.timesteps is None else scheduler.set_timesteps(timesteps=[time])
    x0, eps = 4 * torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    alpha, sigma = (v**0.5 for v in (scheduler.alphas_cumprod[time], 1 - scheduler.alphas_cumprod[time]))
    z = alpha * x0 + sigma * eps
    perfect = alpha * eps - sigma * x0 if prediction == "v_prediction" else eps
    done = scheduler.step(perfect, scheduler.timesteps[0], z)
    torch.testing.assert_close(done.pred_original_sample if hasattr(done, "pred_original_sample") else done.denoised,
                               x0, rtol=1e-3, atol=2e-3)  # fmt: skip


def test_a_scheduler_that_is_not_told_everything_is_refused() -> None:
    settings = SchedulerSettings(name="DDPMScheduler")
    with pytest.raises(InputError, match=r"beta_schedule.*scheduler: changes"):
        make_scheduler(settings, diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.mark.parametrize("name", ["sbv2-sd15", "sbv2-pixart", "dmd-pixart-512"])
def test_one_step_ends_at_the_predicted_data(name: str, bases: dict[str, Path], tmp_path: Path) -> None:
    """SwiftBrush and DMD2: x0 = (z - sigma eps) / alpha at their timestep."""
    pipeline = load(name, bases, tmp_path)
    pipe = pipeline.pipe
    (time,) = pipeline.preset.sampling.timesteps or ()
    seen: list[Any] = []
    tiny.denoiser(pipe).register_forward_hook(lambda m, a, out: seen.append((a[0], out[0])))
    latents = pipe("a fox", output_type="latent", timesteps=[time], num_inference_steps=1, width=16, height=16,
                   generator=torch.Generator().manual_seed(0), guidance_scale=pipeline.preset.sampling.guidance_scale,
                   **pipeline.preset.sampling.call).images  # fmt: skip
    (z, eps), a = seen[0], pipe.scheduler.alphas_cumprod[time]
    x0 = (z - (1 - a).sqrt() * eps[:, :4]) / a.sqrt()  # PixArt's other channels are a variance
    assert x0.abs().max() > 1.5  # or it would not be seen if they were clamped
    torch.testing.assert_close(latents, x0, rtol=1e-3, atol=1e-3)


def test_classifier_free_guidance_is_the_pipelines(bases: dict[str, Path], tmp_path: Path) -> None:
    for name in ("dmd2-sdxl-1step", "flux-schnell-1step"):
        (tmp_path / name).mkdir()
        pipeline = load(name, bases, tmp_path / name)
        passes: list[int] = []
        handle = tiny.denoiser(pipeline.pipe).register_forward_hook(lambda m, a, out, p=passes: p.append(len(out[0])))
        pipeline.draw("a fox", NEGATIVES, ClassifierFree(2.0), width=16, height=16)
        handle.remove()
        assert passes in ([2], [1, 1])


def run(*args: str) -> Any:
    app = typer.Typer()
    app.command()(image_command)
    return CliRunner().invoke(app, list(args))


def test_command_writes_a_picture_that_says_how(bases: dict[str, Path], tmp_path: Path) -> None:
    weights = write_weights(find_image_preset("dmd2-sdxl-1step"), tmp_path)
    common = ["a fox", "--neg", "blurry:0.5", "--model", "dmd2-sdxl-1step", "--weights", str(weights), "--base",
              str(bases["sdxl"]), "--width", "16", "--height", "16", "--device", "cpu"]  # fmt: skip
    result = run(*common, "-o", str(tmp_path / "fox.png"), "--json", "--seed", "3")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["outputs"] == [str(tmp_path / "fox.png")]
    assert report["effect"]["relative_change"] > 0
    with Image.open(tmp_path / "fox.png") as picture:
        assert picture.size == (16, 16)
        made = json.loads(picture.text["comment"])["nasa_video_image"]
    assert made["negatives"] == [{"text": "blurry", "weight": 0.5}]
    assert made["guidance"] == "nasa:0.5"
    assert made["seed"] == 3
    result = run(*common, "-o", str(tmp_path / "two.png"), "--count", "2", "--guidance", "none")
    assert result.exit_code == 0, result.output
    assert {p.name for p in tmp_path.glob("two*")} == {"two-0.png", "two-1.png"}


def test_command_writes_a_sweep(bases: dict[str, Path], tmp_path: Path) -> None:
    weights = write_weights(find_image_preset("sbv2-sd21"), tmp_path)
    common = ["a fox", "--model", "sbv2-sd21", "--weights", str(weights), "--base", str(bases["sd"]), "--width", "32",
              "--height", "32", "--device", "cpu", "-o", str(tmp_path / "sweep.png")]  # fmt: skip
    result = run(*common, "--neg", "blurry", "--grid", "--count", "2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.strip().splitlines()[-1])
    assert report["scales"] == [0, 0.1, 0.2, 0.3, 0.4]
    with Image.open(tmp_path / "sweep.png") as picture:
        assert picture.width > 5 * 32
        assert picture.height > 2 * 32
    for wrong in (["--grid"], ["--neg", "blurry", "--scales", "a,b"], ["--neg", "blurry", "--scales", "-1"]):
        result = run(*common, *wrong)
        assert isinstance(result.exception, InputError)


def test_command_refuses_before_loading(tmp_path: Path) -> None:
    for args in (
        ["  "],
        ["a fox", "--model", "nothing"],
        ["a fox", "--guidance", "magic"],
        ["a fox", "--guidance", "nasa:-1"],
    ):
        result = run(*args)
        assert isinstance(result.exception, InputError), args
