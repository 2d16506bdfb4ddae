# ruff: noqa: D103, F403, F405, RUF059
"""Presence against the detector: python presence_eval.py TAG WEIGHTS N [--scale .7]

Calibration without labels: for each term F, prompts "x" and "x, F" (K each), a probe of F; features of the last step.
Held out: unguided and guided videos of the choosing split, labels by the detector.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from cases import *
from lab import FOLDER, Lab
from presence import *
from rules import Existing
from scan import scanned

from nasa_video.guidance import CentredNasa
from nasa_video.sprites.captions import term

TERMS = [(f, f) for f in FLAWS] + [
    ("weather", "snow"),
    ("weather", "rain"),
    ("texture", "striped"),
    ("texture", "dotted"),
    ("count", "two"),
    *(("background", b) for b in ATTRIBUTES["background"]),
    *(("colour", c) for c in ATTRIBUTES["colour"]),
    ("size", "small"),
    ("size", "big"),
]


def text_of(a, v):
    return "two objects" if a == "count" else term(a, v)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("tag")
    p.add_argument("weights", type=Path)
    p.add_argument("n", type=int)
    p.add_argument("--scale", type=float, default=0.7)
    p.add_argument("--k", type=int, default=16)
    p.add_argument("--most", type=int, default=20)
    a = p.parse_args()
    lab = Lab(a.weights)
    texts, seeds, stated, rows, d = scanned(lab, "short", a.n, "choosing", tag=a.tag)
    rng = random.Random(5)
    data = {}
    for at, va in TERMS:
        word = text_of(at, va)
        shown = [i for i, r in enumerate(rows) if va in r[at].split("+")]
        hidden = [i for i, r in enumerate(rows) if r["count"] != "none" and va not in r[at].split("+")]
        take = [*rng.sample(shown, min(a.most, len(shown))), *rng.sample(hidden, min(a.most, len(hidden)))]
        if not shown:
            continue
        probe, guided = Recorder(), Recorder(Existing(CentredNasa(0.5, conflict=2.0)))
        lab.make([texts[i] for i in take], [seeds[i] for i in take], [[word]] * len(take), probe, decode=False)
        v = lab.make([texts[i] for i in take], [seeds[i] for i in take], [[word]] * len(take), guided)
        # calibration prompts: other short prompts, without and with the term
        ct, cseeds, _ = prompts_of("short", a.k, "calibrating")
        cal = Recorder()
        lab.make(
            ct + [f"{t}, {word}" for t in ct],
            [*cseeds, *(s + 5000 for s in cseeds)],
            [[word]] * (2 * a.k),
            cal,
            decode=False,
        )
        data[at, va] = {
            "probe": probe.features[:, 0],
            "guided": guided.features[:, 0],
            "cal": cal.features[:, 0],
            "shown": torch.tensor([i in shown for i in take]),
            "after": torch.tensor([va in v.labels[at][j].split("+") for j in range(len(take))]),
            "said": torch.arange(2 * a.k) >= a.k,
        }
        print(at, va, int(data[at, va]["shown"].sum()), flush=True)
    torch.save(data, FOLDER / f"presence-{a.tag}.pt")


if __name__ == "__main__":
    main()
