# ruff: noqa: B023, D103, E501, E741, F403, F405
"""Measures weights: python evalw.py TAG WEIGHTS [--scale .7] [--most 10] [--n 320] [--split choosing] [--kind short] [--steps 4] [--lists]"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from cases import *
from lab import FOLDER, Lab
from rules import *
from scan import scanned

from nasa_video.sprites.world import SHAPES
from nasa_video.training.assessment import data_spread, held_out_prompts


def shares(rows, attribute):
    c = Counter(r[attribute] for r in rows)
    return {v: c[v] / len(rows) for v in ATTRIBUTES[attribute]}


def first_impression(lab, n=144, steps=4):
    texts = [f"a {s}" for s in SHAPES for _ in range(n // 6)]
    v = lab.make(texts, range(7000, 7000 + n), steps=steps)
    rows = [v.row(i) for i in range(n)]
    far, total = [], []
    for a in ATTRIBUTES:
        if a == "shape" or a in FLAWS:
            continue
        want = data_spread(a, {})
        for k, s in shares(rows, a).items():
            total.append(abs(s - want[k]))
            if abs(s - want[k]) > 0.1:
                far.append(f"{a} {k} {100 * s:.0f} ({100 * want[k]:.0f})")
    return {
        "no flaw": sum(all(r[f] == "no" for f in FLAWS) for r in rows) / n,
        "flaws": {f: round(sum(r[f] == f for r in rows) / n, 3) for f in FLAWS},
        "far": far,
        "apart": sum(total) / len(total),
        "none": sum(r["count"] == "none" for r in rows) / n,
    }


def stated_right(lab, n=96, steps=4, seed=77):
    ps = held_out_prompts(n, seed)
    v = lab.make([p.text for p in ps], range(n), steps=steps)
    by = {}
    for i, p in enumerate(ps):
        for a, x in p.stated.items():
            by.setdefault(a, []).append(v.labels[a][i] == x)
    return {
        "all but motion": sum(
            all(v.labels[a][i] == x for a, x in p.stated.items() if a != "motion") for i, p in enumerate(ps)
        )
        / n,
        **{a: round(sum(b) / len(b), 3) for a, b in by.items()},
    }


def main():
    p = argparse.ArgumentParser()
    p.add_argument("tag")
    p.add_argument("weights", type=Path)
    p.add_argument("--scale", type=float, nargs="*", default=[0.7])
    p.add_argument("--most", type=int, default=10)
    p.add_argument("--n", type=int, default=320)
    p.add_argument("--split", default="choosing")
    p.add_argument("--kind", nargs="*", default=["short"])
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--first", type=int)
    p.add_argument("--frames", type=int, default=3)
    p.add_argument("--no-impression", action="store_true")
    p.add_argument("--out", type=Path, default=FOLDER / "eval.jsonl")
    a = p.parse_args()
    lab = Lab(a.weights)
    motion = a.frames > 3
    if not a.no_impression:
        print("impression", first_impression(lab, steps=a.steps), flush=True)
        print("stated", stated_right(lab, steps=a.steps), flush=True)
    for kind in a.kind:
        texts, seeds, stated, rows, d = scanned(lab, kind, a.n, a.split, a.steps, a.frames, a.first, tag=a.tag)
        cs = cases_of(rows, stated, a.most)
        ab = absent_of(rows, max(3, a.most // 2))
        for scale in a.scale:
            rule = Seen(scale)

            def go(cases):
                return lab.make(
                    [texts[c.index] for c in cases],
                    [seeds[c.index] for c in cases],
                    [[c.text] for c in cases],
                    rule,
                    a.steps,
                    a.frames,
                    a.first,
                )

            v = go(cs)
            vs = [judge(rows[c.index], v.row(i), c, motion) for i, c in enumerate(cs)]
            t = table(cs, vs)
            w = go(ab)
            la = [left_alone(rows[c.index], w.row(i), motion) for i, c in enumerate(ab)]
            moved = (w.latents - torch.stack([d["latents"][c.index] for c in ab])).square().mean().sqrt().item()
            kept = (v.latents - torch.stack([d["latents"][c.index] for c in cs])).square().mean().sqrt().item()
            print(
                show(f"{a.tag} {kind} {a.steps} scale {scale}", t, True),
                f"\n    left alone {sum(la) / len(la):.3f} ({len(la)}) rms {moved:.3f}; shown rms {kept:.3f}; lost {Counter(l for x in vs for l in x.lost)}",
                flush=True,
            )
            with a.out.open("a") as f:
                f.write(
                    json.dumps(
                        {
                            "tag": a.tag,
                            "kind": kind,
                            "steps": a.steps,
                            "first": a.first,
                            "frames": a.frames,
                            "split": a.split,
                            "scale": scale,
                            "left_alone": sum(la) / len(la),
                            "left_n": len(la),
                            "rms": moved,
                            "table": t,
                        }
                    )
                    + "\n"
                )


if __name__ == "__main__":
    main()
