# ruff: noqa: D103, E501
"""Exact pairs: first chunks of the data (clips.py) and the same scenes without some of what they show.

python pairs.py FIRST LAST      shards of 256
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from bank import PICK, caption_of, things_of
from diffusers import AutoencoderKLWan
from lab import DEVICE, FOLDER, WEIGHTS, autocast
from told import without

from causvid_adapter.vae_stream import normalize
from nasa_video.sprites.renderer import render
from nasa_video.sprites.world import FAVOURITE_COLOUR, FLAWS, Scenes

PAIRS = FOLDER / "pairs"


def instead(scene):
    """What stands in the place of a value that goes: nothing where there can be nothing, else one value that follows from the scene."""
    c = scene["colour"]
    return {
        "texture": [0, 1, 2],
        "weather": [0, 1, 2],
        "count": [0, 1],
        "background": [0, 1, 2, 3, 4, 5],
        "size": [0, 1],
        "shape": [0, 1, 2, 3, 4, 5],
        "motion": [7, 6, 0, 1, 2, 3, 4, 5],
        "colour": [FAVOURITE_COLOUR[scene["shape"]], (c + 3) % 6, *range(6)],
    }


def pick(scene, rng):
    pool = things_of(scene)
    picked = []
    for _ in range(rng.choices((1, 2, 3), (0.72, 0.2, 0.08))[0]):
        if pool:
            t = rng.choices(pool, [PICK[t[0]] for t in pool])[0]
            picked.append(t)
            pool.remove(t)
    return picked


def shard(vae, number):
    a = torch.load(FOLDER / "clips" / f"clips-{number:04d}.pt")
    scenes = Scenes(**{f.name: a[f.name] for f in fields(Scenes)})
    rng = random.Random(7_000 + number)
    items, values = [], {f.name: getattr(scenes, f.name).clone() for f in fields(Scenes)}
    for i in range(len(scenes)):
        row = scenes.row(i)
        caption = caption_of(row, rng)
        things = pick(row, rng) if rng.random() < 0.8 else []
        other = without(row, things, instead(row))
        flawed = [f for f in FLAWS if row[f] and f not in caption.stated]
        for f in flawed:
            other[f] = 0
        if other["count"] == 1:
            other["size"] = 0
        if other["shape2"] == other["shape"]:
            other["shape2"] = (other["shape"] + 1) % 6
        if other["colour2"] == other["colour"]:
            other["colour2"] = (other["colour"] + 1) % 6
        for n, v in other.items():
            values[n][i] = v
        items.append(
            {
                "caption": caption.text,
                "stated": sorted(caption.stated),
                "scene0": row,
                "scene": other,
                "things": things,
                "flawed": flawed,
                "unsure": [],
                "same": not things and not flawed,
            }
        )
    b, out = Scenes(**values), []
    for s in range(0, len(scenes), 32):
        frames = render(b[slice(s, s + 32)], 9).to(DEVICE)
        with torch.no_grad(), autocast():
            out.append(
                normalize(vae, vae.encode(frames.transpose(1, 2)).latent_dist.mean.float().transpose(1, 2)).half().cpu()
            )
    return {"items": items, "a": a["latents"], "b": torch.cat(out)}


if __name__ == "__main__":
    vae = (
        AutoencoderKLWan.from_pretrained(WEIGHTS / "vae", low_cpu_mem_usage=False)
        .float()
        .eval()
        .requires_grad_(False)
        .to(DEVICE)
    )
    PAIRS.mkdir(parents=True, exist_ok=True)
    t = time.time()
    for number in range(int(sys.argv[1]), int(sys.argv[2])):
        path = PAIRS / f"{number:04d}.pt"
        if not path.exists():
            torch.save(shard(vae, number), path.with_suffix(".part"))
            path.with_suffix(".part").rename(path)
        print(number, time.time() - t, flush=True)
