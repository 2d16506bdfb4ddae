"""The command line: ``nasa-video COMMAND``."""

from __future__ import annotations

import logging
import sys


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit status 1."""
    _quiet_libraries()
    from nasa_video.cli.app import app
    from nasa_video.cli.console import fail, is_user_error

    try:
        app()
    except Exception as error:
        if not is_user_error(error):
            raise
        fail(str(error))
        sys.exit(1)


def _quiet_libraries() -> None:
    """What torchao, where it is installed, tells developers each time that diffusers imports it."""
    for name in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)
