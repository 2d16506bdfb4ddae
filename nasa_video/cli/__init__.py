"""The command line: ``nasa-video COMMAND``."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors that a person can mend are one message and exit status 1."""
    import click

    from nasa_video.cli.app import app
    from nasa_video.cli.console import fail, is_user_error

    try:
        status = app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("stopped")
        sys.exit(130)
    except Exception as error:
        if not is_user_error(error):
            raise
        fail(str(error))
        sys.exit(1)
    sys.exit(status if isinstance(status, int) else 0)
