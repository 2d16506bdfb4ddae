# ruff: noqa: B023, D103, RUF059
"""Removal distillation: guided from its second step on, the student removes what the first step has laid down.

    python train.py OUT ITERATIONS [--start FILE] [--rank R --ranks N]

Lessons (a share of the iterations each):
  pair    exact pairs of the data: the scene with the thing, noised to the second step's level, goes in with a short
          caption and the negatives; wanted is what the frozen copy makes of the SAME noise around the scene WITHOUT it,
          when told all of that scene. Then on along the student's own steps.
  open    the student's own first steps: where the unguided video shows a flaw that nobody asked for, the copy is told
          all but that; else it stays what it was, with and without negatives that name nothing there
  later   chunks behind a clean one
  one     the single step from noise, kept as it was; guided where the caption states everything
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
import torch.nn.functional as nn_f
from bank import BANK, phrase
from lab import DEVICE, SCHEDULES, SHIPPED, autocast, model_of
from pairs import PAIRS
from safetensors.torch import save_file
from told import told as told_of

from causvid_adapter.noise import SeededNoise
from nasa_video.sprites.captions import _ALWAYS_THERE
from nasa_video.sprites.world import ATTRIBUTES, FLAWS
from nasa_video.text import WordLlamaEncoder
from nasa_video.training.attention import compile_blocks, matrix_attention
from nasa_video.training.checkpoint import Average
from nasa_video.training.optimiser import MatrixOptimiser, block_matrix, warm_then_linear
from nasa_video.training.parallel import join_team

ABSENT = {
    **dict.fromkeys(FLAWS, 3.0),
    "weather": 3.0,
    "texture": 2.0,
    "count": 2.0,
    "background": 2.5,
    "colour": 2.5,
    "size": 1.0,
    "shape": 1.5,
    "motion": 1.5,
}
NOT_A_THING = {"no", "none", "plain", "one"}

TOKENS, WIDTH = 24, 3


class GuidedTraining:
    """Processor of block.attn2: the context is a prompt's 24 tokens and 24 of each negative, padding and all; the
    same numbers as folded keys give. An empty negative attends to padding alone and adds nothing."""

    alpha = torch.tensor(0.0)

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, rotary_emb=None):
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        k = attn.norm_k(attn.to_k(encoder_hidden_states)).unflatten(2, (attn.heads, -1))
        v = attn.to_v(encoder_hidden_states).unflatten(2, (attn.heads, -1))
        q, k = q.to(v.dtype), k.to(v.dtype)
        z = matrix_attention(q, k[:, :TOKENS], v[:, :TOKENS], None)
        for start in range(TOKENS, k.shape[1], TOKENS):
            end = start + TOKENS
            own = matrix_attention(q, k[:, start:end], v[:, start:end], None) - v[:, end - 1 : end]
            z = z - self.alpha.to(z.dtype) * own
        return attn.to_out[1](attn.to_out[0](z.flatten(2).type_as(hidden_states)))


class Guided:
    """A model, guided where negatives are given; its blocks are compiled."""

    def __init__(self, model, guided):
        self.model, self.processor = model, GuidedTraining()
        if guided:
            for block in model.transformer.blocks:
                block.attn2.set_processor(self.processor)
        compile_blocks(model)

    def __call__(self, x, t, context, alpha=0.0, **kw):
        self.processor.alpha = torch.tensor(alpha, device=DEVICE)
        with autocast():
            return self.model(x, t, context, **kw).float()


def load_bank():
    items, final, unguided = [], [], []
    for path in sorted(BANK.glob("*.pt")):
        s = torch.load(path)
        items += s["items"]
        final.append(s["final"])
        unguided.append(s["unguided"])
    return items, torch.cat(final), torch.cat(unguided)


def absent_terms(item, k, rng):
    names = list(ABSENT)
    found = []
    for _ in range(k):
        a = rng.choices(names, list(ABSENT.values()))[0]
        shown = {ATTRIBUTES[a][item["scene0"][a]], ATTRIBUTES[a][item["scene"][a]]}
        if a in ("shape", "colour"):
            shown |= {ATTRIBUTES[a][item["scene0"][a + "2"]], ATTRIBUTES[a][item["scene"][a + "2"]]}
        if a in item["unsure"]:
            continue
        values = [v for v in ATTRIBUTES[a] if v not in shown and v not in NOT_A_THING]
        if values:
            found.append(phrase(a, rng.choice(values), rng))
    return found


def negatives_of(item, rng):
    terms = [phrase(a, v, rng) for a, v in item["things"]]
    if terms:
        if rng.random() < 0.35:
            terms += absent_terms(item, rng.randrange(1, 4), rng)
    elif rng.random() < 0.5:
        terms = absent_terms(item, rng.choice((1, 1, 1, 2, 3)), rng)
        if item["flawed"] and rng.random() < 0.5:
            terms.append(phrase(item["flawed"][0], item["flawed"][0], rng))
    if rng.random() < 0.12 and len(terms) > 1:
        terms = [", ".join(terms)]
    rng.shuffle(terms)
    return terms[:WIDTH]


def load_pairs():
    items, a, b = [], [], []
    for path in sorted(PAIRS.glob("*.pt")):
        s = torch.load(path)
        items += s["items"]
        a.append(s["a"])
        b.append(s["b"])
    return items, torch.cat(a), torch.cat(b)


SOFT = {"weather", "background", "colour", "size", "texture", "count", "shape"}


def everything(item, scene, rng):
    """A caption of all there is; the item's own where it states all."""
    full = item["same"] and set(item["stated"]) >= _ALWAYS_THERE
    return item["caption"] if full else told_of(scene, rng, item["unsure"])


def main():
    p = argparse.ArgumentParser()
    p.add_argument("out", type=Path)
    p.add_argument("iterations", type=int)
    p.add_argument("--batch", type=int, default=24)
    p.add_argument("--start", type=Path)
    p.add_argument("--matrix", type=float, default=6e-4)
    p.add_argument("--other", type=float, default=4e-4)
    p.add_argument("--low", type=float, default=0.4)
    p.add_argument("--high", type=float, default=1.0)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--save", type=int, default=50)
    p.add_argument("--stop", type=int, default=10**9)
    p.add_argument("--rank", type=int, default=0)
    p.add_argument("--ranks", type=int, default=1)
    p.add_argument("--width", type=int, default=4)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    shipped = SHIPPED
    frozen, student = Guided(model_of(shipped), False), Guided(model_of(a.start or shipped), True)
    student.model.requires_grad_(True)
    opt = MatrixOptimiser(student.model, block_matrix, a.matrix, a.other, betas=(0.9, 0.95))
    avg = Average(student.model, 0.98)
    encoder = WordLlamaEncoder(24)
    team = join_team(a.rank, a.ranks, a.out / "team")
    start = 0
    ck = a.out / "state.pt"
    if ck.exists():
        s = torch.load(ck)
        student.model.load_state_dict(s["model"])
        opt.load_state_dict(s["opt"])
        avg.load_state_dict(s["avg"])
        start = s["step"]
    items, final, unguided = load_bank()
    ok = [i for i, item in enumerate(items) if not item["wrong"]]
    full = [i for i in ok if set(items[i]["stated"]) >= _ALWAYS_THERE]
    print(len(items), "items", len(ok), "right", flush=True)
    pair_items, pair_a, pair_b = load_pairs()
    schedule, steps = SCHEDULES[4].alone, SCHEDULES[4].timesteps
    t0, sums = time.time(), {}
    for step in range(start + 1, min(a.iterations, a.stop) + 1):
        if step % 40 == 0 and len(list(PAIRS.glob("*.pt"))) * 256 > len(pair_items):
            pair_items, pair_a, pair_b = load_pairs()
        plan = random.Random(a.seed * 1_000_003 + step)  # the same in the whole team, so that nobody waits
        rng = random.Random((a.seed * 1_000_003 + step) * 16 + a.rank)
        kind = plan.random()
        lesson = "pair" if kind < 0.56 else "open" if kind < 0.84 else "later" if kind < 0.94 else "one"
        first, last = (
            (1, plan.choices((1, 2, 3), (0.5, 0.25, 0.25))[0])
            if lesson == "pair"
            else (0, plan.choices((0, 1, 2, 3), (0.3, 0.3, 0.2, 0.2))[0])
        )
        calls = plan.choice((0, 0, 1, 2, 3))
        size = a.batch if lesson != "later" else a.batch // 2
        chosen = rng.choices(range(len(pair_items)) if lesson == "pair" else full if lesson == "one" else ok, k=size)
        drawn = [(pair_items if lesson == "pair" else items)[i] for i in chosen]
        alpha = rng.uniform(a.low, a.high)
        terms, texts, tolds = [], [d["caption"] for d in drawn], []
        for d in drawn:
            row = negatives_of(d, rng)
            told_ = d["told"] if lesson in ("later", "one") else None
            if lesson == "pair":
                told_ = everything(d, d["scene"], rng)
            elif lesson == "open":
                soft = d["things"] and {t[0] for t in d["things"]} <= SOFT and rng.random() < 0.6
                if d["things"] and not soft:  # a negative that names nothing there
                    row = absent_terms(d, rng.choice((1, 1, 2, 3)), rng) if rng.random() < 0.6 else []
                unguided_told = told_of(d["scene0"], rng, d["unsure"]) if d["flawed"] else d["caption"]
                # Behind the first step the copy is told all: by a short caption it would take a soft picture for a
                # blurry one, and go on so.
                told_ = (unguided_told, d["told"] if soft else everything(d, d["scene0"], rng))
            terms.append(row)
            tolds.append(told_)

        def told_embeds(texts):
            return encoder(texts).embeds.to(DEVICE)

        text = torch.cat(
            [
                encoder(texts).embeds,
                *(encoder([t[j] if j < len(t) else "" for t in terms]).embeds for j in range(WIDTH)),
            ],
            1,
        ).to(DEVICE)
        noise = SeededNoise(
            [d["seed"] if "seed" in d else rng.randrange(10**9, 2 * 10**9) for d in drawn], (12, 8, 8), DEVICE
        )
        values = {}

        def match(x, t, name, told, alpha, wanted=None, **kw):
            if wanted is None:
                with torch.no_grad():
                    wanted = frozen(x, t, told, **kw)
            flow = student(x, t, text, alpha, **kw)
            n = kw.get("frames_per_chunk", 3)
            loss = nn_f.mse_loss(flow[:, -n:], wanted[:, -n:])
            loss.backward()
            values[name] = float(loss.detach())
            return flow.detach()

        if lesson == "pair":
            told, clean_a, clean_b, n = (
                told_embeds(tolds),
                pair_a[chosen].float().to(DEVICE),
                pair_b[chosen].float().to(DEVICE),
                noise(range(3), 0),
            )
            t = schedule.timesteps[1]
            level = t / 1000
            x, other = (1 - level) * clean_a + level * n, (1 - level) * clean_b + level * n
            with torch.no_grad():
                wanted = (x - (other - level * frozen(other, t, told))) / level
            flow = match(x, t, "pair 750", None, alpha, wanted)
            for k in range(1, last + 1):
                if k > 1:
                    flow = match(x, schedule.timesteps[k], f"pair {schedule.timesteps[k]:g}", told, alpha)
                x = schedule.step(x, flow, k, lambda: noise(range(3), k + 1))
        elif lesson == "open":
            before, after, x = (
                told_embeds([t[0] for t in tolds]),
                told_embeds([t[1] for t in tolds]),
                noise(range(3), 0),
            )
            for k in range(last + 1):
                flow = match(
                    x, schedule.timesteps[k], f"{schedule.timesteps[k]:g}", after if k else before, alpha if k else 0.0
                )
                x = schedule.step(x, flow, k, lambda: noise(range(3), k + 1))
        elif lesson == "later":
            told, context, x = told_embeds(tolds), final[chosen].float().to(DEVICE), noise(range(3, 6), 0)

            def times(t):
                return torch.cat((torch.zeros(size, 3), torch.full((size, 3), t)), 1).to(DEVICE)

            for k in range(calls):
                with torch.no_grad():
                    flow = frozen(torch.cat((context, x), 1), times(steps[k]), told, frames_per_chunk=3)[:, -3:]
                x = SCHEDULES[4].step(x, flow, k, lambda: noise(range(3, 6), k + 1))
            match(torch.cat((context, x), 1), times(steps[calls]), "later", told, alpha, frames_per_chunk=3)
        else:
            match(noise(range(3), 0), 1000.0, "one", told_embeds(tolds), alpha)
        team.average_gradients(student.model)
        gradient = opt.step(warm_then_linear(step / a.iterations, flat=0.55))
        avg.update(student.model)
        if a.rank:
            continue
        for k, v in (values | {"gradient": gradient}).items():
            s = sums.setdefault(k, [0.0, 0])
            s[0] += v
            s[1] += 1
        if step % 10 == 0:
            print(
                step, f"{time.time() - t0:.0f}s", {k: round(s / n, 4) for k, (s, n) in sorted(sums.items())}, flush=True
            )
            sums = {}
        if step % a.save == 0 or step == a.iterations:
            torch.save(
                {"step": step, "model": student.model.state_dict(), "opt": opt.state_dict(), "avg": avg.state_dict()},
                ck,
            )
            weights = {k.removeprefix("transformer."): v.half().contiguous() for k, v in avg.shadow.items()}
            save_file(weights, a.out / "student.safetensors")
            if step % 100 == 0:
                save_file(weights, a.out / f"student-{step}.safetensors")


if __name__ == "__main__":
    main()
