"""NASA-T's lists, its command, and a dry run of every shipped config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from nasa_video.cli.app import app
from nasa_video.errors import InputError
from nasa_video.models.presets import configs_dir
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.dry_run import dry_run, sizes
from nasa_video.train.lists import GROUPS, build_prompts, content_words, make_texts, negative_list, read_texts
from nasa_video.train.settings import FileList, SpritesList, load_settings, shipped_names

TRUE_MILLIONS = {
    "nasa-t-sd15": 860,
    "nasa-t-sd21": 866,
    "nasa-t-pixart": 611,
    "nasa-t-causvid": 1419,
    "nasa-t-self-forcing": 1419,
}


def test_the_grammar() -> None:
    made = negative_list(10_000, 1)
    assert len(set(made)) == len(made) == 10_000
    assert made == negative_list(10_000, 1) != negative_list(10_000, 2)
    counts = [text.count(",") + 1 for text in made]
    assert max(counts) == 8
    assert 3.2 < sum(counts) / len(counts) < 4.2
    assert 85 <= sum(len(terms) for terms in GROUPS.values()) <= 100
    assert len(GROUPS) == 8
    assert len({term for terms in GROUPS.values() for term in terms}) == sum(len(terms) for terms in GROUPS.values())
    for group, terms in GROUPS.items():
        assert any(term in text for term in terms for text in made), group
    with pytest.raises(InputError, match="no group"):
        negative_list(3, 0, ("colours",))
    with pytest.raises(InputError, match="none given"):
        negative_list(3, 0, ())


def test_lists_from_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text(
        "# a comment\n a  red ball \n\na red ball\n1234\nein süßer Hund\n" + "very " * 90 + "long\n", "utf-8"
    )
    assert read_texts(path)[:2] == ["a red ball", "1234"]
    built = build_prompts([path], 80, None, 3)
    assert sorted(built) == ["a red ball", "ein süßer Hund"]
    assert build_prompts([path], 80, 1, 3) == built[:1]
    path.write_text("\n# nothing\n")
    with pytest.raises(InputError, match="no text"):
        read_texts(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_texts(path)
    with pytest.raises(InputError, match="--prompts FILE"):
        make_texts(FileList(kind="file"), negatives=False)


def test_lists_of_the_sprites_world() -> None:
    prompts = make_texts(SpritesList(kind="sprites", count=300, seed=4), negatives=False)
    assert len(set(prompts)) == 300
    assert prompts == make_texts(SpritesList(kind="sprites", count=300, seed=4), negatives=False)
    negatives = make_texts(SpritesList(kind="sprites", count=150), negatives=True)
    assert {"red", "snow", "blurry", "dark background"} <= set(negatives)
    assert any("," in text for text in negatives)
    assert content_words("a dark background") == {"dark"}


@pytest.mark.parametrize("name", shipped_names())
def test_every_config_is_complete_and_of_the_true_size(name: str) -> None:
    settings = load_settings(Path(name))
    data = yaml.safe_load((configs_dir() / "train" / f"{name}.yaml").read_text())
    assert set(data) >= {"kind", "title", "negatives", "run", "prompts"}
    rows = sizes(settings)
    if name in TRUE_MILLIONS:
        assert round(rows[0]["parameters"] / 1e6) == TRUE_MILLIONS[name]
    assert all(0 < row["trained"] <= row["parameters"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("name", shipped_names())
def test_every_config_goes_a_step_in_small(name: str, tmp_path: Path) -> None:
    settings = load_settings(Path(name))
    # one process here; what sharding computes is the same (tests/fast/test_nasa_t_distributed.py)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"shard": False})})
    values = dry_run(settings, DistributedContext(precision=settings.run.precision, cpu=True), tmp_path)
    assert len(values) == 2
    assert values[1]["student gradient"] > 0
    assert values[1]["effect"] > 0
    assert (tmp_path / "model").is_dir()
    assert (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "curves.png").exists()


def test_the_command(tmp_path: Path) -> None:
    runner = CliRunner()
    target = tmp_path / "negatives.txt"
    done = runner.invoke(app, ["train", "negatives", str(target), "--count", "50", "--groups", "light,text"])
    assert done.exit_code == 0, done.output
    assert len(read_texts(target)) == 50
    done = runner.invoke(app, ["train", "prompts", str(target), "-o", str(tmp_path / "prompts.txt"), "--limit", "9"])
    assert done.exit_code == 0, done.output
    assert len(read_texts(tmp_path / "prompts.txt")) == 9
    missing = runner.invoke(app, ["train", "no-such-config"])
    assert isinstance(missing.exception, InputError)
    assert "nasa-t-sprites" in str(missing.exception)
    assert "run" in runner.invoke(app, ["train", "--help"]).output


def test_the_command_dry_runs_a_config(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    text = (configs_dir() / "train" / "nasa-t-sprites.yaml").read_text()
    path.write_text(text)
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run", "--cpu", "--json"])
    assert done.exit_code == 0, done.output
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["values"][-1]["direction"] > 0
    path.write_text(text.replace("step_counts", "step_count"))
    done = CliRunner().invoke(app, ["train", str(path), "--dry-run"])
    assert "step_count" in str(done.exception)
