"""Intervals, results, comparisons, and the report as a text and as a page."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nasa_video.errors import InputError
from nasa_video.evaluation.plots import forest, overview, sweep, trade
from nasa_video.evaluation.report import html, markdown, picks, write_report
from nasa_video.evaluation.results import Arm, Item, Metric, Results, compare_runs, different_settings
from nasa_video.evaluation.statistics import bootstrap_mean, paired_shares

SHARE = Metric(name="removed", title="removed", kind="share")
MEAN = Metric(name="sharpness", title="sharpness")
LOW = Metric(name="flicker", title="flicker", better="lower")
ARMS = (Arm(label="none"), Arm(label="nasa:0.5", method="nasa", scale=0.5), Arm(label="nasa:1", method="nasa", scale=1))


def results(n: int = 40, folder: Path | None = None, **changes: Any) -> Results:
    """Three arms; NASA removes more the stronger it is, and sharpness grows by its scale in every pair."""
    rng = np.random.default_rng(0)
    base = rng.normal(1, 0.3, n)
    items = []
    for arm in ARMS:
        for i in range(n):
            media = None
            if folder is not None and i < 8:
                media = f"{arm.label.replace(':', '_')}-{i}.png"
                Image.new("RGB", (32, 24), (i * 20, 80, 200)).save(folder / media)
            values = {
                "removed": float(i % 4 < {"none": 1, "nasa:0.5": 2, "nasa:1": 4}[arm.label]),
                "sharpness": float(base[i] + (arm.scale or 0) + 0.01 * (i % 3)),
                "flicker": 1.0,
            }
            items.append(
                Item(id=f"p{i}/0", arm=arm.label, prompt=f"prompt <{i}> & more", seed=i, negative="red",
                     group=("a", "b")[i % 2], values=values, media=media)
            )  # fmt: skip
    fields: dict[str, Any] = {
        "kind": "removal", "title": "Removal on m", "arms": ARMS,
        "metrics": (SHARE, MEAN, LOW), "items": tuple(items), "notes": ("a <note>",),
        "settings": {"model": "m", "checkpoint_sha256": "ab" * 32, "seed": 0},
    }  # fmt: skip
    return Results(**fields | changes)


def test_paired_shares_match_the_published_example() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), 2635, table II: 36 both, 12 only the first, 2 only the second, 0.
    first, second = [True] * 48 + [False] * 2, [True] * 36 + [False] * 12 + [True] * 2
    low, high = paired_shares(second, first)
    assert (round(low, 4), round(high, 4)) == (0.0569, 0.3404)


def test_paired_shares_of_equal_and_of_opposite_answers() -> None:
    low, high = paired_shares([True] * 10 + [False] * 10, [True] * 10 + [False] * 10)
    assert low < 0 < high
    assert high == pytest.approx(-low)
    low, high = paired_shares([False] * 20, [True] * 20)
    assert low > 0.7
    assert high == 1
    with pytest.raises(ValueError, match="as many of both"):
        paired_shares([True], [])


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(200):
        interval = bootstrap_mean(rng.normal(3, 2, 60).tolist(), draws=400, seed=seed)
        assert interval is not None
        covered += interval[0] <= 3 <= interval[1]
    assert 0.88 <= covered / 200 <= 0.99


def test_values_of_one_prompt_count_as_one() -> None:
    values = [float(i // 5) for i in range(50)]
    alone, together = bootstrap_mean(values), bootstrap_mean(values, [i // 5 for i in range(50)])
    assert alone is not None
    assert together is not None
    assert together[1] - together[0] > 1.8 * (alone[1] - alone[0])
    assert bootstrap_mean([1.0, 2.0], ["p", "p"]) is None, "one prompt says nothing of others"
    assert bootstrap_mean(values) == alone, "the same table every time"
    with pytest.raises(ValueError, match="as many clusters"):
        bootstrap_mean([1.0], [])


def test_scores_and_differences() -> None:
    found = results()
    scores = {(s.arm, s.metric): s for s in found.scores()}
    assert scores["none", "removed"].value == 0.25
    assert scores["nasa:1", "removed"].value == 1
    low, high = scores["none", "sharpness"].interval or (0, 0)
    assert low < scores["none", "sharpness"].value < high
    changes = {(d.arm, d.metric): d for d in found.differences()}
    assert {arm for arm, _ in changes} == {"nasa:0.5", "nasa:1"}
    one = changes["nasa:1", "sharpness"]
    assert one.value == pytest.approx(1)
    # Every pair changed by the same, so the paired interval is a point although the samples spread widely.
    assert one.interval == pytest.approx((1, 1))
    assert (changes["nasa:1", "removed"].raised, changes["nasa:1", "removed"].lowered) == (30, 0)
    assert (changes["nasa:1", "flicker"].raised, changes["nasa:1", "flicker"].lowered) == (0, 0)


def test_each_step_count_has_its_own_unguided_arm() -> None:
    arms = [Arm(label=f"{m}, {s} steps", method=m, steps=s) for m in ("none", "nasa") for s in (4, 1)]
    items = [Item(id="0", arm=arm.label, prompt="p", seed=0, values={"removed": 1.0}) for arm in arms]
    found = results(arms=tuple(arms), items=tuple(items))
    pairs = {(one.arm, one.against) for one in found.differences()}
    assert pairs >= {("nasa, 4 steps", "none, 4 steps"), ("nasa, 1 steps", "none, 1 steps")}
    assert ("nasa, 4 steps", "none, 1 steps") not in pairs
    assert Arm(label="nasa+nopad:0.5, 4 steps").family == "nasa+nopad, 4 steps"
    assert Arm(label="A: nasa:1e-1").family == "A: nasa"


def test_results_are_read_back_as_written_and_refused_when_broken(tmp_path: Path) -> None:
    found = results()
    found.write(tmp_path)
    assert Results.read(tmp_path) == found == Results.read(tmp_path / "results.json")
    with pytest.raises(InputError, match="give the folder that an eval command wrote"):
        Results.read(tmp_path / "none")
    data = json.loads((tmp_path / "results.json").read_text())
    data["items"][0]["values"]["sharpness"] = float("inf")
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"items.0.values.sharpness: Input should be a finite number"):
        Results.read(tmp_path)
    data["items"][0]["values"]["sharpness"] = 1.0
    data["items"].append(data["items"][0])
    (tmp_path / "results.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"p0/0 is twice in none"):
        Results.read(tmp_path)


def test_compare_pairs_two_runs() -> None:
    first = results()
    better = tuple(
        item.model_copy(update={"values": {**item.values, "sharpness": item.values["sharpness"] + 0.2}})
        for item in first.items
        if item.id != "p3/0"
    )
    second = results(items=better, settings={"model": "m", "checkpoint_sha256": "cd" * 32, "seed": 0})
    both = compare_runs(first, second, None, [Path("/a"), Path("/b")])
    changes = {(d.against, d.arm): d for d in both.differences() if d.metric == "sharpness"}
    assert set(changes) == {(f"A: {arm.label}", f"B: {arm.label}") for arm in ARMS}
    assert changes["A: none", "B: none"].n == 39, "a sample that only one run has is left out"
    assert changes["A: none", "B: none"].value == pytest.approx(0.2)
    assert [name for name, _, _ in different_settings(first, second)] == ["checkpoint_sha256"]
    chosen = compare_runs(first, second, "none=nasa:1", [Path("/a"), Path("/b")])
    assert next((d.against, d.arm) for d in chosen.differences()) == ("A: none", "B: nasa:1")
    renamed = [arm.model_copy(update={"label": f"{arm.label},conflict=2" if arm.scale else arm.label}) for arm in ARMS]
    spelled = tuple(i.model_copy(update={"arm": f"{i.arm},conflict=2" if ":" in i.arm else i.arm}) for i in first.items)
    settings = compare_runs(
        first,
        results(arms=tuple(renamed), items=spelled),
        "none=none, nasa:1=nasa:1,conflict=2",
        [Path("/a"), Path("/b")],
    )
    assert [arm.label for arm in settings.arms][2:] == ["A: nasa:1", "B: nasa:1,conflict=2"]
    with pytest.raises(InputError, match="ARM_OF_A=ARM_OF_B"):
        compare_runs(first, second, "none=magic", [Path("/a"), Path("/b")])
    other = tuple(item.model_copy(update={"id": f"x{item.id}"}) for item in first.items)
    with pytest.raises(InputError, match="share no samples"):
        compare_runs(first, results(items=other), None, [Path("/a"), Path("/b")])
    with pytest.raises(InputError, match="different kinds"):
        compare_runs(first, results(kind="hpsv2"), None, [Path("/a"), Path("/b")])


def test_markdown_has_scores_differences_and_settings() -> None:
    text = markdown(results())
    assert "| **none** | 40 | 25.0 (14.2 to 40.2) |" in text
    assert "| nasa:1 | none | sharpness ↑ | 40 | +1.00 (+1.00 to +1.00) | 40 | 0 |" in text
    assert "### a" in text
    assert f"| checkpoint_sha256 | {'ab' * 32} |" in text


class Page(HTMLParser):
    """What a page refers to and holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else_and_hides_nothing(tmp_path: Path) -> None:
    found = results(folder=tmp_path)
    page, text = write_report(found, tmp_path)
    content = page.read_text()
    parsed = Page(content)
    assert not parsed.open
    assert "script" not in parsed.tags
    assert parsed.links
    assert all(link.startswith("data:image/webp;base64,") for link in parsed.links)
    assert not re.search(r"url\(|@import|https?://", content)
    assert "prefers-color-scheme: dark" in content
    assert "prompt &lt;0&gt; &amp; more" in content
    assert "prompt <0>" not in content
    assert "a &lt;note&gt;" in content
    for must in ("ab" * 32, "nasa:0.5", "Best and worst", "Differences, pair by pair", "14.2 to 40.2", "seed 3"):
        assert must in content, must
    assert text.read_text() == markdown(found)


def test_a_page_without_pictures_intervals_or_differences() -> None:
    one = Item(id="0", arm="none", prompt="p", seed=0, values={"removed": 1.0, "sharpness": 2.0})
    content = html(results(arms=(ARMS[0],), items=(one,)), Path("/nowhere"))
    assert "Differences" not in content
    assert "Best and worst" not in content
    gone = one.model_copy(update={"media": "gone.png"})
    assert "<img" not in html(results(arms=(ARMS[0],), items=(gone,)), Path("/nowhere"))


def test_picks_are_the_ends_of_the_ranking(tmp_path: Path) -> None:
    found = results(folder=tmp_path)
    best, worst = picks(found, ARMS[2], SHARE)
    assert [pick.change for pick in best] == [1, 1, 1, 1]
    assert [pick.change for pick in worst][:2] == [0, 0]
    assert not {p.item.id for p in best} & {p.item.id for p in worst}
    assert all(pick.other is not None and pick.other.arm == "none" for pick in best)
    best, _ = picks(found, ARMS[0], LOW)
    assert [pick.change for pick in best] == [None] * 4


def test_plots_show_every_arm_where_it_is() -> None:
    found = results()
    curve = sweep(found, SHARE)
    assert curve is not None
    flat, line, *_ = curve.axes[0].lines
    assert list(flat.get_ydata()) == [25, 25]
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0.5, 1], [50, 100])
    assert sweep(results(arms=ARMS[:2], items=tuple(i for i in found.items if i.arm != "nasa:1")), SHARE) is None
    rows = forest(found, MEAN)
    assert rows is not None
    assert [label.get_text() for label in rows.axes[0].get_yticklabels()] == [arm.label for arm in ARMS]
    points = trade(found, SHARE, MEAN)
    assert points is not None
    assert {text.get_text() for text in points.axes[0].texts} == {arm.label for arm in ARMS}


def test_plots_take_their_colours_from_the_page_and_refer_to_nothing_outside() -> None:
    drawn = overview(results(), (SHARE, MEAN))
    assert len(drawn) == 6, "two metrics in two groups, and two trade-offs"
    for svg in drawn:
        assert svg.startswith("<svg viewBox=")
        assert "var(--k1)" in svg
        assert "var(--soft)" in svg
        assert not re.search(r"#0000[01]|url\(|xmlns|<metadata", svg)


def test_a_few_pairs_are_not_sure() -> None:
    few = next(one for one in results(4).differences() if (one.arm, one.metric) == ("nasa:1", "sharpness"))
    assert few.interval is not None
    assert few.interval[0] > 0
    assert not few.sure, "an interval of four pairs says little"
    assert next(one for one in results(40).differences() if one.arm == "nasa:1" and one.metric == "sharpness").sure


def test_a_part_of_a_group_belongs_to_it() -> None:
    items = tuple(item.model_copy(update={"group": f"{item.group}/{item.seed % 4 // 2}"}) for item in results().items)
    found = results(items=items)
    assert (found.groups, found.parts) == (["a", "b"], ["a/0", "b/0", "a/1", "b/1"])
    assert len(found.of("none", "a")) == 20
    assert len(found.of("none", "a/1")) == 10
    text = markdown(found)
    assert "### a\n" in text
    assert "#### b/1\n" in text


def test_the_commands_report_and_compare(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from nasa_video.cli.evaluate import evaluate

    for name in "ab":
        (tmp_path / name).mkdir()
        results(folder=tmp_path / name).write(tmp_path / name)

    def run(*words: str) -> Any:
        outcome = CliRunner().invoke(evaluate, list(words))
        if outcome.exception is not None:
            raise outcome.exception
        return outcome

    run("report", str(tmp_path / "a"), "-o", str(tmp_path / "page.html"))
    assert (tmp_path / "page.html").read_text().count("<img") > 20
    assert (tmp_path / "page.md").is_file()
    said = run("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json", "-o", str(tmp_path / "both.html"))
    differences = json.loads(said.stdout.splitlines()[-1])["differences"]
    assert {(d["against"], d["arm"]) for d in differences} == {(f"A: {a.label}", f"B: {a.label}") for a in ARMS}
    assert all(d["value"] == 0 and d["pairs"] == 40 for d in differences)
    assert (tmp_path / "both.html").read_text().count("<img") > 20, "pictures of both folders"
    text = run("compare", str(tmp_path / "a"), str(tmp_path / "b"), "--arms", "none=nasa:1").stdout
    assert "| B: nasa:1 | A: none | removed, % ↑ | 40 | +75.0" in text
    with pytest.raises(InputError, match=r"must end in \.html"):
        run("report", str(tmp_path / "a"), "-o", str(tmp_path / "page.pdf"))
