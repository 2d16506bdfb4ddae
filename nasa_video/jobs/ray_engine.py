"""Jobs on a Ray cluster: one actor a GPU, or a few CPU actors where there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.jobs.store import Job, Record, Store, Worker, named

# A model of its own on every CPU would fill the memory; two keep a small machine busy.
MAX_CPU_ACTORS = 2
# A machine that is lost takes its actor along; the job is done again elsewhere, but not for ever: it may be its fault.
RESTARTS = 2


def run_on_ray(jobs: list[Job], store: Store, new_worker: Callable[[], Worker]) -> Iterator[Record]:
    """Do jobs on the cluster that ``RAY_ADDRESS`` names, else on one started here; records come as they are ready.

    The store's folder must be one that all machines see under the same path. Each actor makes its own worker.

    Raises:
        InputError: Ray is not installed, or the machines do not share the folder.
        NasaVideoError: an actor died again and again.
    """
    ray = _import_ray()
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(ignore_reinit_error=True, include_dashboard=False, log_to_driver=False)
    try:
        yield from _spread(ray, jobs, store, new_worker)
    finally:
        if started_here:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
    except ImportError as error:
        raise InputError(
            "--engine ray needs Ray: pip install 'nasa-video[ray]'; without it, start several processes with --shard"
        ) from error
    return ray


def _spread(ray: Any, jobs: list[Job], store: Store, new_worker: Callable[[], Worker]) -> Iterator[Record]:
    waiting = list(reversed(jobs))
    idle = _new_actors(ray, store, new_worker, len(jobs))
    running: dict[Any, tuple[Any, Job]] = {}
    while waiting or running:
        while idle and waiting:
            actor, job = idle.pop(), waiting.pop()
            running[actor.make.remote(job)] = (actor, job)
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            actor, job = running.pop(reference)
            idle.append(actor)
            with named(job):
                record = _result(ray, reference, job, store)
            yield record


def _result(ray: Any, reference: Any, job: Job, store: Store) -> Record:
    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        # Ray wraps what the worker raised; the command line knows the inner one.
        cause = error.cause if isinstance(error.cause, NasaVideoError) else error
        raise cause from error
    except ray.exceptions.RayActorError as error:
        raise NasaVideoError(
            f"the Ray actor of job {job.id} died {RESTARTS + 1} times; is there enough memory for one model an actor?"
        ) from error
    record = store.find(job)
    if record is None:
        raise InputError(
            f"a Ray actor finished job {job.id}, but {store.folder} does not have it; give a folder that all machines "
            "of the cluster share"
        )
    return record


def _new_actors(ray: Any, store: Store, new_worker: Callable[[], Worker], jobs: int) -> list[Any]:
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    count = gpus or max(1, min(MAX_CPU_ACTORS, int(resources.get("CPU", 1))))
    # Reductions depend on the number of threads: an actor takes as many as a process without Ray.
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    options = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 1}
    actor = ray.remote(max_restarts=RESTARTS, max_task_retries=RESTARTS, runtime_env={"env_vars": threads}, **options)(
        _Actor
    )
    # An actor has a working directory of its own.
    shared = Store(store.folder.absolute(), store.suffix)
    return [actor.remote(shared, new_worker) for _ in range(min(count, jobs))]


class _Actor:
    """Holds one worker; outputs go straight to the store, and only the news of it travels."""

    def __init__(self, store: Store, new_worker: Callable[[], Worker]) -> None:
        self._store = store
        self._worker = new_worker()

    def make(self, job: Job) -> str:
        # A retry after a lost machine may come when the output is already there.
        if self._store.find(job) is None:
            self._store.make(job, self._worker)
        return job.id
