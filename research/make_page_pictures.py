"""Takes the pictures of the live page in docs/images from the shipped model: make_page_pictures.py [FOLDER].

Needs Chromium (`apt-get install chromium`, or playwright's own). Seed 0 in all of them; the negative
is typed while chunk 2 plays.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from nasa_video.serve.app import Server
from nasa_video.serve.settings import ServeSettings

SHOTS: dict[str, dict[str, Any]] = {
    "light": {"width": 1240, "height": 900, "scheme": "light", "compare": False},
    "dark": {"width": 1240, "height": 900, "scheme": "dark", "compare": True},
    "phone": {"width": 390, "height": 844, "scheme": "light", "compare": False},
}
PROMPT = "a big blue ball bouncing on a dark background"
NEGATIVE = "blue"
PATIENCE = 300


def shown_chunk(page: Any, chunk: int) -> None:
    """Wait until the screen shows this chunk or a later one."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(f"Number(document.body.dataset.chunk ?? -1) >= {chunk}"):
        if time.monotonic() > deadline:
            raise TimeoutError(f"chunk {chunk} was not shown within {PATIENCE} s")
        page.wait_for_timeout(50)


def take(page: Any, address: str, name: str, folder: Path) -> Path:
    """Play, type the negative, and take the picture two chunks after it acts."""
    shot = SHOTS[name]
    page.set_viewport_size({"width": shot["width"], "height": shot["height"]})
    page.emulate_media(color_scheme=shot["scheme"])
    page.goto(address)
    page.wait_for_selector("body[data-state=ready]")
    page.evaluate("localStorage.clear()")
    page.reload()
    page.wait_for_selector("body[data-state=ready]")
    page.fill("#prompt", PROMPT)
    page.fill("#seed", "0")
    page.set_checked("#compare", shot["compare"])
    page.click("#start")
    shown_chunk(page, 2)
    page.fill("#negative", NEGATIVE)
    page.press("#negative", "Enter")
    page.wait_for_selector("body[data-accepted]")
    shown_chunk(page, int(page.evaluate("document.body.dataset.accepted")) + 2)
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    path = folder / f"serve-{name}.png"
    page.screenshot(path=path)
    page.click("#stop")
    return path


def main() -> None:
    """One server, one browser, one picture a shot."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images")
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(ServeSettings(), port=0)
    server.state.warm_up()
    thread = threading.Thread(target=server.serve_until_stopped, daemon=True)
    thread.start()
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as profile:
        browser = playwright.chromium.launch_persistent_context(
            profile, executable_path=executable, headless=True, args=["--no-sandbox", "--disable-gpu"]
        )
        browser.set_default_timeout(PATIENCE * 1000)
        for name in SHOTS:
            page = browser.new_page()
            print(take(page, server.address, name, folder))
            page.close()
        browser.close()
    server.should_exit = True
    thread.join(20)


if __name__ == "__main__":
    main()
