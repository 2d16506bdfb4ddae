"""Side by side and contact sheets."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_video_frames import make_clip

from nasa_video import Nag, Negative
from nasa_video.errors import OutputError
from nasa_video.files.frames import frames_from_tensor
from nasa_video.files.sheets import (
    Excerpt,
    comparison_labels,
    contact_sheet,
    save_sheet,
    sheet_path,
    side_by_side,
)
from nasa_video.train.curves import save_sheet as save_clips


def test_side_by_side_keeps_every_pixel() -> None:
    left, right = make_clip(5, 64, 96), make_clip(5, 64, 96, first=9)
    both = side_by_side([left, right], ["unguided", "NASA"])
    frames, height, width, _ = both.shape
    assert frames == 5
    assert height % 2 == 0
    assert width % 2 == 0
    band = height - 64
    assert 10 < band < 32
    assert np.array_equal(both[:, band:, :96], left)
    assert np.array_equal(both[:, band:, -96:], right)


def test_labels_are_drawn_over_their_own_video() -> None:
    clip = make_clip(1, 64, 128)
    plain = side_by_side([clip, clip], ["", ""])
    labelled = side_by_side([clip, clip], ["", "NASA"])
    changed = np.argwhere((plain != labelled).any(axis=(0, 3)))
    assert len(changed) > 20
    assert changed[:, 0].max() < plain.shape[1] - 64
    assert changed[:, 1].min() > 128


@pytest.mark.parametrize("label", ["word " * 200_000, "x" * 10**6, "two\nlines", "赤い 🎈"])
def test_any_label_stays_in_its_band(label: str) -> None:
    clip = make_clip(1, 64, 64)
    both = side_by_side([clip, clip], [label, ""])
    assert both.shape == side_by_side([clip, clip], ["", ""]).shape
    assert np.array_equal(both[:, -64:, :64], clip)


def test_scale_enlarges_pictures_not_labels() -> None:
    clip = make_clip(2, 64, 64)
    big = side_by_side([clip, clip], ["a", "b"], scale=4)
    assert big.shape[2] == 2 * 256 + 2
    assert 256 < big.shape[1] < 256 + 40


def test_wrong_use() -> None:
    clip = make_clip(2)
    with pytest.raises(ValueError, match="one shape"):
        side_by_side([clip, clip[:1]], ["a", "b"])
    with pytest.raises(ValueError, match="one label"):
        side_by_side([clip, clip], ["a"])
    with pytest.raises(ValueError, match="rows and columns"):
        contact_sheet([])
    with pytest.raises(ValueError, match="one frame size"):
        contact_sheet([("a", clip), ("b", make_clip(2, 32, 32))])


@pytest.mark.parametrize(("num_frames", "columns"), [(30, 6), (1, 4), (3, 2)])
def test_contact_sheet_shows_evenly_spaced_frames(num_frames: int, columns: int) -> None:
    clip = make_clip(num_frames, 144, 144)
    sheet = np.asarray(contact_sheet([("unguided", clip), ("NASA, without blur", clip)], columns))
    expected = np.linspace(0, num_frames - 1, columns).round().astype(int)
    found = [
        [index for index, frame in enumerate(clip) if np.array_equal(sheet[top : top + 144, left : left + 144], frame)]
        for top, left in cells(sheet, columns)
    ]
    assert found == [[index] for index in expected] * 2


def cells(sheet: np.ndarray, columns: int) -> list[tuple[int, int]]:
    """Corners of the pictures: where the paper ends. Blue is 20 to 200 in the clip and 248 on paper."""
    dark = sheet[..., 2] < 240
    lefts = np.flatnonzero(np.diff((dark.mean(axis=0) > 0.5).astype(int), prepend=0) == 1)
    tops = np.flatnonzero(np.diff((dark.mean(axis=1) > 0.4).astype(int), prepend=0) == 1)
    assert len(lefts) == columns
    return [(int(top), int(left)) for top in tops for left in lefts]


def test_small_and_large_frames_get_a_size_to_look_at() -> None:
    assert contact_sheet([("small", make_clip(2, 16, 16))], 4).width > 4 * 144
    assert contact_sheet([("large", make_clip(2, 480, 832))], 4).width < 4 * 400
    assert contact_sheet([("x" * 10_000, make_clip(2))], 2).width < 600


def test_a_sheet_replaces_an_older_sheet_and_nothing_else(tmp_path: Path) -> None:
    output = str(tmp_path / "ball.mp4")
    sheet = contact_sheet([("a", make_clip(2))], 2)
    assert sheet_path(output) == tmp_path / "ball.png"
    save_sheet(sheet, sheet_path(output))
    assert sheet_path(output) == tmp_path / "ball.png", "ours may be written again"
    Image.new("RGB", (8, 8)).save(tmp_path / "ball.png")
    assert sheet_path(output) == tmp_path / "ball-sheet.png"
    (tmp_path / "ball-sheet.png").write_text("no picture")
    assert sheet_path(output) == tmp_path / "ball-sheet-2.png"
    assert sheet_path(f"{tmp_path}/v1.5/") == tmp_path / "v1.5.png"


def test_a_sheet_that_cannot_be_written_leaves_no_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OutputError, match=r"video is finished, but its contact sheet .*No space left"):
        save_sheet(contact_sheet([("a", make_clip(2))], 2), tmp_path / "ball.png")
    assert list(tmp_path.iterdir()) == []


def test_labels_name_the_method_that_guides() -> None:
    assert comparison_labels(Nag(4.0), [Negative("blue", 0.5)]) == ("without", "--neg blue:0.5, NAG 4")
    assert comparison_labels(Nag(4.0), [])[1] == "timeline, NAG 4"
    assert comparison_labels(None, [Negative("blue")])[1] == "the same, no negative given"


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000])
def test_an_excerpt_keeps_few_frames_of_any_length_with_their_numbers(length: int) -> None:
    excerpt = Excerpt(most=8)
    for start in range(0, length, 12):
        numbers = np.arange(start, min(start + 12, length)) % 251
        excerpt.add(np.broadcast_to(numbers[:, None, None, None], (len(numbers), 2, 2, 3)).astype(np.uint8))
    assert (length if length <= 8 else 4) <= len(excerpt.frames) <= 8
    assert [int(frame[0, 0, 0]) for frame in excerpt.frames] == [number % 251 for number in excerpt.numbers]
    assert excerpt.numbers[-1] + (excerpt.numbers.step or 1) >= length


def test_training_draws_the_same_sheets_of_its_clips(tmp_path: Path) -> None:
    """Also those of a model that broke."""
    clips = torch.stack([torch.zeros(9, 3, 16, 16), torch.full((9, 3, 16, 16), torch.nan)])
    save_clips(clips, ["a ball", "a star"], tmp_path / "sheets" / "a.png")
    with Image.open(tmp_path / "sheets" / "a.png") as sheet:
        rows = [("a ball", frames_from_tensor(clips[0])), ("a star", frames_from_tensor(clips[0]))]
        assert np.array_equal(np.asarray(sheet), np.asarray(contact_sheet(rows, 6)))
