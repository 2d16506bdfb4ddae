# ruff: noqa: D103, E741, F403, F405
"""Tries rules on the choosing split: python grid.py MOST NAME..."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from cases import *
from lab import FOLDER, Lab
from rules import *
from scan import scanned

from nasa_video.guidance import CentredNasa, Nag, Nasa, Vsf

D = CentredNasa(0.5, conflict=2.0, limit=0.3)
G = {
    "default": (Existing(D), {}),
    "no limit": (Existing(CentredNasa(0.5, conflict=2.0)), {}),
    "nasa 1.25": (Existing(Nasa(1.25)), {}),
    "vsf 1.4": (Existing(Vsf(1.4)), {"padding": False}),
    "nag 4": (Existing(Nag(4.0, 2.5, 0.5, negative_padding=False)), {"padding": False}),
    "centred 1 from step 2": (Centred([0, 1.0]), {}),
    "centred 2 from step 2": (Centred([0, 2.0]), {}),
    "centred 4 from step 2": (Centred([0, 4.0]), {}),
    "centred 1 at step 1 only": (Centred([1.0, 0]), {}),
    "contrast 1": (Contrast([1.0]), {"extra": 1}),
    "contrast 2": (Contrast([2.0]), {"extra": 1}),
    "contrast 3": (Contrast([3.0]), {"extra": 1}),
    "contrast 5": (Contrast([5.0]), {"extra": 1}),
    "contrast 3 step 1 only": (Contrast([3.0, 0]), {"extra": 1}),
    "contrast 3 from step 2": (Contrast([0, 3.0]), {"extra": 1}),
    "contrast 6 from step 2": (Contrast([0, 6.0]), {"extra": 1}),
    "orthogonal 1": (Centred([1.0], project="orthogonal"), {}),
    "mean 1": (Centred([1.0], project="mean"), {}),
    "token 1": (Centred([1.0], project="token"), {}),
    "norm 1": (Centred([1.0], norm=True), {}),
    "layers 0-2": (Centred([1.0], layers=[1, 1, 1, 0, 0, 0]), {}),
    "layers 3-5": (Centred([1.0], layers=[0, 0, 0, 1, 1, 1]), {}),
    "layers 2-3": (Centred([1.0], layers=[0, 0, 1, 1, 0, 0]), {}),
}
for l in range(6):
    G[f"layer {l} x2"] = (Centred([2.0], layers=[2.0 if i == l else 0 for i in range(6)]), {})


def run(lab, name, rule, opts, texts, seeds, rows, cs, detail=True, steps=4):
    extra = None
    if opts.get("extra"):
        extra = [[f"{texts[c.index]}, {c.text}"] for c in cs]
    v = lab.make(
        [texts[c.index] for c in cs],
        [seeds[c.index] for c in cs],
        [[c.text] for c in cs],
        rule,
        padding=opts.get("padding", True),
        extra=extra,
        steps=steps,
    )
    vs = [judge(rows[c.index], v.row(i), c) for i, c in enumerate(cs)]
    return v, vs


if __name__ == "__main__":
    lab = Lab()
    texts, seeds, stated, rows, d = scanned(lab, "short", 480, "choosing")
    cs = cases_of(rows, stated, int(sys.argv[1]))
    for name in sys.argv[2:] or G:
        rule, opts = G[name]
        v, vs = run(lab, name, rule, opts, texts, seeds, rows, cs)
        t = table(cs, vs)
        print(show(name, t, True), flush=True)
        with (FOLDER / "grid.jsonl").open("a") as f:
            f.write(json.dumps({"name": name, "most": int(sys.argv[1]), **t}) + "\n")
