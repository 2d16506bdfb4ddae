"""The report in a real browser: light and dark, wide and narrow, with nothing from outside and nothing broken."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_evaluation_results import results

from nasa_video.evaluation.report import write_report


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    program = next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)
    if program is None:
        message = "no Chromium: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=program,
            headless=True,
            args=[*quiet, "--disable-component-update", "--disable-sync"],
        )
        yield browser.new_page()
        browser.close()


def test_the_report_in_a_browser(page: Any, tmp_path: Path) -> None:
    file, _ = write_report(results(folder=tmp_path), tmp_path)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    papers = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(file.absolute().as_uri())
            overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
            assert overflow <= 0, f"wider than the window at {width}"
        papers[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        assert ink != papers[scheme]
    assert papers["light"] != papers["dark"]
    assert not said, "no policy was broken, nothing failed to load"
    assert {url.partition(":")[0] for url in asked} <= {"file", "data"}
    broken = page.evaluate("[...document.images].filter(i => !(i.complete && i.naturalWidth > 0)).length")
    assert broken == 0
    assert page.evaluate("document.images.length") > 10
    lines = page.evaluate("getComputedStyle(document.querySelector('svg path[style*=--k1]')).stroke")
    assert lines.startswith("rgb("), "plots take their colours from the page"
