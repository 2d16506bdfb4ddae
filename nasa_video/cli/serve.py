"""``nasa-video serve``: the live page."""

from __future__ import annotations

from typing import Annotated

import typer

from nasa_video.cli.console import say
from nasa_video.cli.options import DeviceOption, MemoryOption


def serve(
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="What the page offers: preset, folder, or hub id; the first is chosen.", show_default="sprites"
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; anything but this machine's loopback needs a token.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="NASA_VIDEO_TOKEN", help="What clients must know.", show_default="made up")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="A name besides localhost by which browsers call the server.")
    ] = None,
    device: DeviceOption = None,
    attention: Annotated[str, typer.Option(help="sdpa or xformers.")] = "sdpa",
    memory: MemoryOption = None,
    streams: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Videos made at once, each with its own key-value cache.",
            show_default="4, or what fits",
        ),
    ] = None,
    waiting: Annotated[int, typer.Option(min=0, help="Videos that may wait for a place.")] = 32,
    viewers: Annotated[int, typer.Option(min=1, help="Open pages.")] = 64,
    turn: Annotated[
        float, typer.Option(min=1, help="Seconds that an endless stream keeps its place, if others wait.")
    ] = 120,
    record: Annotated[float, typer.Option(min=0, help="Seconds of a stream that are kept for download.")] = 600,
    keep: Annotated[float, typer.Option(min=0, help="Seconds that finished things are kept for download.")] = 600,
    max_frames: Annotated[int, typer.Option(min=1, help="Longest job, and longest stream that is not endless.")] = 1200,
    messages: Annotated[float, typer.Option(min=1, help="Messages a second from one viewer, on average.")] = 30,
    posts: Annotated[float, typer.Option(min=1, help="Requests a second that change something, from one address.")] = 5,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Show videos while they are made, in a browser; prompts and negatives can be changed while they play."""
    import webbrowser

    from nasa_video.models.presets import DEFAULT_MODEL
    from nasa_video.serve.app import Server
    from nasa_video.serve.registry import plan_capacity
    from nasa_video.serve.settings import ServeSettings

    settings = ServeSettings(
        models=tuple(model or (DEFAULT_MODEL,)),
        device=device,
        attention=attention,  # type: ignore[arg-type]
        token=token or None,
        allowed_hosts=tuple(allow_host or ()),
        memory=memory,
        max_streams=streams or ServeSettings.max_streams,
        max_waiting=waiting,
        max_sessions=viewers,
        turn_seconds=turn,
        record_seconds=record,
        keep_seconds=keep,
        max_frames=max_frames,
        messages_per_second=messages,
        posts_per_second=posts,
    )
    server = Server(plan_capacity(settings, say, fewer=streams is None), host, port)
    say(f"loading {settings.models[0]} ...")
    server.state.warm_up()
    say(f"open {server.address_with_token}    (Ctrl-C ends)")
    if server.settings.token is None:
        port = server.listener.getsockname()[1]
        say(f"from another machine: ssh -L {port}:localhost:{port} THIS-MACHINE, then the same address there")
    if browser:
        webbrowser.open(server.address_with_token)
    server.serve_until_stopped()
    say("stopped")
