"""A short start leaves out what a video does not need, and the rest of diffusers is there for whoever asks for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LEAN = """
import sys
from nasa_video.cli.lean import import_lean
assert import_lean()
assert not {"peft", "torchao", "transformers", "scipy", "diffusers.models.unets.unet_2d"} & sys.modules.keys()
import diffusers.models.transformers.transformer_wan as module
from diffusers import AutoencoderKLWan, UNet2DConditionModel, WanTransformer3DModel

from diffusers.loaders import WanLoraLoaderMixin
assert module.WanTransformer3DModel is WanTransformer3DModel
assert not import_lean(), "only once"
"""


RUN = """
import sys
from nasa_video.cli import main
sys.argv = ["nasa-video", "generate", "a star", "--neg", "red", "--model", sys.argv[1], "-o", "-"]
sys.stdout = open("out", "w")
try:
    main()
finally:
    left = {"peft", "transformers", "torchao", "torch._dynamo", "sympy"} & sys.modules.keys()
assert not left, left
"""


def test_a_short_video_needs_no_compiler_and_no_lora(model_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, "-c", RUN, str(model_folder)]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_is_left_out_is_imported_when_it_is_asked_for() -> None:
    done = subprocess.run([sys.executable, "-c", LEAN], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
