"""The command line: ``nasa-video COMMAND``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit status 1."""
    from nasa_video.cli.app import app
    from nasa_video.cli.console import fail, is_user_error

    try:
        app()
    except Exception as error:
        if not is_user_error(error):
            raise
        fail(str(error))
        sys.exit(1)
