# ruff: noqa: D103, E402, E741, F403, F405, RUF005
"""Upper bound of a lesson: what the frozen copy shows when it is told the scene without the thing."""

import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from cases import *
from lab import Lab


def order(logits, i):
    o = {}
    for k in ("colour", "shape", "size", "texture", "motion", "background", "weather", "count"):
        o[k] = [v for v in logits[k][i].argsort(descending=True).tolist() if v < len(ATTRIBUTES[k])]
    return o


def swap(lab, texts, seeds, tolds, from_step=1, to_step=9, steps=4):
    class Rule:
        def __call__(self, state, layer, q, positive, negatives):
            s = state.call.step
            keys = negatives[0][0] if from_step <= s < to_step else positive
            return state.attend(q, keys)

    return lab.make(texts, seeds, [[t] for t in tolds], Rule(), steps=steps)


from scan import scanned
from told import row_of, told, unsure_of, without

lab = Lab()
texts, seeds, stated, rows, d = scanned(lab, "short", 480, "choosing")
cs = cases_of(rows, stated, 12)
rng = random.Random(0)
from collections import Counter

tolds, kept = [], []
for c in cs:
    row = without(row_of(rows[c.index]), [(c.attribute, c.value)], order(d["logits"], c.index))
    tolds.append(told(row, rng, [u for u in unsure_of(rows[c.index]) if u != c.attribute] + ["motion"] * 0))
ux = torch.stack([d["latents"][c.index] for c in cs])
for from_step, to in ((0, 9), (0, 1)):
    v = swap(lab, [texts[c.index] for c in cs], [seeds[c.index] for c in cs], tolds, from_step, to)
    vs = [judge(rows[c.index], v.row(i), c) for i, c in enumerate(cs)]
    print(show(f"told steps {from_step}..{to}", table(cs, vs), True), flush=True)
    print(
        Counter(l for x in vs for l in x.lost), "latent rms", (v.latents - ux).square().mean().sqrt().item(), flush=True
    )
idx = list(range(192))
t = [told(row_of(rows[i]), rng, unsure_of(rows[i])) for i in idx]
t2 = [told(row_of(rows[i]), rng, unsure_of(rows[i]) + ["motion"]) for i in idx]
for name, tt, a, b in (
    ("all from 0", t, 0, 9),
    ("all but motion from 0", t2, 0, 9),
    ("all from 1", t, 1, 9),
    ("all at 0 only", t, 0, 1),
):
    v = swap(lab, [texts[i] for i in idx], [seeds[i] for i in idx], tt, a, b)
    print(
        name,
        "same",
        sum(left_alone(rows[i], v.row(j)) for j, i in enumerate(idx)) / len(idx),
        {
            k: round(sum(rows[i][k] in (v.row(j)[k], "unsure") for j, i in enumerate(idx)) / len(idx), 3)
            for k in ATTRIBUTES
        },
        "rms",
        (v.latents - d["latents"][:192]).square().mean().sqrt().item(),
        flush=True,
    )
print("rms between different videos", (d["latents"][:192] - d["latents"][192:384]).square().mean().sqrt().item())
