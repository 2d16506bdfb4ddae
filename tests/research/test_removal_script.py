"""The script of the removal table: made in parts, kept in one file."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
import typer

from nasa_video import VideoPipeline

OPTIONS = {
    "n": 2, "choose_n": 1, "choose_attributes": "colour", "attributes": "colour",
    "cases": "conflict,unmentioned", "methods": "", "settings": "", "steps": "4",
    "opened": "1", "teacher_steps": 0, "also": "cfg:3", "processes": 1, "device": "cpu", "batch": 2,
    "compiled": False,
    "teacher_choose_attributes": "colour",
}  # fmt: skip


@pytest.fixture
def removal_script(request, monkeypatch):
    monkeypatch.syspath_prepend(str(request.config.rootpath / "research"))
    import make_removal_table

    return make_removal_table


def removal_row(asked, share):
    shares = dict.fromkeys(("removed", "held", "both"), share)
    intervals = {f"{name}_interval": [0.0, 1.0] for name in shares}
    method, _, scale = asked.label.partition(":")
    looks = {"out_of_range": 0.0, "sharpness": 1.0, "flicker": 1.0, "luma": 99.0, "device": "cpu"}
    row = {"method": method.partition("+")[0], "scale": float(scale) if scale else None}
    return {**asked.__dict__, **row, **shares, **intervals, **looks}


def test_a_removal_table_whose_settings_cannot_be_chosen_yet_is_not_written(tmp_path, removal_script, capsys):
    with pytest.raises(typer.Exit):
        removal_script.main(**OPTIONS, docs=tmp_path, seconds=0)
    assert "run again to go on" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_the_teacher_has_settings_of_its_own(tmp_path, removal_script):
    kept = removal_script._Kept(tmp_path / "removal.json")
    tried = {"sprites": removal_script.CANDIDATES, "sprites-teacher": removal_script.CANDIDATES_OF_TEACHER}
    for kind, attribute in removal_script._cases("colour"):
        for model, best, steps in (("sprites", "cfg:2", 4), ("sprites-teacher", "cfg:3", 1)):
            for label in (label for labels in tried[model].values() for label in labels):
                asked = removal_script._Asked(model, "choose", label, steps, None, kind, attribute, 1)
                kept.add(asked, removal_row(asked, 0.9 if label == best else 0.5))
    # nasa-centred is not in the teacher's list
    options = {"methods": "cfg,nasa-centred", "steps": "", "teacher_steps": 1}
    removal_script.main(**OPTIONS | options, docs=tmp_path)
    stored = json.loads((tmp_path / "removal.json").read_text())
    assert (stored["best"]["cfg"], stored["best_of_teacher"]["cfg"]) == ("cfg:2", "cfg:3")
    made = [row for row in stored["rows"] if row["split"] == "report"]
    assert [(row["model"], row["label"], row["steps"], row["first_steps"], row["case"]) for row in made] == [
        ("sprites", "cfg:2", 1, 4, "unmentioned"),
        ("sprites", "nasa-centred+conflict0+nolimit:1", 1, 4, "unmentioned"),
        ("sprites", "cfg:2", 1, 4, "conflict"),
        ("sprites", "nasa-centred+conflict0+nolimit:1", 1, 4, "conflict"),
        ("sprites-teacher", "cfg:3", 1, None, "unmentioned"),
        ("sprites-teacher", "cfg:3", 1, None, "conflict"),
    ]
    table = (tmp_path / "removal-table.md").read_text()
    assert "## How settings were chosen (4 steps" in table
    assert "## How the teacher's settings were chosen (1 steps" in table
    assert "| cfg:3 | 90.0 | 0.0 | 90.0 | 90.0 | yes |" in table

    # the student alone leaves the teacher's part as it is
    removal_script.main(**OPTIONS | {"steps": "", "opened": ""}, docs=tmp_path)
    assert (tmp_path / "removal-table.md").read_text() == table
    assert json.loads((tmp_path / "removal.json").read_text()) == stored


def test_a_removal_table_is_made_in_parts(tmp_path, removal_script, capsys):
    labels = [label for labels in removal_script.CANDIDATES.values() for label in labels]
    kept = removal_script._Kept(tmp_path / "removal.json")
    for kind, attribute in removal_script._cases("colour"):
        for label in labels:
            asked = removal_script._Asked("sprites", "choose", label, 4, None, kind, attribute, 1)
            kept.add(asked, removal_row(asked, 0.9 if label in ("nasa:0.75", "vsf:1") else 0.5))
    removal_script.main(**OPTIONS | {"methods": "none", "steps": ""}, docs=tmp_path)
    stored = json.loads((tmp_path / "removal.json").read_text())
    assert stored["best"]["nasa"] == "nasa:0.75"
    assert stored["best"]["vsf"] == "vsf:1"
    made = [row for row in stored["rows"] if row["split"] == "report"]
    assert [(row["label"], row["case"], row["steps"], row["first_steps"], row["n"]) for row in made] == [
        ("none", "unmentioned", 1, 4, 2),
        ("none", "conflict", 1, 4, 2),
    ]
    table = (tmp_path / "removal-table.md").read_text()
    assert "| none | 1, first 4 | conflict | colour | 2 |" in table
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"removal.png", "removal-choosing.png"}

    # what is there is not made again, and the time of a second run that is up leaves it as it was
    removal_script.main(**OPTIONS, docs=tmp_path, seconds=0)
    assert "not all cells are there" in capsys.readouterr().out
    assert json.loads((tmp_path / "removal.json").read_text())["rows"] == stored["rows"]
    (tmp_path / "removal.json").write_text(json.dumps(stored | {"everything": "other weights"}))
    assert not removal_script._Kept(tmp_path / "removal.json").rows("sprites", "choose", 1)


def test_methods_that_are_not_there_or_beside_settings_are_refused(tmp_path, removal_script):
    with pytest.raises(typer.BadParameter, match="give one of them"):
        removal_script.main(**OPTIONS | {"settings": "none", "methods": "nasa"}, docs=tmp_path)
    with pytest.raises(typer.BadParameter, match=r"some of none, cfg, .* got nasal"):
        removal_script.main(**OPTIONS | {"methods": "cfg,nasal"}, docs=tmp_path)
    assert not list(tmp_path.iterdir())


def test_settings_that_are_given_are_reported_without_choosing(tmp_path, removal_script):
    options = {"settings": "none,nasa:1", "cases": "conflict", "steps": "1", "opened": ""}
    removal_script.main(**OPTIONS | options, docs=tmp_path)
    rows = json.loads((tmp_path / "removal.json").read_text())["rows"]
    assert [(row["label"], row["split"]) for row in rows] == [("none", "report"), ("nasa:1", "report")]
    table = (tmp_path / "removal-table.md").read_text()
    assert "| nasa:1 | 1 | conflict | colour | 2 |" in table
    assert "chosen" not in table.partition("## Reported")[2].partition("\n")[2]
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"removal.png"}


def test_settings_that_are_not_all_tried_are_shown_and_none_is_chosen(tmp_path, removal_script):
    kept = removal_script._Kept(tmp_path / "removal.json")
    asked = removal_script._Asked("sprites", "choose", "nasa:1", 4, None, "conflict", "colour", 1)
    kept.add(asked, removal_row(asked, 0.5))
    removal_script.main(**OPTIONS | {"settings": "none"}, docs=tmp_path, seconds=0)
    table = (tmp_path / "removal-table.md").read_text()
    assert "## Cells to choose settings from, not all of them yet" in table
    assert "| nasa:1 | 0.0 | 0.0 | 50.0 | 50.0 |  |" in table
    assert json.loads((tmp_path / "removal.json").read_text())["best"] == {}
    assert not list((tmp_path / "images").iterdir())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_compiled_pipeline_computes_in_bfloat16_and_rows_say_so(monkeypatch, removal_script, compiled):
    made = {}
    loaded = SimpleNamespace(model=SimpleNamespace(static_cache=compiled))

    def from_pretrained(model, device, dtype, **rest):
        made.update(dtype=dtype, **rest)
        return loaded

    monkeypatch.setattr(VideoPipeline, "from_pretrained", from_pretrained)
    with torch._dynamo.config.patch(automatic_dynamic_shapes=True):
        assert removal_script._pipeline.__wrapped__("sprites", "cpu", compiled) is loaded
        assert torch._dynamo.config.automatic_dynamic_shapes != compiled
    assert not loaded.model.static_cache
    assert made["dtype"] == (torch.bfloat16 if compiled else None)
    assert made["compiled"] == ("on" if compiled else "off")
    assert made["placement"].half_decoder == compiled
    assert removal_script._Making("cpu", 2, 0.0, compiled).place == ("cpu, bfloat16" if compiled else "cpu")
