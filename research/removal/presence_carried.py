# ruff: noqa: E501
"""Label-free calibration whose two classes differ in the picture alone: the first step is told "x, F" or "x", the rest "x".

What the first step lays down stays, so that the picture shows F while the prompt does not say it, as where a seed chose
it. Calibrated on that, tested on the unguided videos of presence_eval.py: python presence_carried.py TAG [WEIGHTS] [--k 16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from cases import prompts_of
from lab import FOLDER, SHIPPED, Lab
from presence import STATS, Recorder, auc, fit, score
from presence_eval import text_of


class Carried(Recorder):
    """A recorder whose first step takes another prompt (`state.extra`)."""

    def __call__(self, state, layer, q, positive, negatives):
        if state.call.chunk == 0 and state.call.step == 0:
            positive = state.extra[0].layers[layer]
        return super().__call__(state, layer, q, positive, negatives)


def main() -> None:
    """Prints areas by term: best single feature and ridge, chosen on the calibration alone."""
    p = argparse.ArgumentParser()
    p.add_argument("tag")
    p.add_argument("weights", type=Path, nargs="?", default=SHIPPED)
    p.add_argument("--k", type=int, default=16)
    a = p.parse_args()
    lab = Lab(a.weights)
    data = torch.load(FOLDER / f"presence-{a.tag}.pt", weights_only=False)
    texts, seeds, _ = prompts_of("short", a.k, "calibrating")
    rows = []
    for (attribute, value), d in data.items():
        word = text_of(attribute, value)
        first = [[t] for t in texts] + [[f"{t}, {word}"] for t in texts]
        recorder = Carried()
        args = ([*texts, *texts], [*seeds, *(s + 5000 for s in seeds)], [[word]] * (2 * a.k), recorder)
        lab.make(*args, extra=first, decode=False)
        c, said, probe, shown = recorder.features[:, 0], torch.arange(2 * a.k) >= a.k, d["probe"], d["shown"]
        row = {}
        for step in range(1, probe.shape[1]):
            x = c[:, step].flatten(1)
            areas = torch.tensor([auc(x[:, j], said) for j in range(x.shape[1])])
            j = int((areas - 0.5).abs().argmax())
            sign = 1 if areas[j] > 0.5 else -1
            row[f"single {step + 1}"] = auc(sign * probe[:, step].flatten(1)[:, j], shown)
            row[f"ridge {step + 1}"] = auc(score(fit(x, said), probe[:, step].flatten(1)), shown)
            row[f"calibration {step + 1}"] = float(areas[j] if sign > 0 else 1 - areas[j])
        rows.append(row)
        print(attribute, value, int(shown.sum()), STATS[j % 4], {k: round(v, 2) for k, v in row.items()}, flush=True)
    print("mean", {k: round(sum(r[k] for r in rows) / len(rows), 3) for k in rows[0]})


if __name__ == "__main__":
    main()
