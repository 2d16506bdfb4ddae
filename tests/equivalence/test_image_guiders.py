"""Guiders of Modular Pipelines: the same picture as the classic pipeline under `guided`, and nothing left behind."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from diffusers.modular_pipelines import (
    FluxKontextAutoBlocks,
    StableDiffusionXLAutoBlocks,
    Wan22Blocks,
    WanBlocks,
    WanImage2VideoAutoBlocks,
)
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

from nasa_video import CentredNasa, Nag, Nasa, Vsf, guided
from nasa_video.errors import InputError
from nasa_video.guidance.methods import AttentionGuidance, setting
from nasa_video.integrations.diffusers.flux_modular import guided_flux_blocks
from nasa_video.integrations.diffusers.guiders import (
    CentredNasaGuidance,
    NagGuidance,
    NasaGuidance,
    VsfGuidance,
    guider_of,
)

BLOCKS = {"sdxl": StableDiffusionXLAutoBlocks, "wan": WanBlocks, "flux": guided_flux_blocks}
METHODS = [
    (NasaGuidance(scale=0.7), Nasa(0.7)),
    (NagGuidance(scale=4.0), Nag(4.0)),
    (VsfGuidance(scale=1.2, negative_padding=True), Vsf(1.2, negative_padding=True)),
]


def modular(kind: str) -> tuple[Any, Any]:
    """A classic pipeline and a modular one of the same parts."""
    classic = tiny.PIPES[kind]()
    pipe = BLOCKS[kind]().init_pipeline()
    parts = {name: part for name, part in classic.components.items() if name in pipe._component_specs}
    if kind == "wan":
        parts["scheduler"] = classic.scheduler
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    pipe.set_progress_bar_config(disable=True)
    return classic, pipe


def draw(pipe: Any, kind: str, noise: Tensor, **call: Any) -> Tensor:
    sizes = {k: v for k, v in tiny.CALLS[kind].items() if k not in ("guidance_scale", "num_inference_steps")}
    return pipe(  # type: ignore[no-any-return]
        prompt="a fox", latents=noise, num_inference_steps=1, output="latents", **sizes, **call
    )


def noise_of(kind: str) -> Tensor:
    shape = {"flux": (1, 16, 64), "wan": (1, 16, 2, 2, 2)}.get(kind, (1, 4, 8, 8))
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def predictions(model: Any, run: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    handle = model.register_forward_hook(lambda m, a, out: seen.append(out[0].detach()))
    run()
    handle.remove()
    return seen


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("index", range(3), ids=[m.name for _, m in METHODS])
def test_guider_is_guided(kind: str, index: int) -> None:
    guider, method = METHODS[index]
    classic, pipe = modular(kind)
    model, noise = tiny.denoiser(classic), noise_of(kind)
    pipe.update_components(guider=guider.new())
    ours = predictions(model, lambda: draw(pipe, kind, noise, negative_prompt="blurry"))
    with guided(classic, "blurry", method):
        theirs = predictions(model, lambda: tiny.draw(classic, kind, latents=noise, num_inference_steps=1))
    plain = predictions(model, lambda: tiny.draw(classic, kind, latents=noise, num_inference_steps=1))
    assert len(ours) == 1  # one pass
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours[0], plain[0], rtol=1e-3, atol=1e-4)
    assert pipe.guider.effect is not None
    assert pipe.guider.effect.relative_change > 0


@pytest.mark.parametrize("kind", BLOCKS)
def test_identities_and_what_is_left_behind(kind: str) -> None:
    classic, pipe = modular(kind)
    model, noise = tiny.denoiser(classic), noise_of(kind)
    before = dict(model.attn_processors)
    plain = predictions(model, lambda: tiny.draw(classic, kind, latents=noise, num_inference_steps=1))[0]
    for guider, call in (
        (NasaGuidance(scale=0.0), {"negative_prompt": "blurry"}),
        (NasaGuidance(scale=0.7), {}),
        (NasaGuidance(scale=0.7, enabled=False), {"negative_prompt": "blurry"}),
        (NasaGuidance(scale=0.7, stop=0.5), {"negative_prompt": "blurry"}),
    ):
        pipe.update_components(guider=guider)
        (same,) = predictions(model, lambda call=call: draw(pipe, kind, noise, **call))
        assert torch.equal(same, plain)
        assert guider.effect is None
    pipe.update_components(guider=NasaGuidance(scale=0.7))
    fail = model.register_forward_pre_hook(lambda m, a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(pipe, kind, noise, negative_prompt="blurry")
    fail.remove()
    assert all(model.attn_processors[name] is own for name, own in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_prompts_change_between_runs() -> None:
    classic, pipe = modular("sdxl")
    model, noise = tiny.denoiser(classic), noise_of("sdxl")
    pipe.update_components(guider=NasaGuidance(scale=0.7))
    for negative in ("blurry", "ugly", "blurry"):
        (ours,) = predictions(model, lambda n=negative: draw(pipe, "sdxl", noise, negative_prompt=n))
        with guided(classic, negative, Nasa(0.7)):
            (theirs,) = predictions(model, lambda: tiny.draw(classic, "sdxl", latents=noise, num_inference_steps=1))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_wan22_guides_both_transformers() -> None:
    classic, _ = modular("wan")
    pipe = Wan22Blocks().init_pipeline()
    torch.manual_seed(5)
    first, second = NasaGuidance(scale=0.7), NasaGuidance(scale=0.2)
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    parts = {name: classic.components[name] for name in names}
    pipe.update_components(**parts, transformer_2=tiny.wan_transformer(), guider=first, guider_2=second)
    pipe.set_progress_bar_config(disable=True)
    pipe(prompt="a fox", negative_prompt="blurry", num_inference_steps=4, num_frames=5, height=16, width=16,
         output="latents")  # fmt: skip
    assert first.effect is not None
    assert second.effect is not None


def test_kontext_is_guided_with_and_without_a_picture() -> None:
    classic, _ = modular("flux")
    pipe = guided_flux_blocks(FluxKontextAutoBlocks()).init_pipeline()
    parts = {name: part for name, part in classic.components.items() if name in pipe._component_specs}
    pipe.update_components(**{name: part for name, part in parts.items() if part is not None})
    pipe.set_progress_bar_config(disable=True)
    model, noise = classic.transformer, noise_of("flux")
    small = {"max_area": 16 * 16}  # Kontext scales every size to a million pixels otherwise
    for call in (small, small | {"image": Image.new("RGB", (16, 16), "red"), "_auto_resize": False}):
        pipe.update_components(guider=NasaGuidance(scale=0.0))
        (plain,) = predictions(model, lambda call=call: draw(pipe, "flux", noise, negative_prompt="blurry", **call))
        pipe.update_components(guider=NasaGuidance(scale=0.7))
        (ours,) = predictions(model, lambda call=call: draw(pipe, "flux", noise, negative_prompt="blurry", **call))
        assert not torch.allclose(ours, plain, rtol=1e-3, atol=1e-4)
        assert pipe.guider.effect is not None
        if "image" not in call:
            with guided(classic, "blurry", Nasa(0.7)):
                run = lambda: tiny.draw(classic, "flux", latents=noise, num_inference_steps=1)  # noqa: E731
                (theirs,) = predictions(model, run)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="WanBlocks has no loop"):
        guided_flux_blocks(WanBlocks())


def test_image_to_image_of_sdxl_is_guided() -> None:
    _, pipe = modular("sdxl")
    guider = NasaGuidance(scale=0.7)
    pipe.update_components(guider=guider)
    call = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.9, "height": 16, "width": 16}
    picture = lambda **more: pipe(  # noqa: E731
        prompt="a fox", num_inference_steps=2, output="latents", generator=torch.Generator().manual_seed(0),
        **call, **more,
    )  # fmt: skip
    guided_picture = picture(negative_prompt="blurry")
    assert guider.effect is not None
    pipe.update_components(guider=NasaGuidance(scale=0.0))
    assert not torch.allclose(picture(negative_prompt="blurry"), guided_picture, rtol=1e-3, atol=1e-4)


def test_image_to_video_of_wan_is_guided() -> None:
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

    classic = tiny.wan_pipe(in_channels=36, image_dim=4, added_kv_proj_dim=24)
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=4, projection_dim=4, num_hidden_layers=2, num_attention_heads=2, image_size=32,
        intermediate_size=16, patch_size=16,
    )  # fmt: skip
    pipe = WanImage2VideoAutoBlocks().init_pipeline()
    names = ("tokenizer", "text_encoder", "vae", "scheduler", "transformer")
    pipe.update_components(
        **{name: classic.components[name] for name in names},
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(crop_size=32, size=32),
    )
    pipe.set_progress_bar_config(disable=True)
    videos = []
    for scale in (0.0, 0.7):
        pipe.update_components(guider=NasaGuidance(scale=scale))
        videos.append(pipe(
            prompt="a fox", negative_prompt="blurry", image=Image.new("RGB", (16, 16), "red"), num_inference_steps=1,
            num_frames=5, height=16, width=16, output="latents", generator=torch.Generator().manual_seed(0),
        ))  # fmt: skip
    assert pipe.guider.effect is not None
    assert not torch.allclose(*videos, rtol=1e-3, atol=1e-4)


def test_padding_that_cannot_be_left_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from nasa_video.integrations.diffusers import guiders as guider

    said: list[str] = []
    monkeypatch.setattr(guider.logger, "warning", said.append)
    for kind, number in (("sdxl", 1), ("wan", 1)):  # Wan's padding is seen in its zeros: no second warning
        _, pipe = modular(kind)
        pipe.update_components(guider=VsfGuidance())
        for _ in range(2):
            draw(pipe, kind, noise_of(kind), negative_prompt="blurry")
        assert len([one for one in said if "negative_padding" in one]) == number


def test_config_survives_saving(tmp_path: Path) -> None:
    NagGuidance(scale=3.0, tau=2.0, stop=0.5).save_pretrained(tmp_path)
    loaded = NagGuidance.from_pretrained(tmp_path)
    assert loaded.method() == Nag(3.0, 2.0, 0.25)
    assert loaded.config.stop == 0.5
    with pytest.raises(InputError):
        NasaGuidance(scale=-1.0)


@dataclass(frozen=True)
class Half(AttentionGuidance):
    """A user's own: half of what NASA subtracts."""

    name: ClassVar[str] = "half"
    label: ClassVar[str] = "Half NASA"
    extra: float = setting(0.0, "does nothing")

    def __call__(self, q: Tensor, positive: Any, negatives: Any, attend: Any) -> Any:
        return Nasa(self.scale / 2)(q, positive, negatives, attend)


HalfGuidance = guider_of(Half, "HalfGuidance", "Half of NASA.")


@pytest.mark.parametrize(
    ("guider", "method"),
    [
        (HalfGuidance(scale=1.4), Nasa(0.7)),
        (CentredNasaGuidance(scale=0.4, conflict=1.5), CentredNasa(0.4, conflict=1.5)),
    ],
    ids=["own", "centred"],
)
def test_every_method_has_a_guider_ones_own_too(guider: Any, method: Any, tmp_path: Path) -> None:
    classic, pipe = modular("wan")
    model, noise = tiny.denoiser(classic), noise_of("wan")
    pipe.update_components(guider=guider)
    (other,) = predictions(model, lambda: draw(pipe, "wan", noise, negative_prompt="blurry"))
    with guided(classic, "blurry", method):
        run = lambda: classic("a fox", latents=noise, output_type="latent", **tiny.CALLS["wan"])  # noqa: E731
        expected = predictions(model, run)[0]
    torch.testing.assert_close(other, expected, rtol=1e-4, atol=1e-5)
    guider.save_pretrained(tmp_path)
    assert type(guider).from_pretrained(tmp_path).method() == guider.method()
    assert list(inspect.signature(HalfGuidance).parameters)[:2] == ["scale", "extra"]


def test_embeddings_under_an_unknown_name_are_not_ignored() -> None:
    with pytest.raises(InputError, match="cap_feats"):
        NasaGuidance().prepare_inputs({"cap_feats": (torch.zeros(1), torch.zeros(1))})


def test_modular_pipelines_are_sent_to_the_guider() -> None:
    _, pipe = modular("sdxl")
    with pytest.raises(InputError, match="update_components"), guided(pipe, "blurry", Nasa(0.5)):
        pass
