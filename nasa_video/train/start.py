"""From a config to a game that can be run: texts, networks, and what is encoded beforehand."""

from __future__ import annotations

from pathlib import Path

from nasa_video.errors import InputError
from nasa_video.train.fleet import Fleet
from nasa_video.train.lists import make_texts, read_texts, write_texts
from nasa_video.train.run import Game
from nasa_video.train.settings import ImageSettings, Settings


def start_game(settings: Settings, fleet: Fleet, folder: Path) -> Game:
    """Read the lists and the networks; the lists are kept in the run's folder, so that it can be made again.

    Raises:
        InputError: something that the config names is not here or does not fit.
    """
    from nasa_video.train.video_parts import encode_beforehand

    still = isinstance(settings, ImageSettings)
    prompts = make_texts(settings.prompts, negatives=False)
    negatives = make_texts(settings.negatives.texts, negatives=True, still=still)
    _keep(folder, {"prompts": prompts, "negatives": negatives}, fleet)
    texts = [*dict.fromkeys([*prompts, *negatives, ""])]
    if isinstance(settings, ImageSettings):
        from nasa_video.train.image import ImageGame
        from nasa_video.train.image_parts import load_image_parts

        image_parts = load_image_parts(settings, fleet.device)
        encode_beforehand(image_parts.encoder, texts, fleet)
        return ImageGame(settings, image_parts, prompts, negatives, fleet)
    from nasa_video.train.video import VideoGame
    from nasa_video.train.video_parts import load_video_parts

    video_parts = load_video_parts(settings, fleet.device)
    encode_beforehand(video_parts.encoder, texts, fleet)
    return VideoGame(settings, video_parts, prompts, negatives, fleet)


def _keep(folder: Path, lists: dict[str, list[str]], fleet: Fleet) -> None:
    """Write a run's lists beside it; a run that goes on must go on with its own."""
    for name, texts in lists.items():
        path = folder / f"{name}.txt"
        going_on = (folder / "checkpoint.pt").exists() and path.exists()
        if going_on and read_texts(path) != texts:
            raise InputError(f"the {name} are no longer those of the run in {folder}; choose another folder")
    fleet.wait()
    if fleet.leads:
        for name, texts in lists.items():
            write_texts(folder / f"{name}.txt", texts)
