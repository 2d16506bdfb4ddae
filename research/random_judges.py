"""Writes judges with random weights in the files that VBench reads: CLIP (a TorchScript archive), its head, MUSIQ.

Run by the interpreter of VBench's environment: PYTHON research/random_judges.py FOLDER. Scores by them mean nothing;
they show that the path from a weight file to a score is whole.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

RUNNER = Path(__file__).resolve().parent.parent / "nasa_video" / "evaluation" / "vbench_runner.py"


def main(folder: Path) -> None:
    """Fill the folder as VBench's cache."""
    open_torchvision()
    clip: Any = importlib.import_module("clip.model")
    musiq: Any = importlib.import_module("pyiqa.archs.musiq_arch")
    torch.manual_seed(0)
    for name in ("clip_model", "aesthetic_model/emb_reader", "pyiqa_model"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    # The published one has 24 layers of 1024; only its output's width, 768, is fixed by the aesthetic head.
    small = clip.CLIP(
        embed_dim=768, image_resolution=224, vision_layers=1, vision_width=64, vision_patch_size=32,
        context_length=77, vocab_size=49408, transformer_width=64, transformer_heads=1, transformer_layers=1,
    )  # fmt: skip
    example = (torch.zeros(1, 3, 224, 224), torch.zeros(1, 77, dtype=torch.long))
    torch.jit.trace(small.eval(), example).save(str(folder / "clip_model/ViT-L-14.pt"))
    head = torch.nn.Linear(768, 1)
    torch.save(head.state_dict(), folder / "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
    torch.save(musiq.MUSIQ(pretrained=False).state_dict(), folder / "pyiqa_model/musiq_spaq_ckpt-358bb6af.pth")


def open_torchvision() -> None:
    """As the runner does it."""
    spec = importlib.util.spec_from_file_location("vbench_runner", RUNNER)
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    runner.open_torchvision()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
