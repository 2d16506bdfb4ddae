"""What the page is for, with the shipped model: a colour that is on the screen goes when it is typed as a negative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from live_page import acting_chunk, colours, data, play, ready, wait_for_frame

from nasa_video.serve.app import Server

# The world's own habit, so any model of it does so: squares are mostly red, balls blue, triangles green.
SHAPES = (("square", "red"), ("ball", "blue"), ("triangle", "green"))
SHOWN = 0.04
"""Share of the picture from which a colour counts as shown."""


def colour_goes(page: Any, prompt: str, colour: str, seed: int) -> bool | None:
    """Whether the colour goes in the first two chunks that its negative acts on, and stays in the unguided twin.

    None where it was not shown. Guidance, scale and what becomes of the window are the page's own.
    """
    ready(page)
    page.set_checked("#compare", True)
    play(page, prompt=prompt, seed=str(seed))
    wait_for_frame(page, 12)
    before = colours(page)[1][colour]
    if before < SHOWN:
        return None
    page.fill("#negative", colour)
    page.press("#negative", "Enter")
    end = 9 + 12 * (acting_chunk(page) + 1)  # Chunk i ends before frame 9 + 12 i.
    gone = False
    while not gone:
        without, guided = (half[colour] for half in colours(page))
        if int(data(page, "frame")) >= end:
            break
        gone = guided < 0.5 * before and without > 0.75 * before
        page.wait_for_timeout(40)
    return gone


def test_the_measure_sees_each_half(browser: Any) -> None:
    page = browser.new_page()
    page.set_content("<video hidden></video><canvas width=64 height=32></canvas>")
    page.evaluate("""() => {
      const context = document.querySelector("canvas").getContext("2d");
      for (const [colour, left, width] of [["#e01010", 0, 16], ["#808080", 16, 16], ["#1020e0", 32, 32]]) {
        context.fillStyle = colour;
        context.fillRect(left, 0, width, 32);
      }
    }""")
    left, right = colours(page)
    page.close()
    assert left == pytest.approx({"red": 0.5, "green": 0, "blue": 0}, abs=0.02)
    assert right == pytest.approx({"red": 0, "green": 0, "blue": 1}, abs=0.02)


def watch_all(server: Server, open_page: Any, seeds: tuple[int, ...], named: bool) -> list[bool]:
    """Whether the colour went, of each video that showed it."""
    outcomes: dict[tuple[str, int], bool | None] = {}
    for seed in seeds:
        for shape, colour in SHAPES:
            page = open_page(server.address)
            page.evaluate("localStorage.clear()")
            page.reload()
            # still: what leaves the picture by itself says nothing about the negative
            prompt = f"a big {f'{colour} ' if named else ''}{shape} still on a dark background"
            outcomes[shape, seed] = colour_goes(page, prompt, colour, seed)
            page.close()
    print(outcomes)
    return [gone for gone in outcomes.values() if gone is not None]


def test_the_colour_that_the_prompt_names_goes_within_two_chunks(serve: Callable[..., Server], open_page: Any) -> None:
    server = serve(models=("sprites",))
    server.state.warm_up()
    went = watch_all(server, open_page, seeds=(0, 1), named=True)
    assert len(went) >= 5, "what the prompt names is on the screen"
    assert sum(went) >= len(went) - 1


def test_a_colour_that_nobody_asked_for_goes_within_two_chunks(serve: Callable[..., Server], open_page: Any) -> None:
    server = serve(models=("sprites",))
    server.state.warm_up()
    went = watch_all(server, open_page, seeds=(0, 1, 2, 3), named=False)
    assert len(went) >= 2, "a shape has its own colour often enough"
    assert sum(went) >= len(went) - 1
