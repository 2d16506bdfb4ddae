"""``nasa-video batch``: many videos from a list, shared out over processes and machines."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml
from pydantic import Field, ValidationError

from nasa_video.cli.console import chunk_progress, emit_json, say, shown_warnings
from nasa_video.cli.option_groups import LoadOptions, grouped
from nasa_video.cli.options import AsJsonOption
from nasa_video.errors import InputError
from nasa_video.files.atomic import slug
from nasa_video.models.presets import Strict

if TYPE_CHECKING:
    from nasa_video.cli.generation import Request


class BatchJob(Strict):
    """One video of the list; what is left out is the model's own."""

    prompt: str
    negatives: tuple[str, ...] = ()
    guidance: str | None = None
    scale: float | None = None
    seed: int = 0
    frames: int | None = None
    steps: int | None = None
    first_steps: int | None = None
    width: int | None = None
    height: int | None = None
    name: str | None = Field(default=None, pattern=r"^[\w][\w.-]*$")


@grouped
def batch(
    jobs: Annotated[Path, typer.Argument(help="YAML or JSON list, or JSON lines: prompt, negatives, seed, name …")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for the videos.")],
    load: LoadOptions,
    shard: Annotated[
        str | None, typer.Option(help="i/n: this process's share.", show_default="of torchrun or Slurm, else all")
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Make every video of JOBS that is not in the folder yet. Under torchrun each process takes its share and GPU."""
    from nasa_video.cli.generation import Request
    from nasa_video.jobs.processes import Processes, Shard

    own = Shard.choose(shard).of(named_jobs(jobs))
    shared = Request(**load.asked | {"device": Processes.of_environment().device(load.device)})
    with shown_warnings():
        result = run_batch(own, output, shared, say)
    if as_json:
        emit_json(result)
    if result["failed"]:
        raise typer.Exit(1)


def named_jobs(path: Path) -> list[tuple[str, BatchJob]]:
    """The jobs of a file, each with the name of its video.

    Raises:
        InputError: the file cannot be read, is no list, has an unknown key, or gives a name twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        rows = [yaml.safe_load(line) for line in text.splitlines() if line.strip()] if lines else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a list of jobs: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of jobs, such as: - {{prompt: a red ball, negatives: [blurry]}}")
    named: dict[str, BatchJob] = {}
    for number, row in enumerate(rows):
        try:
            job = BatchJob.model_validate(row)
        except ValidationError as error:
            reasons = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise InputError(f"{path}, job {number}: {reasons}") from error
        name = job.name or f"{number:04}-{slug(job.prompt)}"
        if name in named:
            raise InputError(f"{path} gives the name {name!r} twice")
        named[name] = job
    return list(named.items())


def run_batch(
    jobs: list[tuple[str, BatchJob]],
    folder: Path,
    shared: Request,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Make what is missing, as ``shared`` says; a job that cannot be made is told of, and the next is begun."""
    from nasa_video.cli.console import is_user_error
    from nasa_video.cli.generation import run
    from nasa_video.video.pipeline import VideoPipeline

    loaded: dict[str, VideoPipeline] = {}

    def load(*given: Any, **settings: Any) -> VideoPipeline:
        # The model stays between the videos, as long as what it is loaded with stays the same.
        key = repr((given, sorted(settings.items())))
        if key not in loaded:
            loaded.clear()
            loaded[key] = VideoPipeline.from_pretrained(*given, **settings)
        return loaded[key]

    folder.mkdir(parents=True, exist_ok=True)
    made: list[dict[str, Any]] = []
    found = 0
    failed: dict[str, str] = {}
    for name, job in jobs:
        path = folder / f"{name}.mp4"
        if path.exists():
            found += 1
            continue
        request = dataclasses.replace(shared, **job.model_dump(exclude={"name"}))
        try:
            made.append(run(request, str(path), chunk_progress, tell, load=load))
        except Exception as error:
            if not is_user_error(error):
                raise
            failed[name] = str(error)
            tell(f"{name}: {error}")
    return {"made": made, "found": found, "failed": failed}
