"""Offloaded = resident to the bit, 8-bit weights are close and small, and the plan's ladder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor

from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise
from causvid_adapter.accelerate.offload import offload_blocks
from nasa_video.backbones.wan import install, prompt_keys
from nasa_video.errors import InputError
from nasa_video.guidance.attention import SdpaAttend
from nasa_video.guidance.methods import Nasa
from nasa_video.guidance.state import GuidanceState
from nasa_video.models.memory_estimate import Run, budget_of, estimate, fitting_card, fitting_placement, require
from nasa_video.models.memory_plan import PlanRequest, make_plan
from nasa_video.models.placement import LADDER, Placement, place
from nasa_video.models.presets import find_preset
from nasa_video.models.readiness import cards_of, readiness
from nasa_video.text import TextContext

NewWan = Callable[..., WanTransformer3DModel]
NewContext = Callable[..., TextContext]
SHAPE = (4, 4, 6)
CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent.parent


def guided_video(model: CausalWan, new_context: NewContext) -> Tensor:
    """Two chunks under NASA, the prompts' keys made by the model as it is placed."""
    transformer = model.transformer
    positive, negative = (prompt_keys(transformer, new_context([n], seed=n)) for n in (5, 3))
    steering = GuidanceState(SdpaAttend(), model.num_layers, Nasa(0.7), positive, [(negative, 1.0)])
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]), 1)
    with install(transformer, steering):
        return torch.cat(list(sampler.stream(None, SeededNoise([7], SHAPE), num_frames=2)), dim=1)


def in_memory(model: torch.nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.untyped_storage().size())


def load_aligned(path: str, device: str = "cpu") -> dict[str, Tensor]:
    """The tensors of a file at addresses that torch chooses: multiples of 64."""
    return {key: tensor.clone() for key, tensor in load_file(path, device=device).items()}


@pytest.mark.parametrize("place", ["host", "disk", "disk-aligned"])
def test_offloaded_is_resident(
    new_wan: NewWan, new_context: NewContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Same weights at the same kind of address: the same bits.

    A tensor that safetensors reads lies in the file's buffer, at a multiple of 8 bytes. For a matrix and a single row,
    which here are the three layers of the time embedding, the CPU's kernel sums in another order unless the matrix
    begins at a multiple of 16 bytes. Measured (torch 2.13, AVX-512): the resident model with its weights moved by 8
    bytes differs as much as the disk does, by 1.1e-6 at most, and of single weights only those three make a difference;
    moved by 16 or 32 bytes it is the same to the bit. Hence what is read is exact once it is aligned.
    """
    to_disk = place != "host"
    if place == "disk-aligned":
        monkeypatch.setattr("safetensors.torch.load_file", load_aligned)
    resident = guided_video(CausalWan(new_wan(num_layers=3)), new_context)
    model = CausalWan(new_wan(num_layers=3))
    weight = model.transformer.blocks[1].ffn.net[0].proj.weight
    before = weight.clone()
    offload_blocks(model, CPU, tmp_path if to_disk else None)
    if to_disk:
        # The weights are gone from memory between the passes: what computes with them must bring them back.
        assert len(list(tmp_path.glob("*.safetensors"))) == 4
        assert not torch.equal(weight, before)
    digits = {"rtol": 1e-5, "atol": 1e-5} if place == "disk" else {"rtol": 0.0, "atol": 0.0}
    for _ in range(2):
        torch.testing.assert_close(guided_video(model, new_context), resident, **digits)
    assert model.device == CPU


def test_a_part_that_is_used_by_itself_is_there_and_goes_again(new_wan: NewWan, tmp_path: Path) -> None:
    from causvid_adapter.accelerate.offload import is_offloaded, resident

    plain, model = CausalWan(new_wan()), CausalWan(new_wan())
    offload_blocks(model, CPU, tmp_path)
    assert is_offloaded(model.transformer)
    assert not is_offloaded(plain.transformer)
    weights = [m.transformer.blocks[0].attn2.to_k.weight for m in (plain, model)]
    with resident(model.transformer.blocks[0]), resident(plain.transformer.blocks[0]):
        assert torch.equal(*weights)
    assert not torch.equal(*weights)
    assert torch.isfinite(weights[0]).all()


@pytest.mark.parametrize(("weights", "tolerance"), [("int8", 0.03), ("fp8", 0.12)])
@pytest.mark.parametrize("offload", [False, True])
def test_weights_in_8_bits_make_nearly_the_same_video(
    new_wan: NewWan, new_context: NewContext, distance: Callable[..., float], weights: str, tolerance: float,
    offload: bool,
) -> None:  # fmt: skip
    pytest.importorskip("torchao")
    plain = guided_video(CausalWan(new_wan(num_layers=3)), new_context)
    model = place(CausalWan(new_wan(num_layers=3)), Placement(weights, offload), CPU)  # type: ignore[arg-type]
    changed = distance(guided_video(model, new_context), plain)
    assert 0 < changed < tolerance
    block = model.transformer.blocks[0]
    stored = block.ffn.net[0].proj.weight
    assert stored.qdata.element_size() == 1
    assert type(block.norm2.weight) is torch.nn.Parameter, "norms keep their numbers"
    assert type(model.transformer.proj_out.weight) is torch.nn.Parameter
    assert model.dtype == torch.float32


def test_without_torchao_the_way_out_is_said(new_wan: NewWan, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install 'nasa-video\[quant\]'"):
        place(CausalWan(new_wan()), Placement("int8"), CPU)
    with pytest.raises(InputError, match="plain, int8 or fp8"):
        Placement("int4")  # type: ignore[arg-type]


def published(name: str, **changes: object) -> Run:
    preset = find_preset(name)
    with torch.device("meta"):
        vae = dict(AutoencoderKLWan().config)
    assert preset.components.config is not None
    text = 5_680_910_336 * 2
    run = Run(preset.components.config, vae, preset.sampler, 832, 480, 21, text_encoder=text)
    return replace(run, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["causvid", "causvid-4step", "self-forcing", "longlive"])
def test_every_13b_preset_has_a_place_on_24_16_and_12_gigabytes(name: str) -> None:
    run = published(name)
    for card in cards_of(run):
        assert card.memory is not None, f"{card.gigabytes} GB"
        assert card.memory.peak <= budget_of(card.gigabytes)
    assert cards_of(run)[0].placement == LADDER[0], "24 GB need no sacrifice"


def test_the_documented_profiles_are_those_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nasa_video.models.presets.Source.find", lambda source: None)  # whatever is on this machine
    rows = [row for row in (ROOT / "docs" / "guides" / "memory.md").read_text().splitlines() if row.startswith("| ")]
    names = (
        "causvid",
        "causvid-4step",
        "self-forcing",
        "causal-forcing-1step",
        "causal-forcing-2step",
        "longlive",
        "krea-14b",
    )
    for name in names:
        cards = readiness(find_preset(name), None, None, None, "cpu").cards
        assert [card.gigabytes for card in cards] == [24, 16, 12]
        cells = []
        for card in cards:
            fits = card.memory is not None and card.placement is not None
            cells.append(
                f"{card.memory.peak / 1e9:.1f} GB (row {1 + LADDER.index(card.placement)})"  # type: ignore[union-attr, arg-type]
                if fits
                else "does not fit"
            )
        (row,) = [row for row in rows if name in row.split("|")[1].replace("(", ",").replace(",", " ").split()]
        for cell, documented in zip(cells, row.split("|")[3:6], strict=True):
            assert documented.strip().startswith(cell), (name, cells, row)


def test_a_14b_model_is_offloaded_and_the_ladder_falls() -> None:
    config = {**published("causvid").transformer, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40}
    sampler = find_preset("causvid").sampler.model_copy(update={"window_frames": 6, "sink_frames": 3})
    run = published("causvid", transformer=config, sampler=sampler)
    resident, offloaded = (estimate(replace(run, placement=p)) for p in (LADDER[0], LADDER[-1]))
    assert resident.weights > 28e9
    assert offloaded.weights < 3e9
    assert offloaded.host > 28e9
    int8 = estimate(replace(run, placement=Placement("int8")))
    assert int8.weights == pytest.approx(resident.weights - 13.9e9, rel=0.02)
    placement = fitting_placement(run, budget_of(24))
    assert placement is not None
    assert placement.offload
    assert fitting_placement(run, budget_of(24), host=10_000_000_000) is None, "the host has no room for the blocks"


def test_a_refusal_names_the_memory_that_fits() -> None:
    with pytest.raises(InputError, match=r"what fits: --memory 12"):
        require(published("causvid"), 11_500_000_000, "cuda", loaded=False)
    assert fitting_card(published("causvid"), 24_500_000_000) == 24
    assert fitting_card(published("causvid"), 3_000_000_000) is None


def request_on(monkeypatch: pytest.MonkeyPatch, device: int, host: int, **settings: object) -> object:
    sizes = {"cuda": device, "cpu": host}
    monkeypatch.setattr("nasa_video.models.memory_plan.available", lambda place: sizes[place.type])
    return make_plan(find_preset("causvid"), torch.device("cuda"), torch.bfloat16, PlanRequest(**settings))  # type: ignore[arg-type]


def test_memory_chooses_and_single_settings_replace_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**settings: object) -> object:
        return request_on(monkeypatch, 30_000_000_000, 60_000_000_000, **settings)

    assert plan().placement == Placement()  # type: ignore[attr-defined]
    assert plan(memory="full").placement == Placement()  # type: ignore[attr-defined]
    assert plan(memory="16").placement == Placement(text_on_cpu=True, half_decoder=True)  # type: ignore[attr-defined]
    assert plan(memory="16", weights="int8").placement.weights == "int8"  # type: ignore[attr-defined]
    assert plan(memory="12").placement.offload  # type: ignore[attr-defined]
    assert not plan(memory="12", offload=False).placement.offload  # type: ignore[attr-defined]
    line = plan().line()  # type: ignore[attr-defined]
    assert "at most of 30.0 GB free (weights 3.35 GB, keys and values 6.23 GB" in line
    for wrong in ("tiny", "0", "nan", "1e9"):
        with pytest.raises(InputError, match="full, auto, or the gigabytes"):
            plan(memory=wrong)
    with pytest.raises(InputError, match=r"does not fit --memory 4 in any way: what fits is --width \d+"):
        plan(memory="4")


def test_a_plan_without_end_has_a_window_or_rollouts() -> None:
    for name, window in (("self-forcing", 21), ("longlive", 12), ("causvid", None)):
        plan = make_plan(find_preset(name), CPU, torch.bfloat16, PlanRequest(endless=True))
        assert plan is not None
        assert plan.run.sampler.window_frames == window
        whole = make_plan(find_preset(name), CPU, torch.bfloat16, PlanRequest())
        assert whole is not None
        assert plan.needs.history == whole.needs.history, "as many frames as the model was trained on"


def test_auto_takes_what_the_device_has_and_refuses_where_nothing_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    auto = request_on(monkeypatch, 14_000_000_000, 60_000_000_000, memory="auto")
    assert auto.placement == Placement(text_on_cpu=True, half_decoder=True)  # type: ignore[attr-defined]
    with pytest.raises(InputError, match="not enough memory"):
        request_on(monkeypatch, 3_000_000_000, 60_000_000_000, memory="auto")
    with pytest.raises(InputError, match=r"not enough memory on this machine: 14\.2 GB are needed beside"):
        request_on(monkeypatch, 12_000_000_000, 5_000_000_000, memory="12")
    tight = request_on(monkeypatch, 12_000_000_000, 5_000_000_000, offload=True)
    assert tight.enough is False  # type: ignore[attr-defined]
