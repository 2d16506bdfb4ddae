"""One process of a context: trains a tiny video trainer, data parallel and sharded, and writes the states it comes to.

python -m torch.distributed.run --nproc-per-node 2 tests/distributed_worker.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from causvid_adapter import CausalWan
from causvid_adapter.checkpoint import cast_like_diffusers
from nasa_video.models.presets import find_preset
from nasa_video.train.distributed import DistributedContext
from nasa_video.train.dry_run import NEGATIVES, PROMPTS, HashEncoder
from nasa_video.train.run import resume, save
from nasa_video.train.settings import VideoSettings, parse_settings
from nasa_video.train.video import VideoParts, VideoTrainer

STEPS = 3
LORA = {"rank": 2, "scaling": 2}
SMALL = {
    "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 4, "out_channels": 4, "text_dim": 10,
    "freq_dim": 16, "ffn_dim": 40, "num_layers": 2,
}  # fmt: skip


KINDS = ("full", "lora", "bf16")
"""What is trained: everything; adapters; float32 adapters on a base in bfloat16 under autocast, as on GPUs."""


def precision(kind: str) -> str:
    return "bf16" if kind == "bf16" else "fp32"


def settings(accumulate: int, shard: bool, kind: str) -> VideoSettings:
    adapter = None if kind == "full" else LORA
    data: dict[str, Any] = {
        "kind": "video", "title": "tiny", "student": "sprites", "teacher": {"path": "none"},
        "student_lora": adapter, "fake_lora": adapter, "prompts": {"kind": "file"},
        "negatives": {"placement": "student+teacher", "texts": {"kind": "file"}},
        "step_counts": [2], "latent_frames": 6, "fake_updates": 1,
        "student_optimiser": {"rate": 1e-3}, "fake_optimiser": {"rate": 1e-3},
        "run": {"iterations": STEPS, "batch_size": 1, "accumulate": accumulate, "shard": shard,
                "precision": precision(kind), "gradient_checkpointing": True, "sheet_samples": 0},
    }  # fmt: skip
    parsed = parse_settings(data, "worker")
    assert isinstance(parsed, VideoSettings)
    return parsed


def new_trainer(context: DistributedContext, accumulate: int, kind: str) -> VideoTrainer:
    torch.manual_seed(4)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    models = [WanTransformer3DModel(**SMALL) for _ in range(2)]
    for model in models:
        cast_like_diffusers(model, dtype)
    student, teacher = map(CausalWan, models)
    parts = VideoParts(find_preset("sprites"), student, teacher, HashEncoder(8, 10), (4, 4, 6))
    return VideoTrainer(settings(accumulate, context.shard, kind), parts, PROMPTS, NEGATIVES, context)


def main(folder: Path) -> None:
    for shard in (False, True):
        for kind in KINDS:
            context = DistributedContext(shard, precision(kind), cpu=True)
            trainer = new_trainer(context, 1, kind)
            trainer.iterate(1)
            checkpoint = folder / f"{shard}-{kind}.checkpoint"
            save(trainer, checkpoint, 1)
            trainer = new_trainer(context, 1, kind)  # and on from the checkpoint
            for step in range(resume(trainer, checkpoint) + 1, STEPS + 1):
                trainer.iterate(step)
            state = trainer.states["student"].state_dict()
            trainer.export(folder / f"{shard}-{kind}")
            if context.leads:
                torch.save(
                    {
                        "trained": state["trained"],
                        "average": dict(zip(state["trained"], state["average"]["shadow_params"], strict=True)),
                    },
                    folder / f"{shard}-{kind}.pt",
                )
            context.wait()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
