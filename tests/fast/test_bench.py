"""The bench counts what is there, in every method, and refuses what it cannot measure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from causvid_adapter import CausalWan
from nasa_video.bench import case as cases
from nasa_video.bench import measure as measuring
from nasa_video.bench.case import BenchSettings, Case
from nasa_video.bench.flops import chunk_flops, flop_counter, mean_chunk_flops, prompt_flops
from nasa_video.bench.measure import bench
from nasa_video.bench.operations import count_flops, count_video
from nasa_video.bench.random_model import RandomText
from nasa_video.bench.subject import BASELINE, Method, Rollout, Subject, find_methods
from nasa_video.cli import bench as command
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import METHODS, Nasa, register
from nasa_video.models.presets import SamplerSettings, find_preset

NewWan = Callable[..., WanTransformer3DModel]
NewVae = Callable[..., AutoencoderKLWan]
GUIDANCE: dict[str, dict[str, float]] = {"nasa": {"scale": 0.5}, "vsf": {"scale": 1.0}}
ROWS = find_methods((), GUIDANCE)
BY_NAME = {method.name: method for method in ROWS}


def subject_of(transformer: WanTransformer3DModel, window: int | None = None) -> Subject:
    sampler = SamplerSettings(
        shift=8, steps={2: (1000.0, 757.0)}, default_steps=2, frames_per_chunk=3, window_frames=window
    )
    return Subject(CausalWan(transformer), SdpaAttend(), sampler, GUIDANCE, (4, 4, 6), RandomText(32, 10), (5, 3))


def nothing(frames: range, step: int) -> torch.Tensor:
    return torch.zeros(1, len(frames), 4, 4, 6)


@pytest.fixture
def folder(tmp_path: Path, new_wan: NewWan, new_vae: NewVae) -> Path:
    """A small model in files, with a preset."""
    new_wan(num_layers=3).save_pretrained(tmp_path / "transformer")
    new_vae().save_pretrained(tmp_path / "vae")
    preset = {
        "name": "small", "kind": "video", "title": "small", "licence": "none",
        "components": {
            "transformer": {"path": "transformer"}, "vae": {"path": "vae"},
            "text_encoder": {"kind": "wordllama", "max_tokens": 32},
        },
        "sampler": {"shift": 8.0, "steps": {2: [1000, 757]}, "default_steps": 2, "frames_per_chunk": 3},
        "video": {"width": 96, "height": 64, "fps": 12, "frames": 33},
        "guidance": {"nasa": {"scale": 0.5}},
    }  # fmt: skip
    (tmp_path / "preset.yaml").write_text(yaml.safe_dump(preset))
    return tmp_path


def settings_of(folder: Path, **changes: Any) -> BenchSettings:
    usual = {"width": 48, "height": 32, "chunks": 2, "repeats": 2, "positive_tokens": 5, "negative_tokens": 3}
    return BenchSettings(**{"model": str(folder), "device": "cpu", **usual, **changes})


@pytest.mark.parametrize("bias", [False, True])
def test_attention_is_counted_on_the_cpu(bias: bool) -> None:
    q, k = torch.zeros(1, 2, 64, 32), torch.zeros(1, 2, 21, 32)
    with flop_counter() as counter:
        F.scaled_dot_product_attention(q, k, k, attn_mask=torch.zeros(1, 1, 1, 21) if bias else None)
    assert counter.get_total_flops() == 4 * 2 * 64 * 21 * 32


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("method", ROWS, ids=lambda method: method.name)
def test_counted_on_the_cpu_is_counted_on_shapes_is_the_formula(
    new_wan: NewWan, method: Method, window: int | None
) -> None:
    subject = subject_of(new_wan(), window)
    shapes = subject_of(new_wan().to("meta"), window)
    counted = count_video(subject, method, 4)
    formula = 4 * mean_chunk_flops(subject.sizes, subject.loop, 4, subject.branches(method))
    assert counted == count_video(shapes, method, 4)
    assert counted == pytest.approx(formula, rel=1e-9)


def test_counting_one_and_two_layers_gives_any_number_of_them(folder: Path) -> None:
    case = Case.of(settings_of(folder, methods=("nasa-folded",)))
    counted = count_flops(case, lambda *_: None)
    whole = case.subject(torch.device("meta"), 3)
    assert counted == {method.name: count_video(whole, method, 1) for method in case.methods}


def test_the_formula_gives_what_the_facts_say_of_causvid() -> None:
    case = Case.of(BenchSettings(random_weights=True, width=832, height=480, device="cpu"))
    subject = case.subject(torch.device("meta"), 1)
    loop, sizes = subject.loop, subject.sizes
    assert loop.tokens_per_frame == 1560

    def mean(name: str) -> float:
        return mean_chunk_flops(sizes, loop, 7, subject.branches(BY_NAME[name]))

    # facts/guidance.md: 943 GFLOP a layer and pass, 14.7 of them one text attention over 512 tokens.
    assert mean("none-padded") / 4 == pytest.approx(943e9, rel=0.01)
    assert (mean("nasa-padded") - mean("none-padded")) / 4 == pytest.approx(14.7e9, rel=0.01)
    assert mean("nasa-padded") / mean("none-padded") == pytest.approx(1.016, abs=0.001)
    assert mean("nasa-folded") < mean("none-padded")
    assert mean("cfg") / mean("none-folded") == pytest.approx(2, abs=0.001)


def test_a_prompts_keys_cost_what_the_formula_says(new_wan: NewWan) -> None:
    subject = subject_of(new_wan())
    for fold, tokens in ((True, 16), (False, 32)):
        with flop_counter() as counter:
            subject.make_keys(RandomText.prompt(5), fold, True)
        assert counter.get_total_flops() == prompt_flops(subject.sizes, tokens)


def test_a_chunk_is_charged_with_its_steps_and_its_own_clean_pass(new_wan: NewWan) -> None:
    subject = subject_of(new_wan())
    passes: list[int] = []
    subject.model.transformer.register_forward_hook(lambda *_: passes.append(1))
    for name, each in (("none-padded", 3), ("cfg", 6)):
        passes.clear()
        rollout = Rollout(subject, BY_NAME[name], 3, nothing, lambda: (float(len(passes)),))
        for _ in range(3 + Rollout.extra_turns):
            rollout.turn()
        assert rollout.spent == [(each,)] * 3
        assert len(passes) == 3 * each
    assert chunk_flops(subject.sizes, subject.loop, 1, [[5]]) > chunk_flops(subject.sizes, subject.loop, 0, [[5]])


def test_a_present_model_is_measured_in_every_method(folder: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    result = bench(settings_of(folder, decode=True, width=None, height=None), lambda *what: heard.append(what))
    rows = {row["name"]: row for row in result["methods"]}
    assert list(rows) == [method.name for method in ROWS]
    assert result["order"] == "chunk by chunk"
    assert (result["layers"], result["model_layers"], result["weights"]) == (3, 3, "loaded")
    assert [rows[name]["keys"] for name in ("none-padded", "nasa-folded", "nasa-padded", "cfg")] == [
        [[32]], [[16, 16]], [[32, 32]], [[16], [16]],
    ]  # fmt: skip
    for row in rows.values():
        assert row["ms_per_chunk"] > 0
        assert len(row["ms_by_chunk"]) == 2
        assert row["ms_quartiles"][0] <= row["ms_per_chunk"] <= row["ms_quartiles"][1]
        assert row["cpu_ms_per_chunk"] > 0
        assert row["cpu_time_ratio"] > 0
        assert row["fps"] == pytest.approx(12_000 / row["ms_per_chunk"])
        assert row["fps_with_decode"] == pytest.approx(12_000 / (row["ms_per_chunk"] + result["decode_ms"]))
        assert row["flops"]["first_chunk_counted"] == pytest.approx(row["flops"]["first_chunk_analytic"], rel=0.01)
        assert row["own_size"]["first_chunk_counted"] == pytest.approx(
            row["own_size"]["first_chunk_analytic"], rel=0.01
        )
        assert row["extrapolated"] is None
    assert rows[BASELINE.name]["time_ratio"] == 1
    # Two chunks of 72 tokens, 3 layers, width 48, float32.
    history = 2 * 144 * 3 * 48 * 4
    assert rows["nasa-padded"]["memory"] == {
        "history": history, "text_keys": 64 * 2 * 3 * 48 * 4, "peak_beside_weights": None, "extra": 32 * 2 * 3 * 48 * 4,
    }  # fmt: skip
    assert rows["cfg"]["memory"]["history"] == 2 * history
    assert heard[-1][0].startswith("counting")
    assert any(what.startswith("repetition 2 of 2") for what, _, _ in heard)
    assert json.loads(json.dumps(result)) == result


def test_cut_layers_are_stated_and_extrapolated_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = bench(settings_of(folder, layers=1, random_weights=True, methods=("nasa-folded",)))
    assert [row["name"] for row in result["methods"]] == ["none-padded", "nasa-folded"]
    assert (result["layers"], result["model_layers"], result["own_size"]["layers"]) == (1, 3, 3)
    row = result["methods"][1]
    assert row["extrapolated"]["history"] == 3 * row["memory"]["history"]
    assert 2 < row["extrapolated"]["ms_per_chunk"] / row["ms_per_chunk"] < 3
    command.show(result)
    text = capsys.readouterr().out
    assert "CUT to 1 of 3 layers" in text
    assert "EXTRAPOLATED to all 3 layers" in text
    assert "all 3 layers, 3 chunks" in text
    assert "NASA, folded" in text
    assert "16+16" in text


def test_videos_that_do_not_fit_side_by_side_are_measured_one_after_another(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case.of(settings_of(folder))
    needed = measuring.estimate(case.run(caches=2)).peak
    monkeypatch.setattr(measuring, "available", lambda device: int(1.1 * needed))
    assert bench(settings_of(folder, methods=("cfg",)))["order"] == "video by video"
    monkeypatch.setattr(measuring, "available", lambda device: needed // 2)
    with pytest.raises(InputError, match="not enough memory on cpu"):
        bench(settings_of(folder))


def test_a_model_is_compiled_as_generate_compiles_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda forward, **options: compiled.append(options) or forward)
    result = bench(settings_of(folder, compile=True, methods=("nasa-folded", "cfg"), repeats=1))
    assert result["compile"]
    assert compiled == [{"fullgraph": True, "backend": "inductor"}]
    folded, two = result["methods"][1:]
    # Keys and values of two chunks of 18 tokens, 3 layers, width 48, float32.
    assert two["memory"]["history"] == 2 * folded["memory"]["history"] == 2 * (2 * 36 * 3 * 48 * 4)
    assert folded["flops"]["first_chunk_counted"] == pytest.approx(folded["flops"]["first_chunk_analytic"], rel=0.01)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 0}, "layers must be from 1 to the 3"),
        ({"layers": 4}, "layers must be from 1 to the 3 .* got 4"),
        ({"width": 50}, "width must be a multiple of 16 for this model, got 50; use 48 or 64"),
        ({"height": -16}, "height must be a multiple of 16"),
        ({"attention": "xformers"}, "xformers has no attention kernel for cpu; use --attention sdpa"),
        ({"attention": "flash"}, "attention must be sdpa or xformers"),
        ({"model": "nothing"}, "unknown model 'nothing'"),
        ({"model": "causvid", "random_weights": False}, "--random-weights"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"chunks": 0}, "chunks must be from 1"),
        ({"repeats": 0}, "repeats must be from 1"),
        ({"methods": ("nsa",)}, "must be one of nasa, .* or none"),
        ({"positive_tokens": 33}, "positive_tokens must be from 1 to the 32"),
    ],
)
def test_what_cannot_be_measured_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        bench(settings_of(folder, **changes))


def test_a_cpu_measures_a_part_of_a_large_model_and_says_so() -> None:
    with pytest.warns(UserWarning, match="measuring 208 x 112 with 2 of 30 layers"):
        case = Case.of(BenchSettings(random_weights=True, device="cpu"))
    assert (case.width, case.height, case.layers) == (208, 112, 2)
    case = Case.of(BenchSettings(random_weights=True, device="cpu", layers=30))
    assert (case.width, case.height, case.layers) == (832, 480, 30)


def test_methods_are_the_registered_ones_and_take_settings_of_their_own() -> None:
    @register
    @dataclasses.dataclass(frozen=True)
    class Half(Nasa):
        name: ClassVar[str] = "half"
        label: ClassVar[str] = "Half"

    try:
        assert find_methods((), {})[-1].title == "Half, folded"
    finally:
        del METHODS["half"]
    rows = find_methods(("cfg:2", "none-padded", "nasa:0.5-padded", "cfg:2-folded"), {})
    assert [(row.guidance, row.fold) for row in rows] == [(None, False), ("cfg:2", True), ("nasa:0.5", False)]
    assert rows[1].title == "CFG:2, folded"


def test_sizes_of_wan22_are_not_those_of_wan21() -> None:
    """Its VAE makes a quarter as many latents of a frame, wherever its config is read."""
    preset = find_preset("causvid")
    for channels, size in ((16, (104, 60)), (48, (52, 30))):
        config = {**(preset.components.config or {}), "in_channels": channels}
        own = preset.model_copy(update={"components": preset.components.model_copy(update={"config": config})})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cases, "find_preset", lambda name, own=own: own)
            case = Case.of(BenchSettings(random_weights=True, width=832, height=480, layers=1, device="cpu"))
        assert (case.latent_shape[2], case.latent_shape[1]) == size


def test_zero_is_a_size_like_another(folder: Path) -> None:
    with pytest.raises(InputError, match="width must be a multiple of 16 for this model, got 0"):
        bench(settings_of(folder, width=0))


def test_random_text_gives_a_word_a_token_and_the_same_word_the_same_numbers() -> None:
    text = RandomText(4, 6)(["red ball", "ball a b c d e"])
    assert text.lengths.tolist() == [2, 4]
    assert torch.equal(text.embeds[0, 1], text.embeds[1, 0])
    assert not text.embeds[0, 2:].any()
    assert len(set(RandomText.prompt(300).split())) == 300
