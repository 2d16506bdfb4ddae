"""Starting the server from the command line."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable

from nasa_video.serve.places import plan_places
from nasa_video.serve.server import Server
from nasa_video.serve.settings import ServeSettings


def run_server(
    settings: ServeSettings, host: str, port: int, browser: bool, say: Callable[[str], None], *, fewer: bool = False
) -> None:
    """Serve until Ctrl-C; ``fewer`` offers only as many places as there is memory for.

    Raises:
        NasaVideoError: the first model cannot be loaded or does not fit, or the address cannot be listened at.
    """
    server = Server(plan_places(settings, say, fewer=fewer), host, port)
    name = settings.models[0]
    say(f"loading {name} ...")
    server.hub.warm_up()
    say(f"open {server.address_with_token}    (Ctrl-C ends)")
    if server.settings.token is None:
        port = server.listener.getsockname()[1]
        say(f"from another machine: ssh -L {port}:localhost:{port} THIS-MACHINE, then the same address there")
    if browser:
        webbrowser.open(server.address_with_token)
    server.serve_until_stopped()
    say("stopped")
