"""Stills as files, and the grid of a sweep."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_video_frames import make_clip

from nasa_video.errors import InputError, OutputError
from nasa_video.evaluation.metrics import read_stills
from nasa_video.files.images import read_image, save_image
from nasa_video.files.sheets import label_grid


def test_what_is_saved_is_read_and_says_how_it_was_made(tmp_path: Path) -> None:
    image = Image.fromarray(make_clip(1, 20, 30)[0])
    save_image(image, tmp_path / "a.png", {"prompt": "a ball"})
    assert np.array_equal(read_image(tmp_path / "a.png"), np.asarray(image))
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.info["comment"] == '{"prompt": "a ball"}'
    with pytest.raises(InputError, match=r"\.png"):
        save_image(image, tmp_path / "a.bmp", {})
    with pytest.raises(OutputError):
        save_image(image, tmp_path / "nowhere" / "a.png", {})
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_photograph_is_read_upright_by_every_door(tmp_path: Path) -> None:
    upright = np.zeros((8, 4, 3), np.uint8)
    upright[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side, to be turned by 90 degrees
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), upright)
    assert np.array_equal(read_stills(tmp_path / "a.png", None), upright[None])


def test_a_size_is_covered_and_cut_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((10, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png", (10, 10)), np.full((10, 10, 3), 255))
    assert read_image(tmp_path / "a.png", (40, 20)).shape == (40, 20, 3)


def test_what_is_no_image_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no image")
    for name in ("a.png", "none.png"):
        with pytest.raises(InputError, match=name):
            read_image(tmp_path / name)


def test_grid_keeps_every_image() -> None:
    colours = [["red", "green"], ["blue", "black"]]
    rows = [(f"seed {i}", [Image.new("RGB", (40, 30), colour) for colour in row]) for i, row in enumerate(colours)]
    grid = label_grid(rows, [["NASA 0", "NASA 0.5"]] * 2, "a long caption " * 20)
    assert grid.height > label_grid(rows, [["NASA 0", "NASA 0.5"]] * 2).height
    for colour in ((255, 0, 0), (0, 128, 0), (0, 0, 255)):
        assert sum(pixel == colour for pixel in grid.get_flattened_data()) >= 40 * 30
