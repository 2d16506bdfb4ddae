"""One training run: resumes, iterates, writes curves, contact sheets, checkpoints and, at the end, the model."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nasa_video.errors import InputError
from nasa_video.train.checkpoint import load_state, save_state
from nasa_video.train.curves import Curves
from nasa_video.train.fleet import Fleet
from nasa_video.train.player import Player
from nasa_video.train.settings import Settings

Report = Callable[[int, int, dict[str, float]], None]
# What may change when a run goes on: none of it has a part in the numbers of an iteration (of accumulate and the number
# of processes only the product has).
FREE_TO_CHANGE = (
    "iterations", "checkpoint_every", "sheet_every", "sheet_samples", "draw_every", "text_cache", "accumulate", "shard",
)  # fmt: skip


class Game(Protocol):
    """A kind of training. Every process of a fleet calls each method."""

    @property
    def players(self) -> Mapping[str, Player]:
        """The networks that are trained."""
        ...

    def iterate(self, step: int) -> dict[str, float]:
        """One iteration, which follows from the step and the players' state alone; returns values for the curves."""
        ...

    def sheet(self, path: Path) -> None:
        """Write a contact sheet of the averaged student."""
        ...

    def export(self, folder: Path) -> None:
        """Write the averaged student as a model."""
        ...


def train(settings: Settings, game: Game, folder: Path, fleet: Fleet, report: Report | None = None) -> Path:
    """Run, or go on where the last run in this folder stopped; returns the model's folder.

    A resumed run is the uninterrupted one: whatever an iteration draws follows from the seed and the step, and all else
    that changes is in the checkpoint.

    Raises:
        InputError: the folder holds a run of other settings.
    """
    run = settings.run
    start = resume(settings, game, folder / "checkpoint.pt", fleet)
    if start > run.iterations:
        raise InputError(f"{folder} holds {start} iterations and {run.iterations} are asked for; raise run.iterations")
    fleet.wait()
    curves = Curves(folder, start, run.draw_every) if fleet.leads else None
    for step in range(start + 1, run.iterations + 1):
        last = step == run.iterations
        values = fleet.mean(game.iterate(step))
        if curves is not None:
            curves.record(step, values, last)
        if report is not None and fleet.leads:
            report(step, run.iterations, values)
        if step % run.checkpoint_every == 0 or last:
            save(settings, game, folder / "checkpoint.pt", step, fleet)
        if run.sheet_samples and (step % run.sheet_every == 0 or last):
            _show(game, folder / "sheets" / f"{step:06d}.png", step, curves)
    if curves is not None:
        curves.close()
    game.export(folder / "model")
    fleet.wait()
    return folder / "model"


def _show(game: Game, path: Path, step: int, curves: Curves | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    game.sheet(path)
    if curves is not None and path.exists():
        curves.picture(path, step)


def save(settings: Settings, game: Game, path: Path, step: int, fleet: Fleet) -> None:
    """Write everything that goes on changing, whole or not at all; every process has to call this."""
    state = {name: player.state_dict() for name, player in game.players.items()}
    if fleet.leads:
        passes = settings.run.accumulate * fleet.size
        plain = settings.model_dump(mode="json")
        save_state(path, {"step": step, "passes": passes, "settings": plain, "players": state})
    fleet.wait()


def resume(settings: Settings, game: Game, path: Path, fleet: Fleet) -> int:
    """Take over a checkpoint where there is one; returns the iterations done.

    Other processes may go on, sharded or not, as long as an update is summed over as many passes.

    Raises:
        InputError: it was made with other settings, which are named, or more or fewer passes; or it is broken.
    """
    try:
        state = load_state(path)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path} is broken ({reason}); remove it to start anew, or choose another folder") from error
    if state is None:
        return 0
    changed = differences(state["settings"], settings.model_dump(mode="json"))
    if changed:
        raise InputError(
            f"{path.parent} holds a run of other settings ({', '.join(changed)}); choose another folder, or put the "
            "settings back"
        )
    passes = settings.run.accumulate * fleet.size
    if state["passes"] != passes:
        raise InputError(
            f"{path.parent} holds a run of {state['passes']} passes an update (processes times run.accumulate), and "
            f"this would be {passes}; change one of them so that the product is {state['passes']}"
        )
    for name, player in game.players.items():
        player.load_state_dict(state["players"][name])
    return int(state["step"])


def differences(before: Any, now: Any, place: str = "") -> list[str]:
    """Names of the settings that differ, but for those that may change when a run goes on."""
    if isinstance(before, dict) and isinstance(now, dict):
        names = [name for name in {**before, **now} if not (place == "run." and name in FREE_TO_CHANGE)]
        return [row for name in names for row in differences(before.get(name), now.get(name), f"{place}{name}.")]
    same = list(before) == list(now) if isinstance(before, list | tuple) and isinstance(now, list | tuple) else None
    return [] if same or (same is None and before == now) else [place.removesuffix(".")]
