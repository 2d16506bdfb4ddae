"""The server: its HTTP and WebSocket addresses, the socket that it listens at, the token."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib.resources
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException, Path, Request, Response, WebSocket
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, Field
from starlette.background import BackgroundTask

from nasa_video import __version__
from nasa_video.errors import InputError, OutputError
from nasa_video.files.atomic import slug
from nasa_video.guidance.terms import parse_terms
from nasa_video.serve.jobs import Job
from nasa_video.serve.protocol import ServedRequest, check_limits, describe_methods, explain, printable
from nasa_video.serve.scheduler import Busy
from nasa_video.serve.security import (
    OPEN_PATHS,
    Buckets,
    Guard,
    client_of,
    cookie_name,
    cookie_value,
    is_loopback,
    own_names,
    same_token,
)
from nasa_video.serve.server_state import ServerState
from nasa_video.serve.session import Session
from nasa_video.serve.settings import MAX_MESSAGE_BYTES, ServeSettings
from nasa_video.serve.stream import LiveStream
from nasa_video.video.request import PromptRequest

_TYPES = {"html": "text/html", "js": "text/javascript", "css": "text/css", "svg": "image/svg+xml"}
Key = Annotated[str, Path(pattern=r"^[A-Za-z0-9_-]{22}$")]


class Login(BaseModel):
    """Body of ``POST /login``."""

    token: str = Field(max_length=500)


class Server(uvicorn.Server):
    """The application behind a listening socket. ``run`` blocks until a signal; ``address`` is known before.

    Args:
        state: or the settings of a new one.

    Raises:
        InputError: the address cannot be listened at.
    """

    def __init__(self, state: ServerState | ServeSettings, host: str = "127.0.0.1", port: int = 8000) -> None:
        settings = state if isinstance(state, ServeSettings) else state.settings
        if not is_loopback(host):
            settings = dataclasses.replace(
                settings,
                token=settings.token or secrets.token_urlsafe(18),
                allowed_hosts=(*settings.allowed_hosts, *own_names()),
            )
        self.settings = settings
        self.listener = _listen(host, port)
        self.state = ServerState(settings) if isinstance(state, ServeSettings) else state
        super().__init__(
            uvicorn.Config(
                create_app(self.state, settings),
                log_level="warning",
                access_log=False,
                server_header=False,
                ws="websockets-sansio",
                ws_max_size=MAX_MESSAGE_BYTES,
                # A client that vanished without a word: its place is free after at most this long.
                ws_ping_interval=2.0,
                ws_ping_timeout=8.0,
                # Compression gains nothing on video and costs a context of 300 kB a client.
                ws_per_message_deflate=False,
                timeout_graceful_shutdown=2,
                backlog=128,
            )
        )

    @property
    def address(self) -> str:
        """Where a browser finds the page, without the token."""
        host, port = self.listener.getsockname()[:2]
        host = "localhost" if is_loopback(host) or host in ("0.0.0.0", "::") else host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}/"

    @property
    def address_with_token(self) -> str:
        """The same, with the token behind a ``#``, which browsers keep to themselves."""
        return self.address if self.settings.token is None else f"{self.address}#token={self.settings.token}"

    def serve_until_stopped(self) -> None:
        """Serve; returns after Ctrl-C or a call from another thread that sets ``should_exit``."""
        try:
            # When everything has ended in order, uvicorn raises the Ctrl-C that made it end once more.
            with contextlib.suppress(KeyboardInterrupt):
                self.run([self.listener])
        finally:
            self.listener.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(128)  # Now: a browser that is opened at once waits in the queue instead of being refused.
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"cannot listen at {host} port {port}: {reason}; choose another --port or --host") from error
    return listener


def create_app(state: ServerState, settings: ServeSettings) -> FastAPI:
    """The application around a server's state; its start and end open and close that."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.open()
        try:
            yield
        finally:
            await asyncio.to_thread(state.close)

    # The interactive page that FastAPI brings loads scripts from another site; /docs is our own.
    app = FastAPI(
        title="nasa-video",
        version=__version__,
        description="Videos with negative prompts for few-step streaming models. The live WebSocket is at /ws.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # Without what came in, which may be what JSON cannot hold.
        return JSONResponse({"detail": explain(error.errors(), skip=1)}, 422)

    pages = _add_pages(app)
    _add_information(app, state)
    _add_login(app, settings)
    _add_jobs(app, state)
    _add_streams(app, state)
    app.add_middleware(Guard, settings=settings, open_paths=OPEN_PATHS | pages)
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


def _refusal(error: InputError, status: int = 422) -> HTTPException:
    return HTTPException(status, printable(str(error))[:400])


def _add_information(app: FastAPI, state: ServerState) -> None:
    @app.get("/healthz", summary="Whether the server works")
    async def healthz(response: Response) -> dict[str, Any]:
        active, waiting = state.scheduler.counts
        if not state.scheduler.alive:
            response.status_code = 503
        status = "ok" if state.scheduler.alive else "the scheduler has ended"
        return {"status": status, "version": __version__, "active": active, "waiting": waiting}

    @app.get("/models", summary="What can be asked for, and what else there is")
    def models() -> list[dict[str, Any]]:
        return state.registry.describe()

    @app.get("/v1/methods", summary="The guidance methods, and what can be set of each")
    async def methods() -> list[dict[str, Any]]:
        return describe_methods()

    @app.get("/v1/terms", summary="The negatives in a text, and their weights")
    async def terms(text: str) -> list[dict[str, Any]]:
        try:
            negatives = parse_terms(text)
            check_limits(PromptRequest(negatives=negatives))
        except InputError as error:
            raise _refusal(error) from None
        return [dataclasses.asdict(negative) for negative in negatives]


def _add_login(app: FastAPI, settings: ServeSettings) -> None:
    attempts = Buckets(1)

    @app.post("/login", summary="Exchange the server's token for a cookie", status_code=204)
    async def login(login: Login, request: Request) -> Response:
        if not attempts.take(client_of(request.scope)):
            raise HTTPException(429, "too many attempts; wait a few seconds")
        token = settings.token
        if token is not None and not same_token(login.token, token):
            raise HTTPException(401, "that is not this server's token")
        response = Response(status_code=204)
        if token is not None:
            secure = request.url.scheme == "https"
            response.set_cookie(
                cookie_name(token), cookie_value(token), httponly=True, samesite="strict", secure=secure
            )
        return response


def _add_jobs(app: FastAPI, state: ServerState) -> None:
    def job_of(key: str) -> Job:
        job = state.jobs.get(key)
        if job is None:
            raise HTTPException(404, "no such video, or it was not kept any longer")
        return job

    @app.post("/v1/videos", status_code=202, summary="Make a video; returns its id at once")
    def create(request: Annotated[ServedRequest, Body()]) -> dict[str, Any]:
        try:
            return state.new_job(request).describe()
        except InputError as error:
            raise _refusal(error) from None
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
        return FileResponse(job.path, media_type="video/mp4", filename=f"{slug(job.recipe.prompt or '')}.mp4")

    @app.delete("/v1/videos/{key}", status_code=204, summary="Cancel it, and forget its result")
    def cancel(key: Key) -> None:
        job = job_of(key)
        state.cancel(job)
        if job.state == "done":
            state.jobs.remove(key)


def _add_streams(app: FastAPI, state: ServerState) -> None:
    def stream_of(key: str) -> LiveStream:
        stream = state.streams.get(key)
        if stream is None:
            raise HTTPException(404, "no such stream, or it was not kept any longer")
        return stream

    @app.get("/v1/streams/{key}/video.mp4", summary="What a live stream has shown", response_class=FileResponse)
    def video(key: Key) -> FileResponse:
        stream = stream_of(key)
        if stream.recorder is None:
            raise HTTPException(409, "this stream is not recorded")
        made = stream.timeline()
        try:
            path = stream.recorder.save(made.to_metadata() if made else {})
        except OutputError as error:
            raise HTTPException(409, str(error)) from None
        name = f"{slug(stream.start.prompt or '')}.mp4"
        return FileResponse(
            path, media_type="video/mp4", filename=name, background=BackgroundTask(path.unlink, missing_ok=True)
        )

    @app.get(
        "/v1/streams/{key}/timeline.yaml",
        summary="What `nasa-video generate --timeline` makes the same frames from",
        response_class=PlainTextResponse,
    )
    def timeline(key: Key) -> PlainTextResponse:
        stream = stream_of(key)
        made = stream.timeline()
        if made is None:
            raise HTTPException(409, "nothing was shown yet")
        disposition = {"content-disposition": f'attachment; filename="{slug(stream.start.prompt or "")}.yaml"'}
        return PlainTextResponse(made.to_yaml(), media_type="application/yaml", headers=disposition)

    @app.websocket("/ws")
    async def live(socket: WebSocket) -> None:
        await Session(state, socket).run()
