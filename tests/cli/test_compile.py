"""``--compile`` through the compiler itself, on a CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.utils import counters

from causvid_adapter import CausvidAdapterError, compile_generator
from causvid_adapter.accelerate.compile import has_compiler
from nasa_video.video.pipeline import VideoPipeline

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_the_shipped_model_compiled_is_itself_and_is_compiled_once(nasa_video: Run) -> None:
    if not has_compiler():
        pytest.skip("no C++ compiler")
    # Five chunks: the first, the filling and the sliding window.
    red = ("generate", "a red ball bouncing", "--neg", "red", "--frames", "57", "--steps", "1", "--device", "cpu")
    for name, options in {"plain": (), "compiled": ("--compile", "on")}.items():
        done = nasa_video(*red, *options, "-o", f"{name}/")
        assert done.status == 0, done.stderr
    assert counters["stats"]["unique_graphs"] == 1, "no chunk is compiled anew"
    assert sum(counters["inductor"].values()), "the compiler has been at work"
    plain, compiled = (read_pictures(Path(name)) for name in ("plain", "compiled"))
    assert plain.shape == compiled.shape
    assert np.abs(plain - compiled).max() <= 2, "of 255"


def read_pictures(folder: Path) -> Any:
    from PIL import Image

    return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(folder.glob("*.png"))])


def test_without_a_compiler_the_way_out_is_said(nasa_video: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name, *more: None if name in ("g++", "clang++", "cl") else which(name))
    done = nasa_video("generate", "a red star", "--model", "{model}", "--compile", "on", "--device", "cpu", "-o", "a/")
    assert done.status == 1
    assert "needs a C++ compiler" in done.stderr
    assert "apt-get install g++" in done.stderr
    assert not Path("a").exists()
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler()


def test_a_compiler_that_fails_is_explained(model_folder: Path) -> None:
    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no room for the kernels")

    own = VideoPipeline.from_pretrained(str(model_folder), device="cpu")
    compile_generator(own.model, backend=broken)
    with pytest.raises(CausvidAdapterError, match=r"no room for the kernels.*go on without compiling"):
        next(own.stream("a red star"))
