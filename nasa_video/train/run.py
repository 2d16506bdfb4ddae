"""One training run: from a config to its networks, through its iterations to a model, resumable at each checkpoint."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nasa_video.errors import InputError
from nasa_video.text import TextEncoder
from nasa_video.text.embedding_cache import CachedEncoder
from nasa_video.train.curves import Curves
from nasa_video.train.distillation import Distillation
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.lists import make_texts, read_texts, write_texts
from nasa_video.train.settings import ImageSettings, Settings
from nasa_video.train.state import load_state, save_state

Report = Callable[[int, int, dict[str, float]], None]
"""Called with (step, steps in all, values) for a progress display."""
# What may change when a run is resumed: none of it has a part in the numbers of an iteration (of accumulate and the
# number of processes only the product has).
FREE_TO_CHANGE = (
    "iterations", "checkpoint_every", "sheet_every", "sheet_samples", "draw_every", "text_cache", "accumulate", "shard",
)  # fmt: skip


def new_trainer(settings: Settings, context: DistributedContext, folder: Path) -> Distillation:
    """Read the lists and the networks; the lists are kept in the run's folder, so that it can be made again.

    Raises:
        InputError: something that the config names is not here or does not fit.
    """
    prompts = make_texts(settings.prompts, negatives=False)
    still = isinstance(settings, ImageSettings)
    negatives = make_texts(settings.negatives.texts, negatives=True, still=still)
    _keep_lists(folder, {"prompts": prompts, "negatives": negatives}, context)
    texts = [*dict.fromkeys([*prompts, *negatives, ""])]
    if isinstance(settings, ImageSettings):
        from nasa_video.train.image import ImageTrainer
        from nasa_video.train.image_networks import load_image_parts

        image_parts = load_image_parts(settings, context.device)
        encode_beforehand(image_parts.encoder, texts, context)
        return ImageTrainer(settings, image_parts, prompts, negatives, context)
    from nasa_video.train.video import VideoTrainer, load_video_parts

    video_parts = load_video_parts(settings, context.device)
    encode_beforehand(video_parts.encoder, texts, context)
    return VideoTrainer(settings, video_parts, prompts, negatives, context)


def _keep_lists(folder: Path, lists: dict[str, list[str]], context: DistributedContext) -> None:
    """Write a run's lists beside it; a run that is resumed must have its own."""
    for name, texts in lists.items():
        path = folder / f"{name}.txt"
        resumed = (folder / "checkpoint.pt").exists() and path.exists()
        if resumed and read_texts(path) != texts:
            raise InputError(f"the {name} are no longer those of the run in {folder}; choose another folder")
    context.wait()
    if context.leads:
        for name, texts in lists.items():
            write_texts(folder / f"{name}.txt", texts)


def encode_beforehand(encoder: TextEncoder, texts: Sequence[str], context: DistributedContext) -> None:
    """Put every text's embedding on disk, each process its share, so that training never loads the text encoder."""
    if not isinstance(encoder, CachedEncoder) or encoder.keep_loaded:
        return
    encoder.keep_loaded = True
    own = texts[context.rank :: context.size]
    for start in range(0, len(own), 64):
        encoder(own[start : start + 64])
    encoder.keep_loaded = False
    encoder._encoder = None
    context.wait()


def train(trainer: Distillation, folder: Path, report: Report | None = None) -> Path:
    """Run, or resume where the last run in this folder stopped; returns the model's folder.

    A resumed run is the uninterrupted one: whatever an iteration draws follows from the seed and the step, and all else
    that changes is in the checkpoint.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    run, context = trainer.settings.run, trainer.context
    start = resume(trainer, folder / "checkpoint.pt")
    if start > run.iterations:
        raise InputError(f"{folder} holds {start} iterations and {run.iterations} are asked for; raise run.iterations")
    context.wait()
    curves = Curves(folder, start, run.draw_every) if context.leads else None
    for step in range(start + 1, run.iterations + 1):
        last = step == run.iterations
        values = context.mean(trainer.iterate(step))
        if curves is not None:
            curves.record(step, values, last)
        if report is not None and context.leads:
            report(step, run.iterations, values)
        if step % run.checkpoint_every == 0 or last:
            save(trainer, folder / "checkpoint.pt", step)
        if run.sheet_samples and (step % run.sheet_every == 0 or last):
            path = folder / "sheets" / f"{step:06d}.png"
            trainer.sheet(path)
            if curves is not None and path.exists():
                curves.show_sheet(path, step)
    if curves is not None:
        curves.close()
    trainer.export(folder / "model")
    context.wait()
    return folder / "model"


def save(trainer: Distillation, path: Path, step: int) -> None:
    """Write everything that goes on changing, whole or not at all; every process has to call this."""
    context, settings = trainer.context, trainer.settings
    states = {name: state.state_dict() for name, state in trainer.states.items()}
    if context.leads:
        passes = settings.run.accumulate * context.size
        plain = settings.model_dump(mode="json")
        save_state(path, {"step": step, "passes": passes, "settings": plain, "states": states})
    context.wait()


def resume(trainer: Distillation, path: Path) -> int:
    """Take over a checkpoint where there is one; returns the iterations done.

    Other processes may resume it, sharded or not, as long as an update is summed over as many passes.

    Raises:
        InputError: it was made with other settings, which are named, or more or fewer passes; or it is broken.
    """
    try:
        saved = load_state(path)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is broken ({reason}); remove it to start again, or choose another folder") from error
    if saved is None:
        return 0
    settings = trainer.settings
    changed = differences(saved["settings"], settings.model_dump(mode="json"))
    if changed:
        raise InputError(
            f"{path.parent} holds a run of other settings ({', '.join(changed)}); choose another folder, or put the "
            "settings back"
        )
    passes = settings.run.accumulate * trainer.context.size
    if saved["passes"] != passes:
        raise InputError(
            f"{path.parent} holds a run of {saved['passes']} passes an update (processes times run.accumulate), and "
            f"this would be {passes}; change one of them so that the product is {saved['passes']}"
        )
    if "states" not in saved:
        raise InputError(f"{path} was written by an older version; resume it with that, or choose another folder")
    for name, state in trainer.states.items():
        state.load_state_dict(saved["states"][name])
    return int(saved["step"])


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Names of the settings that differ, but for those that may change when a run is resumed."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if not (place == "run." and name in FREE_TO_CHANGE)]
        return [row for name in names for row in differences(before.get(name), now.get(name), f"{place}{name}.")]
    same = list(before) == list(now) if isinstance(before, list | tuple) and isinstance(now, list | tuple) else None
    return [] if same or (same is None and before == now) else [place.removesuffix(".")]
