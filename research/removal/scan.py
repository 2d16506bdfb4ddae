# ruff: noqa: D103
"""Unguided videos of a split's prompts, kept in the cache: python scan.py KIND N SPLIT STEPS [WEIGHTS]."""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from cases import MORE, THINGS, cases_of, prompts_of
from lab import FOLDER, Lab

CACHE = FOLDER / "cache"


def scanned(lab, kind, n, split, steps=4, frames=3, first_steps=None, tag="shipped"):
    path = CACHE / f"{tag}-{kind}-{n}-{split}-{steps}-{first_steps}-{frames}.pt"
    texts, seeds, stated = prompts_of(kind, n, split)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        v = lab.make(texts, seeds, steps=steps, frames=frames, first_steps=first_steps)
        torch.save({"latents": v.latents, "labels": v.labels, "logits": v.logits}, path)
    d = torch.load(path)
    rows = [{k: c[i] for k, c in d["labels"].items()} for i in range(n)]
    return texts, seeds, stated, rows, d


if __name__ == "__main__":
    kind, n, split, steps = sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    t = time.time()
    texts, seeds, stated, rows, d = scanned(Lab(), kind, n, split, steps)
    from collections import Counter

    c = cases_of(rows, stated, 10**6, (*THINGS, *MORE))
    print(time.time() - t, Counter(x.attribute for x in c), sum(any(r[f] == f for f in THINGS[:7]) for r in rows) / n)
    for i in range(12):
        print(texts[i], rows[i])
