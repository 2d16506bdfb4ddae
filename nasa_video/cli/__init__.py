"""The command line: ``nasa-video COMMAND``."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit status 1 (2: unknown options)."""
    try:
        _run()
    except KeyboardInterrupt:  # while it starts; a command that was at work has said what it kept
        sys.exit(130)


def _run() -> None:
    _quiet_libraries()
    from nasa_video.cli.app import app
    from nasa_video.cli.console import emit_json, fail, is_user_error, message_of
    from nasa_video.import_errors import explain_import_error

    try:
        app()
    except SystemExit as stop:
        if stop.code == 2 and "--json" in sys.argv:
            emit_json({"error": "these options cannot be used; standard error says which"})
        raise
    except Exception as error:
        known = explain_import_error(error) or error
        if not is_user_error(known):
            raise
        fail(message_of(known))
        sys.exit(1)


def _quiet_libraries() -> None:
    """What torchao, where it is installed, tells developers each time that diffusers imports it."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
