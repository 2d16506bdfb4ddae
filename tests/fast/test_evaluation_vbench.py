"""VBench: prompts, weights, the subprocess and its breakdowns, shards, and what is never a zero.

The vbench here is a stand-in that fails in the ways that matter; the true one runs in tests/behaviour/test_vbench.py.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.evaluation.benchmarks.base import Run
from nasa_video.evaluation.benchmarks.vbench import environment, runner, scoring, weights
from nasa_video.evaluation.benchmarks.vbench.run import (
    PromptChoice,
    VBenchOutcome,
    VBenchRun,
    read_extended,
    results_of,
    select_prompts,
)
from nasa_video.evaluation.benchmarks.vbench.scoring import score_videos
from nasa_video.evaluation.results import Arm
from nasa_video.evaluation.samples import Planned, Sample, VideoModel, methods_of
from nasa_video.files.atomic import file_sha256
from nasa_video.guidance.terms import Negative
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import GenerationJob, Record, Store
from nasa_video.video.request import VideoRequest

ENTRIES: list[dict[str, Any]] = [
    {"prompt_en": "a star", "dimension": ["temporal_flickering"]},
    {
        "prompt_en": "a ring",
        "dimension": ["temporal_flickering", "color"],
        "auxiliary_info": {"color": {"color": "red"}},
    },
    {"prompt_en": "a star", "dimension": ["human_action"]},
    {"prompt_en": "a disc", "dimension": ["scene"]},
]

PYTHON = """#!{python} -I
import runpy, sys
sys.path.insert(0, {modules!r})
arguments = [a for a in sys.argv[1:] if a != "-I"]
if arguments[0] == "-c":
    exec(arguments[1])
else:
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""

# Scores a video by the size of its file; each dimension but the first breaks in a way of its own.
FAKE_VBENCH = """
import json, os, pathlib, sys
print("noise on standard output")
assert os.environ["HF_HUB_OFFLINE"] == "1" and "RANK" not in os.environ

class VBench:
    def __init__(self, device, full_info, output):
        self.output = pathlib.Path(output)
        self.output.mkdir(exist_ok=True)

    def evaluate(self, videos_path, name, dimension_list, local, read_frame, mode, **options):
        dimension, = dimension_list
        with open(pathlib.Path(__file__).parent / "log", "a") as log:
            log.write(dimension + "\\n")
        os.write(1, b"noise below Python\\n")
        entries = json.loads(pathlib.Path(self.build_full_info_json(videos_path, name, dimension_list)).read_text())
        files = [file for entry in entries for file in entry["video_list"]]
        if dimension == "scene":
            raise RuntimeError("the judge is broken")
        if dimension == "human_action":
            sys.stderr.write("out of memory\\n")
            sys.stderr.flush()
            os._exit(9)
        if dimension == "color":
            files = files[1:]
            assert all("auxiliary_info" in entry for entry in entries)
        percent = 100 if dimension == "imaging_quality" else 1
        rows = [{"video_path": f, "video_results": percent / os.path.getsize(f)} for f in files]
        result = {dimension: [0.5, rows]}
        (self.output / (name + "_eval_results.json")).write_text(json.dumps(result))
"""
FAKE_LONG = """
import pathlib, shutil
from vbench import VBench

class VBenchLong(VBench):
    def preprocess(self, videos_path, mode, **options):
        clips = pathlib.Path(videos_path) / "split_clip"
        assert not clips.exists(), "stale clips would be taken for granted"
        for video in list(pathlib.Path(videos_path).glob("*.mp4")):
            (clips / video.stem).mkdir(parents=True)
            for suffix in ("000", "001"):
                shutil.copy(video, clips / video.stem / (video.stem + "_" + suffix + ".mp4"))
"""


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment with the stand-in."""
    modules = tmp_path / "modules"
    for package in ("vbench", "vbench2_beta_long", "torch", "torchvision"):
        (modules / package).mkdir(parents=True)
        (modules / package / "__init__.py").write_text("")
    (modules / "vbench" / "__init__.py").write_text(FAKE_VBENCH)
    (modules / "vbench" / "VBench_full_info.json").write_text(json.dumps(ENTRIES))
    (modules / "vbench2_beta_long" / "__init__.py").write_text(FAKE_LONG)
    (modules / "torch" / "__init__.py").write_text("def device(name): return name")
    (modules / "torchvision" / "io.py").write_text("def write_video(): ...")
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(PYTHON.format(python=sys.executable, modules=str(modules)))
    python.chmod(0o755)
    return tmp_path / "venv"


def scored_dimensions(venv: Path) -> list[str]:
    log = venv.parent / "modules" / "vbench" / "log"
    return log.read_text().split() if log.exists() else []


@pytest.fixture
def new_records(tmp_path: Path) -> Callable[..., list[Record]]:
    """Makes records of files of 10, 20 … bytes for the prompts."""

    def new(*dimensions: str, count: int = 2) -> list[Record]:
        records = []
        for number in range(count):
            path = tmp_path / f"v{number}.mp4"
            path.write_bytes(bytes([number]) * 10 * (number + 1))
            job = GenerationJob(
                request=VideoRequest(prompt="a_ring/or so", seed=number), checkpoint="c",
                tags={"dimensions": list(dimensions), "auxiliary": {"color": {"color": "red"}}},
            )  # fmt: skip
            quality = {"luma": 100.0, "sharpness": 1.0, "flicker": 0.0}
            records.append(Record(job, {"quality": quality, "out_of_range": 0.0}, path, file_sha256(path)))
        return records

    return new


@pytest.fixture
def new_scoring(venv: Path, tmp_path: Path) -> Callable[..., scoring.Scoring]:
    """Makes a scoring by the stand-in; weights are there for all but those named."""

    def new(*dimensions: str, mode: scoring.Mode = "standard", without: str = "", batch: int = 32) -> scoring.Scoring:
        cache = tmp_path / "cache"
        for name in dimensions:
            for one in weights.dimensions()[name]:
                for place in one.places if name != without else ():
                    (cache / place).parent.mkdir(parents=True, exist_ok=True)
                    (cache / place).write_text("weights")
        return scoring.Scoring(environment.Environment(venv), mode, dimensions, "cpu", cache, batch)

    return new


@pytest.mark.parametrize("mode", ["standard", "long"])
def test_scores_are_regrouped_by_video_and_kept(
    mode: Any, tmp_path: Path, venv: Path, new_records: Any, new_scoring: Any
) -> None:
    records = new_records("temporal_flickering", "imaging_quality")
    judges = new_scoring("temporal_flickering", "imaging_quality", mode=mode)
    store = Store(tmp_path / "scores")
    told: list[float | None] = []
    scores = score_videos(records, judges, store, tell=lambda record, made: told.append(record.measured["score"]))
    for number, record in enumerate(records):
        expected = pytest.approx(1 / (10 * (number + 1)))
        found = scores.values[str(record.sha256), "a_ring/or so"]
        assert found == {"temporal_flickering": expected, "imaging_quality": expected}
    assert len(told) == 4
    assert scores.versions["numpy"]
    again = score_videos(records, judges, store)
    assert again.values == scores.values
    assert again.versions == scores.versions
    assert scored_dimensions(venv) == ["temporal_flickering", "imaging_quality"], "scored twice"


def test_a_video_that_changed_is_scored_again(tmp_path: Path, venv: Path, new_records: Any, new_scoring: Any) -> None:
    judges, store = new_scoring("temporal_flickering", mode="long"), Store(tmp_path / "scores")
    old = new_records("temporal_flickering", count=1)
    score_videos(old, judges, store)
    old[0].output.write_bytes(bytes(50))
    new = [Record(old[0].job, old[0].measured, old[0].output, file_sha256(old[0].output))]
    scores = score_videos(new, judges, store)
    assert scores.values[str(new[0].sha256), "a_ring/or so"] == {"temporal_flickering": pytest.approx(1 / 50)}
    assert not list((tmp_path / "scores").rglob("*.mp4")), "no clip outlives its scoring"


def test_missing_weights_skip_their_dimension_and_nothing_else(
    tmp_path: Path, venv: Path, new_records: Any, new_scoring: Any
) -> None:
    records = new_records("temporal_flickering", "imaging_quality")
    judges = new_scoring("temporal_flickering", "imaging_quality", without="imaging_quality")
    scores = score_videos(records, judges, Store(tmp_path / "scores"))
    assert "musiq_spaq_ckpt" in judges.skipped["imaging_quality"]
    assert "PolyForm-Noncommercial" in judges.skipped["imaging_quality"]
    assert scored_dimensions(venv) == ["temporal_flickering"]
    results = results_of(planned(records), scores, judges, tmp_path, {})
    assert [metric.name for metric in results.metrics if metric.name in weights.dimensions()] == ["temporal_flickering"]
    assert all("imaging_quality" not in item.values for item in results.items)
    assert any("imaging_quality was skipped" in note for note in results.notes)


def test_a_broken_judge_is_told_and_others_go_on(
    tmp_path: Path, venv: Path, new_records: Any, new_scoring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weights.dimensions(), "scene", ())
    judges = new_scoring("scene", "temporal_flickering", batch=1)
    records = new_records("scene", "temporal_flickering", count=3)
    scores = score_videos(records, judges, Store(tmp_path / "scores"))
    assert scores.failed == {"scene": "RuntimeError: the judge is broken"}
    assert all(set(values) == {"temporal_flickering"} for values in scores.values.values())
    assert len(scores.values) == 3
    assert scores.missing == 0
    assert scored_dimensions(venv).count("scene") == 1, "a broken judge is not asked for every batch"
    results = results_of(planned(records), scores, judges, tmp_path, {})
    assert any("the judge is broken" in note for note in results.notes)


def test_a_video_without_a_score_is_no_zero(
    tmp_path: Path, new_records: Any, new_scoring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weights.dimensions(), "color", ())
    judges, records = new_scoring("color"), new_records("color")
    scores = score_videos(records, judges, Store(tmp_path / "scores"))
    assert sorted(map(str, (values["color"] for values in scores.values.values()))) == ["0.05", "None"]
    results = results_of(planned(records), scores, judges, tmp_path, {})
    (score,) = [score for score in results.scores() if score.metric == "color"]
    assert (score.n, score.value) == (1, 0.05)
    assert "VBench gave no color for 1 videos" in results.notes


def test_a_process_that_dies_leaves_its_scores_and_its_last_words(
    tmp_path: Path, venv: Path, new_records: Any, new_scoring: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(weights.dimensions(), "human_action", ())
    records, store = new_records("temporal_flickering", "human_action"), Store(tmp_path / "scores")
    with pytest.raises(NasaVideoError, match=r"status 9 .*out of memory"):
        score_videos(records, new_scoring("temporal_flickering", "human_action"), store)
    scores = score_videos(records, new_scoring("temporal_flickering"), store)
    assert len(scores.values) == 2
    assert scored_dimensions(venv).count("temporal_flickering") == 1


def test_names_that_vbench_can_read(tmp_path: Path) -> None:
    source = tmp_path / "x.mp4"
    source.write_text("x")
    videos = [{"path": str(source), "prompt": "a_b/c, 2-3", "key": str(i)} for i in range(2)]
    names = runner._lay_out(videos, tmp_path / "videos")
    assert list(names) == ["a b c, 2-3-0", "a b c, 2-3-1"]
    assert {runner.video_of(f"{name}{end}.mp4") for name in names for end in ("", "_003", "_full")} == set(names)


def test_prompts_are_selected_merged_and_extended(tmp_path: Path) -> None:
    chosen = select_prompts(ENTRIES, ["temporal_flickering"])
    assert list(chosen) == ["a star", "a ring"]
    assert chosen["a star"]["dimensions"] == ["human_action", "temporal_flickering"], "listed twice, one prompt"
    assert chosen["a ring"]["auxiliary"] == {"color": {"color": "red"}}
    many = [{"prompt_en": str(i), "dimension": ["scene"]} for i in range(10)]
    assert list(select_prompts(many, ["scene"], limit=3)) == ["0", "3", "6"]
    assert list(select_prompts(many, ["scene"], limit=99)) == [str(i) for i in range(10)]
    with pytest.raises(InputError, match="no prompt for color"):
        select_prompts(many, ["color"])
    with pytest.raises(InputError, match="1 prompts have no extended one, such as 'a ring'"):
        select_prompts(ENTRIES, ["temporal_flickering"], extended={"a star": "a long star"})

    base, long = tmp_path / "base.txt", tmp_path / "long.txt"
    base.write_text("a star\na ring\n")
    long.write_text("a bright star\n\na red ring\n")
    assert read_extended(long, base) == {"a star": "a bright star", "a ring": "a red ring"}
    with pytest.raises(InputError, match="extended-base"):
        read_extended(long, None)
    long.write_text("a bright star\n")
    with pytest.raises(InputError, match=r"2 prompts and .* 1"):
        read_extended(long, base)
    (tmp_path / "e.json").write_text('{"a star": "a bright star"}')
    assert read_extended(tmp_path / "e.json", None) == {"a star": "a bright star"}
    (tmp_path / "e.json").write_text("[1")
    with pytest.raises(InputError, match="cannot be read"):
        read_extended(tmp_path / "e.json", None)


def test_every_dimension_says_what_it_needs() -> None:
    assert set(weights.dimensions()) == set(runner.DIMENSIONS)
    assert len(weights.dimensions()) == 16
    assert weights.dimensions()["temporal_flickering"] == ()
    for needed in weights.dimensions().values():
        for one in needed:
            assert one.bytes > 0
            assert one.licence
            assert one.url.startswith("https://")
    with pytest.raises(InputError, match="no VBench dimension sharpness; choose among subject_consistency"):
        weights.check_dimensions(["sharpness"])
    assert len(weights.check_dimensions(["all"])) == 16


def test_downloads_are_checked_and_whole(tmp_path: Path) -> None:
    import hashlib
    import zipfile

    content = b"weights" * 99
    (tmp_path / "w.pth").write_bytes(content)
    good = hashlib.sha256(content).hexdigest()
    url = (tmp_path / "w.pth").as_uri()
    cache, said = tmp_path / "cache", list[str]()
    file = weights.Weights("d/w.pth", 1, url, "MIT", good[:8], also=("torch/w.pth",))
    weights.download([file, file], cache, said.append)
    assert (cache / "d/w.pth").read_bytes() == (cache / "torch/w.pth").read_bytes() == content
    assert said == [f"downloading d/w.pth (1 B, MIT) from {url}"]
    wrong = weights.Weights("d/x.pth", 1, url, "MIT", "0" * 64)
    with pytest.raises(InputError, match="another file"):
        weights.download([wrong], cache, said.append)
    absent = weights.Weights("d/y.pth", 1, (tmp_path / "none").as_uri(), "MIT")
    with pytest.raises(InputError, match="put it at"):
        weights.download([absent], cache, said.append)
    assert sorted(path.name for path in (cache / "d").iterdir()) == ["w.pth"]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("models/raft.pth", "r")
        archive.writestr("__MACOSX/junk", "")
    zipped = weights.Weights("raft/models", 1, (tmp_path / "a.zip").as_uri(), "BSD", kind="zip", member="raft.pth")
    assert not zipped.present(cache)
    weights.download([zipped], cache, said.append)
    assert zipped.present(cache)


def test_the_environment_is_asked_for_with_the_way_out(tmp_path: Path, venv: Path) -> None:
    with pytest.raises(InputError, match="nasa-video eval setup vbench"):
        environment.Environment(tmp_path / "none")
    assert [entry["prompt_en"] for entry in environment.Environment(venv).prompts()][:2] == ["a star", "a ring"]
    (venv.parent / "modules" / "vbench" / "__init__.py").unlink()
    (venv.parent / "modules" / "vbench" / "VBench_full_info.json").unlink()
    (venv.parent / "modules" / "vbench").rename(venv.parent / "gone")
    with pytest.raises(InputError, match="has no vbench"):
        environment.Environment(venv)
    with pytest.raises(NasaVideoError, match="exit status 3"):
        environment.install([[sys.executable, "-c", "raise SystemExit(3)"]], lambda line: None)
    steps = environment.install_steps(tmp_path, torch=("torch==2.13.0",), constraint=Path("c.txt"))
    assert all("--constraint" in step for step in steps[1:])
    assert {"vbench==0.1.5", "setuptools<81", "torch==2.13.0"} <= set(steps[-1])


def planned(records: list[Record]) -> list[tuple[Planned, Record]]:
    """Records with the samples that they are of, in one arm."""
    return [
        (Planned(Sample(f"#{number}", "a_ring/or so", (), number), Arm(label="none"), record.job), record)  # type: ignore[arg-type]
        for number, record in enumerate(records)
    ]


@pytest.fixture
def new_run(venv: Path, model_folder: Path, tmp_path: Path) -> Callable[..., VBenchRun]:
    """Plans runs of the tiny model, scored by the stand-in."""

    def new(output: str, shard: Shard = Shard()) -> VBenchRun:  # noqa: B008
        model = VideoModel(str(model_folder), "cpu", frames=9)
        judges = scoring.Scoring(
            environment.Environment(venv), "standard", ("temporal_flickering",), "cpu", tmp_path / "cache"
        )
        return VBenchRun(
            model, methods_of("none,nasa:0.5", model.preset), (Negative("red"),), judges, PromptChoice(), [0], [1],
            Run(tmp_path / output, shard),
        )  # fmt: skip

    return new


def _table(outcome: VBenchOutcome) -> list[tuple[str, str, dict[str, float]]]:
    assert outcome.results is not None
    return [(item.id, item.arm, dict(item.values)) for item in outcome.results.items]


def test_shards_kills_and_damage_give_the_table_of_the_single_run(
    new_run: Callable[..., VBenchRun], tmp_path: Path
) -> None:
    single = new_run("one").run()
    table = _table(single)
    assert [(row[0], row[1]) for row in table] == [
        (f"{prompt} #0", arm) for prompt in ("a star", "a ring") for arm in ("none", "nasa:0.5")
    ]
    assert all({"temporal_flickering", "luma"} <= row[2].keys() for row in table)
    assert table[0][2] != table[1][2], "the methods make different videos"

    first = new_run("two", shard=Shard(0, 2)).run()
    assert (first.results, first.videos.made, len(first.videos.missing)) == (None, 2, 2)
    second = new_run("two", shard=Shard(1, 2)).run()
    assert _table(second) == table

    def stop(record: Record, made: bool) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        new_run("three").run(lambda name: stop)
    run = new_run("three")
    run.videos.output(run.jobs[0]).write_bytes(b"cut")  # type: ignore[union-attr]
    third = run.run()
    assert (third.videos.found, third.videos.made, third.videos.remade) == (0, 4, 1)
    assert _table(third) == table
    assert single.results is not None
    settings = single.results.settings
    assert settings["seeds"] == [0]
    assert len(str(settings["checkpoint_sha256"])) == 64
    assert settings["prompt_list"] == "VBench unknown"


def test_what_setup_would_do_is_said_before_it_is_done(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nasa_video.cli.app import app

    where = ["--venv", str(tmp_path / "v"), "--cache", str(tmp_path / "c")]
    said = CliRunner().invoke(app, ["eval", "setup", "vbench", "--dry-run", "--weights", "all", *where])
    assert said.exit_code == 0, said.output
    for word in ("vbench==0.1.5", "4.48 GB", "PolyForm-Noncommercial", "temporal_flickering: needs none", "MISSING"):
        assert word in said.output
    assert not (tmp_path / "v").exists()
    refused = CliRunner().invoke(app, ["eval", "vbench", "-o", str(tmp_path / "o"), *where])
    assert isinstance(refused.exception, InputError)
    assert "--neg" in str(refused.exception)
    assert not (tmp_path / "o").exists()
