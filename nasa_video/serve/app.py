"""The HTTP and WebSocket addresses of the server."""

from __future__ import annotations

import asyncio
import importlib.resources
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, HTTPException, Path, Request, Response, WebSocket
from fastapi.responses import FileResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from nasa_video import __version__
from nasa_video.errors import InputError, OutputError
from nasa_video.files.atomic import slug
from nasa_video.serve.hub import Hub, KeptStream
from nasa_video.serve.jobs import Job
from nasa_video.serve.protocol import VideoRequest
from nasa_video.serve.security import OPEN_PATHS, Guard, cookie_name, same_token
from nasa_video.serve.session import Session
from nasa_video.serve.throttle import Buckets, client_of
from nasa_video.serve.worker import Busy

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
Key = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$")]


class Login(BaseModel):
    """Body of ``POST /login``."""

    token: str = Field(max_length=500)


def create_app(hub: Hub) -> FastAPI:
    """The application around a hub; its start and end open and close the hub."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        hub.open()
        try:
            yield
        finally:
            await asyncio.to_thread(hub.close)

    # The interactive page that FastAPI brings loads scripts from another site; /docs is our own.
    app = FastAPI(
        title="nasa-video",
        version=__version__,
        description="Videos with negative prompts for few-step streaming models. The live WebSocket is at /ws.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    pages = _add_pages(app)
    _add_information(app, hub)
    _add_login(app, hub)
    _add_jobs(app, hub)
    _add_streams(app, hub)
    app.add_middleware(Guard, settings=hub.settings, open_paths=OPEN_PATHS | pages)
    return app


def _add_pages(app: FastAPI) -> frozenset[str]:
    """The page's files, read now: no name from the network ever becomes a path."""
    folder = importlib.resources.files("nasa_video.serve") / "page"
    names = {"index.html": "/", "docs.html": "/docs", "favicon.svg": "/favicon.svg"}
    paths = set()
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        content, kind = file.read_bytes(), _TYPES[file.name.rpartition(".")[2]]
        path = names.get(file.name, f"/page/{file.name}")
        app.add_api_route(path, _page(content, kind), methods=["GET"], include_in_schema=False)
        paths.add(path)
    return frozenset(paths)


def _page(content: bytes, kind: str) -> Callable[[], Response]:
    def page() -> Response:
        return Response(content, media_type=kind)

    return page


def _add_information(app: FastAPI, hub: Hub) -> None:
    @app.get("/healthz", summary="Whether the server works")
    async def healthz(response: Response) -> dict[str, Any]:
        active, waiting = hub.worker.counts
        if not hub.worker.alive:
            response.status_code = 503
        status = "ok" if hub.worker.alive else "the worker has ended"
        return {"status": status, "version": __version__, "active": active, "waiting": waiting}

    @app.get("/models", summary="What can be asked for, and what else there is")
    def models() -> list[dict[str, Any]]:
        return hub.library.describe()


def _add_login(app: FastAPI, hub: Hub) -> None:
    attempts = Buckets(1)

    @app.post("/login", summary="Exchange the server's token for a cookie", status_code=204)
    async def login(login: Login, request: Request) -> Response:
        if not attempts.take(client_of(request.scope)):
            raise HTTPException(429, "too many attempts; wait a few seconds")
        token = hub.settings.token
        if token is not None and not same_token(login.token, token):
            raise HTTPException(401, "that is not this server's token")
        response = Response(status_code=204)
        if token is not None:
            secure = request.url.scheme == "https"
            response.set_cookie(cookie_name(token), token, httponly=True, samesite="strict", secure=secure)
        return response


def _add_jobs(app: FastAPI, hub: Hub) -> None:
    def job_of(key: str) -> Job:
        job = hub.jobs.get(key)
        if job is None:
            raise HTTPException(404, "no such video, or it was not kept any longer")
        return job

    @app.post("/v1/videos", status_code=202, summary="Make a video; returns its id at once")
    def create(request: Annotated[VideoRequest, Body()]) -> dict[str, Any]:
        try:
            return hub.new_job(request).describe()
        except InputError as error:
            raise HTTPException(422, str(error)) from None
        except Busy as error:
            raise HTTPException(503, str(error), {"retry-after": "10"}) from None

    @app.get("/v1/videos/{key}", summary="Its status and progress")
    def status(key: Key) -> dict[str, Any]:
        return job_of(key).describe()

    @app.get("/v1/videos/{key}/content", summary="The finished MP4", response_class=FileResponse)
    def content(key: Key) -> FileResponse:
        job = job_of(key)
        if job.state != "done":
            raise HTTPException(409, f"this video is {job.state}, not done")
        return FileResponse(job.path, media_type="video/mp4", filename=f"{slug(job.request.prompt)}.mp4")

    @app.delete("/v1/videos/{key}", status_code=204, summary="Cancel it, and forget its result")
    def cancel(key: Key) -> None:
        job = job_of(key)
        hub.cancel(job)
        if job.state == "done":
            hub.jobs.remove(key)


def _add_streams(app: FastAPI, hub: Hub) -> None:
    def stream_of(key: str) -> KeptStream:
        kept = hub.streams.get(key)
        if kept is None:
            raise HTTPException(404, "no such stream, or it was not kept any longer")
        return kept

    @app.get("/v1/streams/{key}/video.mp4", summary="What a live stream has shown", response_class=FileResponse)
    def video(key: Key) -> FileResponse:
        stream = stream_of(key).stream
        if stream.recorder is None:
            raise HTTPException(409, "this stream is not recorded")
        timeline = stream.timeline()
        try:
            path = stream.recorder.save({"timeline": timeline.model_dump(mode="json")} if timeline else {})
        except OutputError as error:
            raise HTTPException(409, str(error)) from None
        name = f"{slug(stream.start.prompt)}.mp4"
        return FileResponse(
            path, media_type="video/mp4", filename=name, background=BackgroundTask(path.unlink, missing_ok=True)
        )

    @app.get(
        "/v1/streams/{key}/timeline.yaml",
        summary="What `nasa-video generate --timeline` makes the same frames from",
        response_class=PlainTextResponse,
    )
    def timeline(key: Key) -> PlainTextResponse:
        stream = stream_of(key).stream
        made = stream.timeline()
        if made is None:
            raise HTTPException(409, "nothing was shown yet")
        name = f"{slug(stream.start.prompt)}.yaml"
        disposition = {"content-disposition": f'attachment; filename="{name}"'}
        return PlainTextResponse(made.to_yaml(), media_type="application/yaml", headers=disposition)

    @app.websocket("/ws")
    async def live(socket: WebSocket) -> None:
        await Session(hub, socket).run()
