"""One WebSocket: reads a client's messages, sends it what its stream makes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from nasa_video import __version__
from nasa_video.errors import InputError
from nasa_video.serve.media import Outgoing
from nasa_video.serve.protocol import PROTOCOL, ClientMessage, MessageError, Start, Update, parse_message
from nasa_video.serve.scheduler import Busy
from nasa_video.serve.security import Bucket
from nasa_video.serve.server_state import ServerState
from nasa_video.serve.settings import MAX_CHANGES, MAX_NEGATIVES, MAX_PROMPT
from nasa_video.serve.stream import LiveStream

log = logging.getLogger(__name__)
MAX_FAULTS = 50
"""Refused messages after which a client is sent away."""
END_SECONDS = 10.0
"""How long a stream may take to send its last messages before another one starts."""
POLICY_VIOLATION, TRY_LATER = 1008, 1013


class Session:
    """A client from its connection to its leaving; it has one stream at a time."""

    def __init__(self, server: ServerState, socket: WebSocket) -> None:
        self.server = server
        self.socket = socket
        self.outgoing = Outgoing(asyncio.get_running_loop())
        self.stream: LiveStream | None = None
        self._bucket = Bucket(server.settings.messages_per_second)
        self._faults = 0

    async def run(self) -> None:
        """Serve the client until it leaves."""
        await self.socket.accept()
        if self.server.sessions >= self.server.settings.max_sessions:
            await self.socket.close(TRY_LATER, "too many viewers")
            return
        self.server.sessions += 1
        sender = asyncio.create_task(self._send())
        try:
            self._greet()
            await self._read()
        except WebSocketDisconnect:
            pass
        finally:
            # First of all, and without waiting for anything: the place is free for another.
            self._leave()
            self.server.sessions -= 1
            sender.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await sender

    def _greet(self) -> None:
        settings = self.server.settings
        limits = {
            "prompt": MAX_PROMPT,
            "negatives": MAX_NEGATIVES,
            "frames": settings.max_frames,
            "changes": MAX_CHANGES,
            "record_seconds": settings.record_seconds,
        }
        self.outgoing.say(
            "hello",
            protocol=PROTOCOL,
            version=__version__,
            models=list(settings.models),
            limits=limits,
            preview=self.server.preview,
        )

    async def _send(self) -> None:
        try:
            while (item := await self.outgoing.get()) is not None:
                if isinstance(item, str):
                    await self.socket.send_text(item)
                else:
                    await self.socket.send_bytes(item)
        except Exception:  # The connection is gone, in one of its libraries' many ways; the reader hears of it too.
            self._leave()

    async def _read(self) -> None:
        while True:
            await self.outgoing.drained()
            received = await self.socket.receive()
            if received["type"] == "websocket.disconnect":
                return
            fault = await self._fault_of(received.get("text"))
            if fault is None:
                continue
            self.outgoing.say("error", **fault)
            # Waiting messages are read without a pause: the sender's turn, so that a client hears why it is sent away.
            await asyncio.sleep(0)
            self._faults += 1
            if self._faults > MAX_FAULTS:
                await self.socket.close(POLICY_VIOLATION, "too many refused messages")
                return

    async def _fault_of(self, text: str | None) -> dict[str, Any] | None:
        """Take a message; what is wrong with it, if anything is."""
        if not self._bucket.take():
            return {
                "code": "too-fast",
                "message": f"more than {self._bucket.rate:g} messages a second; this one was left out",
            }
        if text is None:
            return {"code": "malformed", "message": "messages are JSON text; binary ones only go to the client"}
        try:
            message = parse_message(text)
        except MessageError as error:
            answers: dict[str, Any] = {} if error.id is None else {"id": error.id}
            return {"code": "refused" if error.refused else "malformed", "message": str(error), **answers}
        try:
            await self._take(message)
        except (InputError, Busy) as error:
            answers = {"id": message.id} if isinstance(message, Update) else {}
            return {"code": "busy" if isinstance(error, Busy) else "refused", "message": str(error), **answers}
        return None

    async def _take(self, message: ClientMessage) -> None:
        if isinstance(message, Start):
            await self._end_stream()
            self.stream = self.server.new_stream(message, self.outgoing)
        elif self.stream is None or self.stream.has_ended.is_set():
            if message.type not in ("position", "stop"):  # Those may cross the news that the stream has ended.
                raise InputError("there is no stream; send start first")
        else:
            self.stream.receive(message)
            if message.type == "stop":
                self.server.scheduler.remove(self.stream)

    async def _end_stream(self) -> None:
        """Before another one starts: its last messages go out first."""
        if self.stream is not None:
            self.server.scheduler.remove(self.stream)
            self.stream.close("stopped")
            # Not in a thread: there are few of those, and a crowd of restarts would wait for one another.
            deadline = time.monotonic() + END_SECONDS
            while not self.stream.has_ended.is_set() and time.monotonic() < deadline:
                await asyncio.sleep(0.02)

    def _leave(self) -> None:
        self.outgoing.close()
        if self.stream is not None:
            self.server.scheduler.remove(self.stream)
            self.stream.close("left")
