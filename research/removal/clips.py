# ruff: noqa: D103
"""First chunks of the data as latents, in shards: python clips.py SHARDS (256 clips each)."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from diffusers import AutoencoderKLWan
from lab import DEVICE, FOLDER, WEIGHTS

from nasa_video.training.dataset import CHUNK_FRAMES, encode_clips
from nasa_video.training.parallel import Team


def clips(n, folder=FOLDER / "clips", seed=77, frames=CHUNK_FRAMES):
    vae = (
        AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False).float().eval().requires_grad_(False)
    )
    t = time.time()
    return encode_clips(
        vae, n, 0.0, Path(folder), seed, DEVICE, Team(), lambda a, b: print(a, b, time.time() - t, flush=True), frames
    )


if __name__ == "__main__":
    clips(256 * int(sys.argv[1]))
