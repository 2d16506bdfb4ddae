"""``nasa-video batch``: many videos from a list, shared out over processes and machines."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nasa_video.cli.console import chunk_progress, emit_json, loading_line, say, shown_warnings
from nasa_video.cli.options import OUTPUT, SPEED, AsJsonOption, ModelOptions, grouped, option, requested

if TYPE_CHECKING:
    from nasa_video.video.request import LoadOptions, VideoRequest


@grouped
def batch(
    jobs: Annotated[Path, typer.Argument(help="YAML or JSON list, or JSON lines: prompt, negatives, seed, name …")],
    output: Annotated[Path, option("Folder for the videos.", "-o", "--output", panel=OUTPUT)],
    model: ModelOptions,
    shard: Annotated[
        str | None, option("i/n: this process's share.", panel=SPEED, default="of torchrun or Slurm, else all")
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Make every video of JOBS that is not in the folder yet. Under torchrun each process takes its share and GPU."""
    from nasa_video.jobs.processes import Processes, Shard

    own = Shard.choose(shard).of(named_jobs(jobs))
    shared = requested(model.said)
    loading = model.loading(device=Processes.of_environment().device(model.device))
    with shown_warnings(), loading_line(shared.model):
        result = run_batch(own, output, shared, loading, say)
    if as_json:
        emit_json(result)
    if result["failed"]:
        raise typer.Exit(1)


def named_jobs(path: Path) -> list[tuple[str, VideoRequest]]:
    """The jobs of a file, each with the name of its video.

    Raises:
        InputError: the file cannot be read, is no list, has an unknown key, or gives a name twice.
    """
    import yaml

    from nasa_video.errors import InputError
    from nasa_video.files.atomic import slug
    from nasa_video.video.request import VideoRequest

    try:
        text = path.read_text(encoding="utf-8")
        lines = path.suffix == ".jsonl"
        rows = [yaml.safe_load(line) for line in text.splitlines() if line.strip()] if lines else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a list of jobs: {' '.join(str(error).split())}") from error
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path} must hold a list of jobs, such as: - {{prompt: a red ball, negatives: [blurry]}}")
    named: dict[str, VideoRequest] = {}
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            raise InputError(f"{path}, job {number}: must be a mapping with a prompt, got {type(row).__name__}")
        named_as = row.pop("name", None)
        if named_as is not None and not re.fullmatch(r"\w[\w.-]*", str(named_as)):
            raise InputError(f"{path}, job {number}: name must be letters, digits, _ . and -, got {named_as!r}")
        job = VideoRequest.read(row, f"{path}, job {number}")
        if job.prompt is None and job.timeline is None:
            raise InputError(f"{path}, job {number}: say what the video should show, as prompt: a red ball")
        name = named_as or f"{number:04}-{slug(job.prompt or '')}"
        if name in named:
            raise InputError(f"{path} gives the name {name!r} twice")
        named[name] = job
    return list(named.items())


def run_batch(
    jobs: list[tuple[str, VideoRequest]],
    folder: Path,
    shared: VideoRequest,
    options: LoadOptions,
    tell: Callable[[str], None],
) -> dict[str, Any]:
    """Make what is missing, as ``shared`` says; a job that cannot be made is told of, and the next is begun."""
    from nasa_video.cli.console import is_user_error
    from nasa_video.cli.generation import RunOptions, run
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
        try:
            made.append(run(shared.merged(job), str(path), RunOptions(options), chunk_progress, tell, load=load))
        except Exception as error:
            if not is_user_error(error):
                raise
            failed[name] = str(error)
            tell(f"{name}: {error}")
    return {"made": made, "found": found, "failed": failed}
