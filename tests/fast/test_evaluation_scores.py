"""CLIP, HPSv2, NegOpt and removal by a judge: small random weights in the true file formats, by command."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1]))
import image_tiny as tiny

if importlib.util.find_spec("open_clip") is None:  # not imported here: that may need our stand-in for torchvision
    pytest.skip("needs open_clip: pip install 'nasa-video[evaluation]'", allow_module_level=True)

from nasa_video.cli.evaluate import evaluate
from nasa_video.errors import InputError
from nasa_video.evaluation.benchmarks.hpsv2 import STYLES, shortened, style_prompts
from nasa_video.evaluation.benchmarks.negopt import Pair, negopt_pairs, sample_pairs
from nasa_video.evaluation.benchmarks.removal import removal_prompts
from nasa_video.evaluation.clip import Backbone, Clip, Fit, import_open_clip
from nasa_video.evaluation.results import Results
from nasa_video.evaluation.samples import ImageModel, Sample, methods_of, model_of

CONFIG = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config of open_clip's form, and a checkpoint of HPSv2's: a pickle with the tensors under "state_dict"."""
    folder = tmp_path_factory.mktemp("scorer")
    config = folder / "tiny-clip.json"
    config.write_text(json.dumps(CONFIG))
    library = import_open_clip()
    library.add_model_config(config)
    torch.manual_seed(0)
    weights = folder / "HPS_v2_compressed.pt"
    state = {name: value.half() for name, value in library.create_model("tiny-clip").state_dict().items()}
    torch.save({"state_dict": state}, weights)
    return config, weights


@pytest.fixture(scope="session")
def image_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preset file of a tiny Stable Diffusion; its base lies in "base" beside it."""
    folder = tmp_path_factory.mktemp("image")
    tiny.sd_pipe().save_pretrained(folder / "base")
    preset = {
        "name": "tiny-sd", "kind": "image", "title": "tiny", "family": "sd", "licence": "none", "source": "a test",
        "base": {"repo": "nobody/nothing"}, "scheduler": {"name": "LCMScheduler"}, "dtype": "float16",
        "sampling": {"steps": 2, "guidance_scale": 0.0, "width": 16, "height": 16},
        "guidance": {"nasa": {"scale": 0.5}}, "guidance_source": "a test",
    }  # fmt: skip
    (folder / "preset.yaml").write_text(yaml.safe_dump(preset))
    return folder


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No network, and a hub's cache that is empty."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


def run(*words: str) -> Any:
    """Run an eval command; the last line of its output as JSON, or the error that it raises."""
    outcome = CliRunner().invoke(evaluate, [*words, "--json"])
    if outcome.exception is not None and not isinstance(outcome.exception, SystemExit):
        raise outcome.exception
    assert outcome.exit_code == 0, outcome.output
    return json.loads(outcome.stdout.splitlines()[-1])


def model_words(image_model: Path) -> list[str]:
    return ["--model", str(image_model / "preset.yaml"), "--base", str(image_model / "base"), "--device", "cpu"]


def test_preparing_a_picture_is_open_clips_way_by_hand() -> None:
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8)[None, :, None], (30, 1, 3))
    form = {"size": 30, "resize_mode": "shortest", "mean": (0.0,) * 3, "std": (1.0,) * 3}
    cut = Fit.of(form)(Image.fromarray(ramp))
    assert cut.shape == (3, 30, 30)
    assert torch.equal(cut[0, 0], torch.from_numpy(ramp[0, 15:45, 0].copy()) / 255), "the middle, not scaled"
    padded = Fit.of(form, "longest")(Image.fromarray(ramp))
    assert float(padded[:, :7].abs().max()) == 0, "black above"
    assert float(padded[:, 23:].abs().max()) == 0, "and below"
    assert float(padded[0, 15, -1]) > 0.9
    squashed = Fit.of(form, "squash")(Image.fromarray(ramp))
    assert float(squashed[0, 0, -1]) > 0.9
    normal = Fit.of(form | {"mean": (0.5,) * 3, "std": (0.5,) * 3})(Image.fromarray(ramp))
    assert torch.allclose(normal, cut * 2 - 1)


def test_cosines_are_open_clips_own(scorer: tuple[Path, Path]) -> None:
    clip = Clip(Backbone(str(scorer[0]), str(scorer[1])), "cpu")
    picture = np.random.default_rng(0).integers(0, 255, (28, 28, 3), np.uint8)
    library = import_open_clip()
    model = library.create_model("tiny-clip")
    model.load_state_dict({k: v.float() for k, v in torch.load(scorer[1], weights_only=True)["state_dict"].items()})
    mean, std = (torch.tensor(c)[:, None, None] for c in (library.OPENAI_DATASET_MEAN, library.OPENAI_DATASET_STD))
    pixels = (torch.from_numpy(picture).permute(2, 0, 1) / 255 - mean) / std
    with torch.no_grad():
        image, text, _ = model.eval()(pixels[None], library.get_tokenizer("tiny-clip")(["a red ball"]))
    assert clip.cosine([picture], "a red ball") == pytest.approx(float(image @ text.T), abs=1e-5)
    assert clip.identity["precision"] == "float32"
    assert len(str(clip.identity["sha256"])) == 64


@pytest.mark.usefixtures("offline")
def test_a_clip_that_cannot_be_had(scorer: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"vit_large_patch14_clip_224.openai \(1.71 GB.*ViT-L-14-quickgelu:FILE"):
        Clip(Backbone.parse("ViT-L-14:openai"))
    with pytest.raises(InputError, match="neither a file nor weights of ViT-B-32"):
        Clip(Backbone.parse("ViT-B-32:nothing"))
    with pytest.raises(InputError, match="has no model 'ViT-X'"):
        Clip(Backbone.parse("ViT-X:openai"))
    with pytest.raises(InputError, match="does not exist"):
        Clip(Backbone.parse("/nowhere/c.json:openai"))
    with pytest.raises(InputError, match="ARCHITECTURE:WEIGHTS"):
        Backbone.parse("ViT-B-32")
    other = json.loads(scorer[0].read_text())
    other["embed_dim"] = 8
    (tmp_path / "other-clip.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="does not hold the weights of the CLIP model other-clip"):
        Clip(Backbone(str(tmp_path / "other-clip.json"), str(scorer[1])))


def test_hpsv2_end_to_end(scorer: tuple[Path, Path], image_model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for style in ("anime", "photo"):
        (prompts / f"{style}.json").write_text(json.dumps([f"{style} fox {letter}" for letter in "abcd"]))
    words = ["hpsv2", "-o", str(tmp_path / "run"), *model_words(image_model), "--prompts", str(prompts)]
    words += ["--styles", "anime,photo", "--limit", "3", "--methods", "none,nasa:1", "--seed", "5"]
    words += ["--backbone", str(scorer[0]), "--checkpoint", str(scorer[1]), "--neg", "blurry"]
    shard = run(*words, "--shard", "0/2")
    assert (shard["complete"], shard["missing"]) == (False, 6)
    said = run(*words, "--shard", "1/2")
    found = Results.read(tmp_path / "run")
    assert len(found.items) == 12
    scores = {(s["arm"], s["group"]): s for s in said["scores"] if s["metric"] == "hpsv2"}
    assert set(scores) == {(arm, group) for arm in ("none", "nasa:1") for group in ("all", "anime", "photo")}
    item = next(i for i in found.items if i.arm == "nasa:1" and i.group == "photo")
    picture = Image.open(tmp_path / "run" / str(item.media))
    clip = Clip(Backbone(str(scorer[0]), str(scorer[1])), "cpu", "longest")
    assert item.values["hpsv2"] == pytest.approx(100 * clip.cosine([picture], item.prompt), abs=1e-4)
    assert {i.seed for i in found.items} == set(range(5, 11)), "one seed a prompt, the same in both arms"
    assert found.settings["hps_version"] == "v2"
    assert found.settings["scorer"]["sha256"] == clip.identity["sha256"]  # type: ignore[index, call-overload]
    assert found.settings["prompts_a_style"] == 3
    assert any("anime over 3, photo over 3 prompts only: not comparable" in note for note in found.notes)
    changed = [d for d in said["differences"] if d["metric"] == "hpsv2"]
    assert changed[0]["raised"] + changed[0]["lowered"] == 6, "the negative acts in every picture"

    pictures = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "outputs").glob("*.png")}
    (broken := next(iter(pictures))).write_bytes(b"cut")
    assert run(*words)["scores"] == said["scores"], "a rerun is the same table"
    assert {path for path, time in pictures.items() if path.stat().st_mtime_ns != time} == {broken}
    assert "<img" in (tmp_path / "run" / "report.html").read_text()


def test_only_all_of_hpsv2s_prompts_are_called_comparable() -> None:
    whole = [Sample(f"{style}/{i}", "a fox", "", i, style) for style in STYLES for i in range(800)]
    assert not shortened(whole)
    assert "photo over 799" in shortened(whole[:-1])[0], "a file that holds fewer, without --limit"
    assert "anime over 800" in shortened(whole[:800])[0], "a style alone"


def test_negopt_end_to_end(scorer: tuple[Path, Path], image_model: Path, tmp_path: Path) -> None:
    pairs = [{"prompt": f"a fox {c}", "negative_prompt": f"bad {c}", "other": 1} for c in "abcdefgh"]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    words = ["negopt", "-o", str(tmp_path / "run"), *model_words(image_model), "--prompts", str(path), "--n", "3"]
    said = run(*words, "--backbone", f"{scorer[0]}:{scorer[1]}", "--methods", "none,nasa:1")
    found = Results.read(tmp_path / "run")
    assert {s["metric"] for s in said["scores"]} >= {"clip_plus", "clip_minus", "luma"}
    clip = Clip(Backbone(str(scorer[0]), str(scorer[1])), "cpu")
    item = found.items[0]
    picture = Image.open(tmp_path / "run" / str(item.media))
    assert item.values["clip_plus"] == pytest.approx(clip.cosine([picture], item.prompt), abs=1e-5)
    assert item.values["clip_minus"] == pytest.approx(clip.cosine([picture], item.negative), abs=1e-5)
    assert item.negative == item.prompt.replace("a fox", "bad"), "each picture avoids its own pair's negative"
    assert (found.settings["pairs"], found.settings["pairs_to_draw_from"]) == (3, 8)
    with pytest.raises(InputError, match="there are 8 pairs, so 9 cannot be drawn"):
        run(*words, "--backbone", f"{scorer[0]}:{scorer[1]}", "--n", "9")


def test_removal_by_a_judge_over_negenbench_prompts(image_model: Path, tmp_path: Path) -> None:
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json, sys\n"
        "for number, line in enumerate(sys.stdin):\n"
        "    print(json.dumps({'answers': [('yes', 'no', '?')[number % 3], True]}), flush=True)\n"
    )
    prompts = tmp_path / "prompts.json.new"
    entry = {"missing_element": "sails", "question_1": "Is it a boat?", "question_2": "Are the sails missing?"}
    prompts.write_text(json.dumps([{"prompt": f"a boat {c}", **entry} for c in "abc"]))
    words = ["removal", *model_words(image_model), "--judge", f"command:{sys.executable} {judge}", "--prompts"]
    words += [str(prompts), "--seeds", "2", "--methods", "none,nasa:1", "-o", str(tmp_path / "run")]
    said = run(*words)
    scores = {(s["arm"], s["metric"]): s for s in said["scores"]}
    # 12 answers in turn: missing, not missing, unsure; "unsure" is not removed.
    assert scores["none", "removed"]["value"] + scores["nasa:1", "removed"]["value"] == pytest.approx(2 / 3)
    assert scores["none", "held"]["value"] == 1
    assert scores["none", "removed"]["n"] == 6
    found = Results.read(tmp_path / "run")
    assert {item.negative for item in found.items} == {"sails"}
    assert found.settings["judge"]["command"].endswith("judge.py")  # type: ignore[index, call-overload, union-attr]
    judge.write_text("raise SystemExit(1)")
    assert run(*words)["scores"] == said["scores"], "what was answered is not asked again"
    with pytest.raises(InputError, match="give a folder with -o"):
        run(*words[:-2])


def test_removal_for_other_models_needs_prompts(image_model: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give prompts with --prompts"):
        run("removal", *model_words(image_model), "--judge", "command:cat", "-o", str(tmp_path / "run"))
    with pytest.raises(InputError, match="--base and --weights are for image models"):
        run("removal", "--judge", "command:cat", "--base", "/b", "-o", str(tmp_path / "run"))
    with pytest.raises(InputError, match="unknown model 'nope'"):
        model_of("nope")


@pytest.mark.usefixtures("offline")
def test_missing_files_are_named_with_size_source_and_licence(image_model: Path, tmp_path: Path) -> None:
    words = ["-o", str(tmp_path / "run"), *model_words(image_model)]
    with pytest.raises(InputError, match=r"benchmark/anime.json of the hub's dataset zhwang/HPDv2 .*MB.*--prompts"):
        run("hpsv2", *words)
    (tmp_path / "anime.json").write_text('["a fox"]')
    words += ["--prompts", str(tmp_path), "--styles", "anime"]
    with pytest.raises(InputError, match=r"HPS_v2.1_compressed.pt of the hub's xswu/HPSv2 \(1.97 GB; licence: Apache"):
        run("hpsv2", *words, "--hps-version", "v2.1")
    with pytest.raises(InputError, match=r"--hps-version must be one of v2, v2\.1"):
        run("hpsv2", *words, "--hps-version", "v3")
    with pytest.raises(InputError, match=r"mikeogezi/negopt_full .*--prompts FILE"):
        run("negopt", "-o", str(tmp_path / "run"), *model_words(image_model))


@pytest.mark.usefixtures("offline")
def test_prompts_are_found_in_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "hub" / "datasets--mikeogezi--negopt_full" / "snapshots" / "abc" / "data"
    folder.mkdir(parents=True)
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "negative_prompt"])
        writer.writeheader()
        writer.writerows([{"prompt": "a, b", "negative_prompt": "c"}, {"prompt": "only", "negative_prompt": " "}])
    assert negopt_pairs(None)[0] == [Pair("a, b", "c")]
    models = tmp_path / "models"
    (models / "zhwang" / "HPDv2" / "benchmark").mkdir(parents=True)
    (models / "zhwang" / "HPDv2" / "benchmark" / "photo.json").write_text('["a fox"]')
    monkeypatch.setenv("NASA_VIDEO_MODELS", str(models))
    assert style_prompts("photo", None)[0] == ["a fox"]


def test_pairs_are_read_in_every_form_and_drawn_with_a_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "negative_prompt": f"n{i}"} for i in range(50)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs, _ = negopt_pairs(tmp_path / "a.json")
    drawn = sample_pairs(pairs, 20, seed=1)
    assert drawn[:5] == sample_pairs(pairs, 5, seed=1), "a smaller draw is the beginning of a larger"
    assert len({row for row, _ in drawn}) == 20
    assert drawn != sample_pairs(pairs, 20, seed=2)
    assert all(pairs[row] == pair for row, pair in drawn)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").Table.from_pylist([row | {"x": 1} for row in rows])
    parquet.write_table(table, tmp_path / "a.parquet")
    assert negopt_pairs(tmp_path / "a.parquet")[0] == pairs
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="holds no columns prompt and negative_prompt"):
        negopt_pairs(tmp_path / "b.parquet")
    with pytest.raises(InputError, match="does not exist"):
        negopt_pairs(tmp_path / "c.csv")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "must hold a JSON list"),
        ('[{"prompt": "p"}]', "entry 1, has no missing_element"),
        ('[{"prompt": "p", "feature": "f", "alternatives": "x"}]', "alternatives must be a list"),
        ("nonsense", "cannot be read as JSON"),
        ('["p"]', "entry 1, must be an object"),
    ],
)
def test_broken_removal_prompts(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        removal_prompts(path)


def test_removal_prompts_of_our_own_form(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[{"prompt": "a photo of a person", "feature": "male", "alternatives": ["female"]}]')
    one = removal_prompts(path)[0]
    assert (one.feature, one.negative, one.present, one.absent, one.alternatives) == (
        "male", "male", None, None, ("female",),
    )  # fmt: skip


def test_an_image_plan_depends_on_what_the_model_is_made_of(image_model: Path, tmp_path: Path) -> None:
    model = model_of(str(image_model / "preset.yaml"), "cpu", base=image_model / "base")
    assert isinstance(model, ImageModel)
    samples = [Sample("0", "a fox", "bad", 3)]
    none, nasa = model.plan(samples, methods_of("none,nasa", model.preset), [None])
    assert none.job.request.negatives == ()
    assert [n.text for n in nasa.job.request.negatives or ()] == ["bad"]
    assert (nasa.arm.label, nasa.arm.scale, nasa.job.request.steps) == ("nasa", 0.5, 2)
    other = tmp_path / "base"
    tiny.sd_pipe(1).save_pretrained(other)
    unguided = methods_of("none", model.preset)
    changed = model_of(str(image_model / "preset.yaml"), "cpu", base=other).plan(samples, unguided, [None])
    assert changed[0].job.id != none.job.id
    with pytest.raises(InputError, match="makes stills; leave out --frames"):
        model_of(str(image_model / "preset.yaml"), frames=9)
