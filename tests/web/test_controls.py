"""The page's controls in a real Chromium: scale, weights, keyboard, phone, light and dark, what it says."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from live_client import PATIENCE
from live_page import acting_chunk, data, play, ready, until, wait_for_frame

from nasa_video.serve.app import Server
from nasa_video.serve.states import LiveStates
from nasa_video.video.request import PromptState


def add_negative(page: Any, text: str) -> None:
    page.fill("#negative", text)
    page.press("#negative", "Enter")


def timeline_says(page: Any, selector: str, texts: list[str]) -> None:
    """Wait until the newest row of the timeline has these texts in its elements of a kind."""
    deadline = time.monotonic() + PATIENCE
    row = page.locator("#segments li").first
    while (said := row.locator(selector).all_inner_texts()) != texts:
        assert time.monotonic() < deadline, f"the timeline says {said}, not {texts}"
        page.wait_for_timeout(50)


def test_moving_the_scale_acts_from_the_next_chunk(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    play(page)
    add_negative(page, "red")
    timeline_says(page, ".how", ["centred NASA 0.5"])
    until(page, f"Number(document.body.dataset.chunk) >= {data(page, 'accepted')}")
    change, chunk = page.inner_text("#change"), int(data(page, "chunk"))
    page.focus("#scale")
    for _ in range(5):
        page.keyboard.press("ArrowLeft")
    assert page.inner_text("#scale-value") == "0.25"
    timeline_says(page, ".how", ["centred NASA 0.25"])
    accepted = acting_chunk(page)
    assert accepted > chunk
    until(page, f"Number(document.body.dataset.chunk) >= {accepted}")
    assert float(page.inner_text("#change").rstrip(" %")) < 0.8 * float(change.rstrip(" %")), "half of it does less"


def test_each_negative_has_its_weight(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    play(page)
    add_negative(page, "red")
    add_negative(page, "snow")
    page.fill("[aria-label='Weight of red']", "0.4")
    page.press("[aria-label='Weight of red']", "Tab")
    timeline_says(page, ".term", ["red × 0.4", "snow"])
    page.click("[aria-label='Remove red']")
    timeline_says(page, ".term", ["snow"])
    page.select_option("#guidance", "none")
    timeline_says(page, ".how", ["unguided"])


def test_a_refused_change_is_taken_back(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    play(page, prompt="a red ball")
    add_negative(page, "snow")
    timeline_says(page, ".term", ["snow"])
    add_negative(page, "A red  BALL")
    page.wait_for_selector("#notice[data-code=refused]")
    assert "prompt itself" in page.inner_text("#notice")
    assert page.locator(".chip .text").all_inner_texts() == ["snow"], "what holds is what is shown"
    page.select_option("#guidance", "cfg")
    until(page, "document.querySelector('#guidance').value === 'nasa-centred'")
    page.fill("#prompt", "snow")
    page.press("#prompt", "Enter")
    until(page, "document.querySelector('#prompt').value === 'a red ball'")
    add_negative(page, "rain")
    timeline_says(page, ".term", ["snow", "rain"])
    assert page.is_hidden("#notice")
    page.reload()
    ready(page)
    assert page.locator(".chip .text").all_inner_texts() == ["snow", "rain"]


def test_what_the_window_does_is_chosen(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    ready(page)
    assert page.input_value("#on-change") == "regenerate", "the model's own"
    page.select_option("#on-change", "keep")
    play(page)
    (stream,) = server.state.streams.values()
    assert stream.start.on_change == "keep"
    page.select_option("#on-change", "recache")
    until(page, "document.body.dataset.accepted")
    assert stream.timeline().timeline[0].on_change == "keep"
    page.reload()
    ready(page)
    assert page.input_value("#on-change") == "recache"


def go_to(page: Any, element: str) -> None:
    """With the Tab key alone."""
    for _ in range(60):
        if page.evaluate("document.activeElement.id") == element:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{element} cannot be reached")


def test_the_keyboard_is_enough(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    ready(page)
    go_to(page, "prompt")
    page.keyboard.press("Control+A")
    page.keyboard.type("a green star")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=playing]")
    timeline_says(page, ".what", ["a green star"])
    go_to(page, "negative")
    page.keyboard.type("blurry,")
    timeline_says(page, ".term", ["blurry"])
    page.keyboard.press("Backspace")
    timeline_says(page, ".term", [])
    go_to(page, "pause")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", "it is seen where one is"
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=paused]")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=playing]")
    go_to(page, "stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("body[data-state=ended]")


def test_every_control_has_a_name(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    ready(page)
    add_negative(page, "red")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, select, textarea, button, a, section, dialog form")]
          .filter((one) => !one.labels?.length && !one.ariaLabel && !one.innerText.trim() && !one.closest("[hidden]"))
          .map((one) => one.outerHTML)"""
    )
    assert nameless == []


def test_it_works_on_a_phone(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    page.set_viewport_size({"width": 360, "height": 740})
    play(page)
    add_negative(page, "a long negative prompt that must not push anything out of the screen")
    wait_for_frame(page, 12)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing sticks out"
    page.evaluate("scrollTo(0, 0)")
    for name in ("stage", "start", "pause", "stop", "prompt"):
        box = page.locator(f"#{name}").bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 740, f"{name} is on the first screen"
        assert box["height"] >= 40, "large enough for a finger"


PAPER_AND_INK = """() => [getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]
  .map((colour) => colour.match(/[0-9.]+/g).slice(0, 3).map((value) => value / 255))"""


def luminance(colour: list[float]) -> float:
    """Of an sRGB colour, as WCAG 2 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_it_is_light_or_dark_as_one_wishes(server: Server, open_page: Any) -> None:
    page = open_page(server.address)
    papers = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        paper, ink = (luminance(colour) for colour in page.evaluate(PAPER_AND_INK))
        assert (max(paper, ink) + 0.05) / (min(paper, ink) + 0.05) > 7, "WCAG's stricter contrast"
        papers[scheme] = paper
    assert papers["light"] > 0.8
    assert papers["dark"] < 0.05


def test_slow_generation_is_said_and_played_evenly(
    server: Server, open_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cue_of, begun = LiveStates.__call__, set()

    def slow(self: LiveStates, chunk: int) -> PromptState:
        if chunk not in begun:
            begun.add(chunk)
            time.sleep(2)  # For a second of video.
        return cue_of(self, chunk)

    monkeypatch.setattr(LiveStates, "__call__", slow)
    page = open_page(server.address)
    play(page)
    until(page, "document.querySelector('#plays').textContent.includes(' of 12 FPS')")
    until(page, "parseFloat(document.querySelector('#made').textContent) < 6.5")  # A mean of three chunks.
    assert 0.2 < page.evaluate("document.querySelector('video').playbackRate") < 0.6


def test_a_place_in_the_line_is_shown(serve: Callable[..., Server], open_page: Any, client_of: Any) -> None:
    server = serve(max_streams=1)
    first = client_of(server)
    first.start()
    page = open_page(server.address)
    ready(page)
    page.click("#start")
    page.wait_for_selector("body[data-state=queued]")
    assert "Yours in the line: 1" in page.inner_text("#message")
    first.close()
    page.wait_for_selector("body[data-state=playing]")
