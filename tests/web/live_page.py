"""What a person does with the page, and what the page tells of itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from live_client import PATIENCE

HALVES = """() => {
  const screen = [document.querySelector("video"), document.querySelector("canvas")].find((one) => !one.hidden);
  const canvas = document.createElement("canvas");
  canvas.width = 128;
  canvas.height = 64;
  const context = canvas.getContext("2d");
  context.drawImage(screen, 0, 0, 128, 64);
  return [0, 64].map((left) => {
    const { data } = context.getImageData(left, 0, 64, 64);
    const found = [0, 0, 0];
    for (let i = 0; i < data.length; i += 4)
      for (let c = 0; c < 3; c += 1)
        found[c] += [1, 2].every((other) => data[i + c] > data[i + ((c + other) % 3)] + 60);
    return Object.fromEntries(["red", "green", "blue"].map((name, c) => [name, (4 * found[c]) / data.length]));
  });
}"""


def colours(page: Any) -> list[dict[str, float]]:
    """Share of the screen's left and of its right half that is clearly red, green, blue."""
    halves: list[dict[str, float]] = page.evaluate(HALVES)
    return halves


def contrast(page: Any) -> float:
    """Difference between the brightest and the darkest red on the screen, 0 to 255: 0 where there is no picture."""
    found: float = page.evaluate("""() => {
      const screen = [document.querySelector("video"), document.querySelector("canvas")].find((one) => !one.hidden);
      const context = Object.assign(document.createElement("canvas"), { width: 64, height: 64 }).getContext("2d");
      context.drawImage(screen, 0, 0, 64, 64);
      const reds = context.getImageData(0, 0, 64, 64).data.filter((value, index) => index % 4 === 0);
      return Math.max(...reds) - Math.min(...reds);
    }""")
    return found


def data(page: Any, name: str) -> Any:
    return page.evaluate(f"document.body.dataset.{name}")


def ready(page: Any) -> None:
    page.wait_for_selector("body[data-state=ready]")


def play(page: Any, media: str = "", **fields: str) -> None:
    ready(page)
    page.evaluate("document.querySelector('details').open = true")
    page.select_option("#media", media)
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.click("#start")
    page.wait_for_selector("body[data-state=playing]")


def until(page: Any, condition: str) -> None:
    """Playwright's own way would need `eval` in the page, which its policy forbids."""
    deadline = time.monotonic() + PATIENCE
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"waited in vain for {condition}"
        page.wait_for_timeout(50)


def wait_for_frame(page: Any, frame: int) -> None:
    until(page, f"Number(document.body.dataset.frame) >= {frame}")


def saved(page: Any, button: str, path: Path) -> Path:
    with page.expect_download() as download:
        page.click(button)
    download.value.save_as(path)
    return path


def acting_chunk(page: Any) -> int:
    """The chunk from which the change that was just made acts; soon, as docs/reference/live_protocol.md says.

    The next chunk that is begun: two after the one on the screen where making one is fast, else three, since chunks are
    then begun earlier, so that none comes late.
    """
    until(page, "document.body.dataset.accepted")
    accepted, shown = int(data(page, "accepted")), int(data(page, "chunk"))
    fast = float(page.inner_text("#made").removesuffix(" FPS")) > 4 * 12
    assert accepted <= shown + (2 if fast else 3)
    return accepted
