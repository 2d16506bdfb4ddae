"""Jobs: ids, whole outputs, kills at any moment, shards, Ray."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nasa_video.errors import InputError, OutputError
from nasa_video.files import atomic
from nasa_video.files.atomic import write_text
from nasa_video.jobs.processes import Shard
from nasa_video.jobs.store import GenerationJob, Outcome, Store, run_jobs, write_manifest
from nasa_video.video.request import VideoRequest


def job(seed: int = 0, **changes: Any) -> GenerationJob:
    asked: dict[str, Any] = {"prompt": "a ball", "seed": seed, "model": "m", "steps": 4, "version": "1"}
    asked |= {"frames": 9, "width": 8, "height": 8}
    asked |= {name: changes.pop(name) for name in list(changes) if name in VideoRequest.model_fields}
    return GenerationJob(**{"checkpoint": "c", "request": VideoRequest(**asked)} | changes)


class Writer:
    """Writes a text that follows from the job, in two halves, and tells what it did in a log."""

    def __init__(self, log: Path, between: Callable[[], None] = lambda: None) -> None:
        self._log, self._between = log, between

    def __call__(self, job: GenerationJob, path: Path) -> dict[str, Any]:
        with self._log.open("a") as log:
            log.write(f"{job.id}\n")
        with path.open("w") as file:
            file.write(f"{job.prompt} ")
            file.flush()
            self._between()
            file.write(f"{job.request.seed}")
        return {"value": job.request.seed / 3}


def table(outcome: Outcome) -> list[tuple[str, float, str]]:
    assert outcome.complete
    return [(r.job.id, r.measured["value"], r.output.read_text()) for r in outcome.records if r.output]


def made(log: Path) -> list[str]:
    return log.read_text().split() if log.exists() else []


def test_an_id_is_everything_that_changes_the_output_and_nothing_else() -> None:
    # Golden: an id of another version would make everybody's finished work anew.
    assert job().id == "1d359abe49ab9a4272ba"
    assert job(label="nasa:1", tags={"style": "photo"}).id == job().id
    assert json.loads(job().model_dump_json()) == job().model_dump(mode="json")
    changes: list[dict[str, Any]] = [
        {"seed": 1}, {"prompt": "a cat"}, {"short": "ball"}, {"model": "n"}, {"checkpoint": "d"}, {"steps": 2},
        {"frames": 21}, {"width": 16}, {"version": "2"}, {"settings": {"fps": 8}},
        {"negatives": "red"}, {"negatives": "red:0.5"}, {"guidance": "nasa:1"}, {"guidance": "nasa:0.5"},
    ]  # fmt: skip
    ids = [job(**change).id for change in changes]
    assert len({*ids, job().id}) == len(changes) + 1


def test_finished_work_is_skipped_and_damaged_work_is_made_again(tmp_path: Path) -> None:
    store, log = Store(tmp_path / "out", ".txt"), tmp_path / "log"
    work = [job(seed) for seed in range(5)]
    first = run_jobs(work, store, partial(Writer, log))
    assert (first.made, first.found, first.remade) == (5, 0, 0)
    outputs = [record.output for record in first.records]
    assert all(output is not None for output in outputs)
    outputs[0].write_text("a ball")  # type: ignore[union-attr]  # cut
    outputs[1].write_text("a bull 1")  # type: ignore[union-attr]  # changed at the same length
    store.record_path(work[2]).write_text('{"id": "')  # a record cut short
    store.record_path(work[3]).write_text(store.record_path(work[4]).read_text())  # of another job
    log.unlink()
    second = run_jobs(work, store, partial(Writer, log))
    assert (second.made, second.found, second.remade) == (4, 1, 4)
    assert made(log) == [work[i].id for i in range(4)]
    assert table(second) == table(first)


def test_a_worker_is_not_even_made_when_nothing_is_to_do(tmp_path: Path) -> None:
    store = Store(tmp_path, ".txt")
    run_jobs([job()], store, partial(Writer, tmp_path / "log"))

    def new_worker() -> Any:
        raise AssertionError("the model was loaded for nothing")

    assert run_jobs([job()], store, new_worker).found == 1


def test_labels_are_those_of_who_asks(tmp_path: Path) -> None:
    store = Store(tmp_path, ".txt")
    run_jobs([job(label="nasa")], store, partial(Writer, tmp_path / "log"))
    outcome = run_jobs([job(label="nasa"), job(label="nasa:1")], store, partial(Writer, tmp_path / "log"))
    assert [record.job.label for record in outcome.records] == ["nasa", "nasa:1"]  # type: ignore[attr-defined]
    assert len(made(tmp_path / "log")) == 1


def test_a_failing_job_is_named_and_keeps_what_was_finished(tmp_path: Path) -> None:
    store, log = Store(tmp_path / "out", ".txt"), tmp_path / "log"

    class Fails(Writer):
        def __call__(self, job: GenerationJob, path: Path) -> dict[str, Any]:
            if job.request.seed == 2:
                path.write_text("half")
                raise InputError("no")
            return super().__call__(job, path)

    with pytest.raises(InputError, match="no") as caught:
        run_jobs([job(seed) for seed in range(4)], store, partial(Fails, log))
    assert job(2).id in caught.value.__notes__[0]
    assert [store.find(job(seed)) is not None for seed in range(4)] == [True, True, False, False]
    assert not (tmp_path / "out" / ".work").exists(), "no scratch is left"
    assert run_jobs([job(seed) for seed in range(4)], store, partial(Writer, log)).found == 2


def test_a_worker_that_leaves_nothing_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="left no file"):
        run_jobs([job()], Store(tmp_path, ".txt"), lambda: lambda job, path: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="choose another"):
        Store(tmp_path / "file" / "folder", ".txt")


def test_jobs_without_files_leave_their_record(tmp_path: Path) -> None:
    store = Store(tmp_path)
    outcome = run_jobs([job()], store, lambda: lambda job, path: {"score": None})
    assert outcome.records[0].measured == {"score": None}
    assert outcome.records[0].output is None
    assert run_jobs([job()], store, lambda: lambda job, path: {"score": 1}).records[0].measured == {"score": None}


def _run_until_killed(work: list[GenerationJob], folder: Path, log: Path, point: int) -> bool:
    """Run in a forked process that kills itself at the ``point``-th place where it may; True if it came there."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status)
    passed = 0

    def pass_by() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

    replace, fsync = os.replace, os.fsync

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            pass_by()
            result = function(*arguments)
            pass_by()
            return result

        return call

    try:
        atomic.os.replace, atomic.os.fsync = watched(replace), watched(fsync)  # type: ignore[attr-defined]
        run_jobs(work, Store(folder, ".txt"), partial(Writer, log, pass_by))
    except BaseException:
        os._exit(1)
    os._exit(0)


@pytest.mark.parametrize("seed", range(4))
def test_a_run_killed_at_random_points_gives_the_same_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    work = [job(i) for i in range(6)]
    expected = table(run_jobs(work, Store(tmp_path / "whole", ".txt"), partial(Writer, tmp_path / "log")))
    rng = random.Random(seed)
    folder, log = tmp_path / "killed", tmp_path / "killed.log"
    kills = 0
    while True:
        store = Store(folder, ".txt")
        finished = {one.id for one in work if store.find(one) is not None}
        log.unlink(missing_ok=True)
        killed = _run_until_killed(work, folder, log, rng.randint(1, 14))
        assert not finished & set(made(log)), "finished work was done again"
        kills += killed
        if not killed:
            break
    assert kills >= 2
    outcome = run_jobs(work, Store(folder, ".txt"), partial(Writer, log))
    assert (outcome.found, outcome.made) == (6, 0)
    assert [row[1:] for row in table(outcome)] == [row[1:] for row in expected]
    monkeypatch.setattr(atomic, "_ORPHAN_SECONDS", -1.0)
    store.make(job(99), Writer(log))  # sweeps up what killed processes left
    assert not (folder / ".work").exists()
    assert (
        sorted(path.suffix for path in folder.iterdir() if job(99).id not in path.name) == [".json"] * 6 + [".txt"] * 6
    )


def test_every_point_of_a_job_survives_a_kill(tmp_path: Path) -> None:
    # Every place once: in the output's write, before and after each flush and rename.
    for point in range(1, 11):
        folder, log = tmp_path / str(point), tmp_path / f"{point}.log"
        killed = _run_until_killed([job()], folder, log, point)
        assert killed == (point <= 9), "the number of places a job passes has changed; adapt this test"
        outcome = run_jobs([job()], Store(folder, ".txt"), partial(Writer, log))
        assert [row[2] for row in table(outcome)] == ["a ball 0"]


def test_two_shards_give_the_table_of_the_single_run(tmp_path: Path) -> None:
    work = [job(seed) for seed in range(7)]
    single = run_jobs(work, Store(tmp_path / "one", ".txt"), partial(Writer, tmp_path / "log"))
    store, log = Store(tmp_path / "two", ".txt"), tmp_path / "log2"
    first = run_jobs(work, store, partial(Writer, log), shard=Shard(0, 2))
    assert (first.made, len(first.missing), first.complete) == (4, 3, False)
    second = run_jobs(work, store, partial(Writer, log), shard=Shard(1, 2))
    assert (second.made, second.complete) == (3, True)
    assert sorted(made(log)) == sorted(one.id for one in work)
    assert [row[1:] for row in table(second)] == [row[1:] for row in table(single)]


def test_the_shard_comes_from_the_option_then_torchrun_then_slurm() -> None:
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4"}
    assert str(Shard.choose(None, {})) == "0/1"
    assert str(Shard.choose(None, slurm)) == "2/4"
    assert str(Shard.choose(None, slurm | {"RANK": "1", "WORLD_SIZE": "8"})) == "1/8"
    assert str(Shard.choose("0/3", slurm)) == "0/3"
    assert str(Shard.choose(None, {"RANK": "1"})) == "0/1", "half of a pair is none"


@pytest.mark.parametrize("text", ["3/3", "1", "a/b", "-1/2", "0/0", ""])
def test_no_shard(text: str) -> None:
    with pytest.raises(InputError, match=r"0/|n of 1 or more"):
        Shard.choose(text, {})


def test_the_manifest_names_every_job_with_its_id(tmp_path: Path) -> None:
    work = [job(seed, label="nasa", tags={"dimensions": ["color"]}) for seed in range(3)]
    write_manifest(tmp_path / "manifest.jsonl", work)
    rows = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    assert [row.pop("id") for row in rows] == [one.id for one in work]
    assert [GenerationJob.model_validate(row) for row in rows] == work


def test_what_killed_writers_left_is_swept_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = os.fork()
    if not child:
        atomic.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[attr-defined, assignment]
        write_text(tmp_path / "a", "new")
        os._exit(0)
    os.waitpid(child, 0)
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    (tmp_path / f".a.otherhost-{child}-0123.part").write_text("of a machine that may still write it")
    write_text(tmp_path / "a", "new")
    assert len(list(tmp_path.iterdir())) == 3, "it may be a container's that shares our name"
    monkeypatch.setattr(atomic, "_ORPHAN_SECONDS", -1.0)
    write_text(tmp_path / "a", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f".a.otherhost-{child}-0123.part", "a"]


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "a", "old")
    monkeypatch.setattr(atomic.os, "fsync", full)  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="No space left"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    with pytest.raises(OutputError, match="No space left"):
        run_jobs([job()], Store(tmp_path / "out", ".txt"), partial(Writer, tmp_path / "log"))


def test_an_unknown_engine_and_a_missing_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="local, ray"):
        run_jobs([job()], Store(tmp_path, ".txt"), partial(Writer, tmp_path / "log"), engine="dask")  # type: ignore[arg-type]
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(InputError, match=r"nasa-video\[ray\]"):
        run_jobs([job()], Store(tmp_path, ".txt"), partial(Writer, tmp_path / "log"), engine="ray")


RAY_SCRIPT = """
import json
import sys
from pathlib import Path
from nasa_video.errors import InputError
from nasa_video.jobs.store import GenerationJob, Store, run_jobs

class Writer:
    def __call__(self, job, path):
        import os
        if job.prompt == "refused":
            raise InputError("this prompt is refused")
        marker = Path(sys_folder) / f"died-{job.request.seed}"
        if job.prompt == "dies once" and not marker.exists():
            marker.write_text("")
            os._exit(1)
        path.write_text(f"{job.prompt} {job.request.seed}")
        return {"value": job.request.seed / 3, "process": os.getpid()}

folder = Path(sys.argv[1])
sys_folder = str(folder)
Writer.__call__.__globals__["sys_folder"] = sys_folder
rows = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
jobs = [GenerationJob.model_validate({k: v for k, v in row.items() if k != "id"}) for row in rows]
outcome = run_jobs(jobs, Store(folder / "out", ".txt"), Writer, engine="ray")
assert outcome.complete
print(len({record.measured["process"] for record in outcome.records}))
try:
    run_jobs([jobs[0].model_copy(update={"short": "refused"})], Store(folder / "out", ".txt"), Writer, engine="ray")
except InputError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra nasa-video[ray] is not installed")
def test_ray_gives_the_table_of_the_single_run(tmp_path: Path) -> None:
    import sys

    work = [job(seed, prompt="dies once" if seed == 2 else "a ball") for seed in range(6)]
    single = run_jobs(work, Store(tmp_path / "one", ".txt"), partial(Writer, tmp_path / "log"))
    write_manifest(tmp_path / "manifest.jsonl", work)
    (tmp_path / "script.py").write_text(RAY_SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), str(tmp_path)]
    # Ray's workers give way to everything else by default: on a busy machine they would not come to work.
    environment = {**os.environ, "RAY_worker_niceness": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "this prompt is refused" in done.stdout
    outcome = run_jobs(work, Store(tmp_path / "out", ".txt"), partial(Writer, tmp_path / "log"))
    assert (outcome.found, outcome.made) == (6, 0)
    assert [row[1:] for row in table(outcome)] == [row[1:] for row in table(single)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_and_a_record_that_holds_one_is_made_again(tmp_path: Path, value: float) -> None:
    store = Store(tmp_path)
    with pytest.raises(OutputError, match="measured what is no number"):
        run_jobs([job()], store, lambda: lambda job, path: {"score": value})
    run_jobs([job()], store, lambda: lambda job, path: {"score": 1.5})
    record = store.record_path(job())
    record.write_text(record.read_text().replace("1.5", {True: "NaN", False: "1e999"}[value != value]))
    assert run_jobs([job()], store, lambda: lambda job, path: {"score": 2.0}).remade == 1


def test_a_write_goes_through_links_and_into_devices_and_takes_long_names(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "fifo")
    reader = subprocess.Popen(["cat", str(tmp_path / "fifo")], stdout=subprocess.PIPE, text=True)
    write_text(tmp_path / "fifo", "through")
    assert reader.communicate(timeout=10)[0] == "through"
    assert (tmp_path / "fifo").is_fifo(), "it was not replaced by a file"
    with pytest.raises(OutputError, match="cannot write /dev/full: No space left"):
        write_text(Path("/dev/full"), "x")
    long = tmp_path / f"{'球' * 82}.txt"
    write_text(long, "kept")
    assert long.read_text() == "kept"
    with atomic.atomic_write(tmp_path / "a.png") as part:
        assert part.suffix == ".png", "libraries choose a format by the ending"
        part.write_text("")


def test_one_slug_for_every_name() -> None:
    assert atomic.slug("A red ball, bouncing on the GRASS and more and more") == "a-red-ball-bouncing-on-the-grass-and"
    assert atomic.slug("赤い玉") == "video"
