"""``python -m nasa_video`` is the command line."""

from nasa_video.cli import main

main()
