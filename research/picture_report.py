"""A picture of a report, as a browser shows it.

    python research/picture_report.py FOLDER/report.html docs/images/report.png [--dark] [--height 1500]

Needs Chromium and playwright (the dev extra).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path


def main() -> None:
    """Open the report and keep a picture of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true", help="as with a dark desktop")
    parser.add_argument("--height", type=int, help="cut there; the whole page by default")
    asked = parser.parse_args()
    program = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if program is None:
        raise SystemExit("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile,
            executable_path=program,
            headless=True,
            args=[*quiet, "--disable-component-update", "--disable-sync"],
            viewport={"width": 1280, "height": asked.height or 900},
            color_scheme="dark" if asked.dark else "light",
        )
        page = browser.new_page()
        page.goto(asked.report.absolute().as_uri())
        page.screenshot(path=asked.picture, full_page=asked.height is None)
        browser.close()


if __name__ == "__main__":
    main()
