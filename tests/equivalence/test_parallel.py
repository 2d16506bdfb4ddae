"""One video on two processes: diffusers' context parallelism with gloo on CPUs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from PIL import Image

from causvid_adapter import CausalWan, CausvidAdapterError
from causvid_adapter.accelerate.parallel import parallelise
from nasa_video.files.source import read_frames

ROOT = Path(__file__).parent.parent.parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_processes(count: int, *words: str, cwd: Path) -> list[subprocess.CompletedProcess[str]]:
    """Run a command in ``count`` processes that find each other as torchrun lets them."""
    port = str(free_port())
    running = []
    for rank in range(count):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment = os.environ | place | address | {"PYTHONPATH": str(ROOT)}
        running.append(
            subprocess.Popen(
                [sys.executable, *words], cwd=cwd, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    done = []
    for process in running:
        out, err = process.communicate(timeout=900)
        done.append(subprocess.CompletedProcess(words, process.returncode, out, err))
    return done


def by_torchrun(count: int, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a user does, with torchrun."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", str(count), "--master-port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *start, *words], cwd=cwd, env=environment, text=True, capture_output=True, check=False
    )


WORKER = """
import sys, torch, torch.distributed as dist
from diffusers import WanTransformer3DModel
from causvid_adapter import CausalWan, ChunkSampler, FlowMatchSchedule, SeededNoise, Window
from causvid_adapter.accelerate.parallel import parallelise
torch.set_num_threads(1)
dist.init_process_group("gloo")
model = CausalWan(WanTransformer3DModel.from_pretrained(sys.argv[1]).eval().requires_grad_(False))
parallelise(model)
caches = []
new_cache = model.new_cache
model.new_cache = lambda *sizes: caches.append(new_cache(*sizes)) or caches[-1]
context = torch.load(sys.argv[2])
parts = []
for window, sink, rope in ((None, 0, "absolute"), (4, 1, "absolute"), (4, 0, "window")):
    sampler = ChunkSampler(model, FlowMatchSchedule(8, [1000, 757]), 2, Window(window, sink, rope))
    parts.append(torch.cat(list(sampler.stream(context, SeededNoise([7], (4, 4, 6)), num_frames=6)), dim=1))
torch.save({"latents": torch.cat(parts), "bytes": caches[0].num_bytes}, f"{sys.argv[3]}.{dist.get_rank()}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_video_on_two_processes_is_the_one_on_one(
    new_wan: Callable[..., WanTransformer3DModel],
    new_context: Callable[..., Any],
    distance: Callable[..., float],
    tmp_path: Path,
) -> None:
    new_wan().save_pretrained(tmp_path / "model")
    torch.save(new_context([5]).embeds, tmp_path / "context.pt")
    (tmp_path / "worker.py").write_text(WORKER)
    results = {}
    for count in (1, 2):
        words = ("worker.py", "model", "context.pt", f"out{count}")
        for process in on_processes(count, *words, cwd=tmp_path):
            assert process.returncode == 0, process.stderr
        results[count] = [torch.load(tmp_path / f"out{count}.{rank}") for rank in range(count)]
    (alone,), (first, second) = results[1], results[2]
    assert torch.equal(first["latents"], second["latents"]), "every process has the whole video"
    assert distance(first["latents"], alone["latents"]) < 1e-5
    assert first["bytes"] * 2 == alone["bytes"], "each holds the history of its own heads"


@pytest.mark.slow
def test_the_command_line_splits_one_video_and_shares_out_many(model_folder: Path, tmp_path: Path) -> None:
    common = ["-m", "nasa_video", "generate", "a red star", "--neg", "red", "--model", str(model_folder)]
    plain = subprocess.run(
        [sys.executable, *common, "-o", "plain/"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr
    done = by_torchrun(2, *common, "--device", "cpu", "--split", "-o", "split/", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # as PNG: an MP4's encoder makes more of a value that is rounded the other way
    a, b = (
        np.stack([np.asarray(Image.open(path)) for path in sorted((tmp_path / name).glob("*.png"))]).astype(int)
        for name in ("plain", "split")
    )
    assert np.abs(a - b).max() <= 1

    (tmp_path / "jobs.yaml").write_text(
        "- {prompt: a red star, seed: 1}\n- {prompt: a blue heart, negatives: [red], seed: 2, frames: 9}\n"
        "- {prompt: two big circles, name: circles}\n"
    )
    batch = ["-m", "nasa_video", "batch", "jobs.yaml", "-o", "out", "--model", str(model_folder), "--device", "cpu"]
    done = by_torchrun(2, *batch, "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = [json.loads(line)["made"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert sorted(len(videos) for videos in made) == [1, 2], "each process took its share"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0000-a-red-star.mp4", "0001-a-blue-heart.mp4", "circles.mp4"
    ]  # fmt: skip
    assert len(read_frames(tmp_path / "out" / "0001-a-blue-heart.mp4")) == 9


def test_splitting_says_what_it_needs(new_wan: Callable[..., WanTransformer3DModel]) -> None:
    with pytest.raises(CausvidAdapterError, match="torchrun --nproc-per-node"):
        parallelise(CausalWan(new_wan()))
