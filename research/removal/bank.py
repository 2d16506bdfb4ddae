# ruff: noqa: B007, D103
"""The lesson's bank: unguided videos of the frozen student, what they show, and what they should show instead.

An item is a caption, a seed, what the frozen copy shows of it (read by the latent reader), the things that negatives
name, and a full caption of the scene without them and without flaws that the caption does not state. The frozen copy,
told that caption from the first step on with the same noise, is the lesson's model; items whose told video does not
show the scene (by the reader) are marked.

    python bank.py SHARDS FIRST     of 128 items
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from lab import FOLDER
from reader import load_reader, read_latents
from told import row_of, told, unsure_of, without

from nasa_video.sprites.captions import TERMS, caption_for_training, random_caption, things_to_state
from nasa_video.sprites.world import ATTRIBUTES, FLAWS, sample_scenes

BANK = FOLDER / "bank"
SHARD = 128
FIRST_SEED = 50_000_000
_BASIC = ("colour", "size", "motion", "background")
PICK = {
    **dict.fromkeys(FLAWS, 3.0),
    "weather": 3.0,
    "texture": 3.0,
    "count": 3.0,
    "background": 1.6,
    "colour": 1.6,
    "size": 1.4,
    "shape": 1.0,
    "motion": 0.8,
}


def caption_of(row, rng):
    kind = rng.random()
    if kind < 0.04:
        from nasa_video.sprites.captions import Caption

        return Caption("", frozenset())
    if kind < 0.56:
        stated = {"shape"} if rng.random() < 0.85 else set()
        stated |= set(rng.sample(_BASIC, rng.randrange(3)))
        if rng.random() < 0.3 or not stated:
            stated.add(rng.choice(things_to_state(row)))
        return caption_for_training(row, frozenset(stated), rng)
    return random_caption(row, rng, full=kind > 0.80)


def scene_of(labels, row, stated):
    """What is to be seen: as read, what is stated as stated, no flaw that is not."""
    scene = row_of(labels)
    for name in stated:
        scene[name] = row[name]
        if name in ("shape", "colour") and "count" in stated and row["count"] == 1:
            scene[name + "2"] = row[name + "2"]
    for flaw in FLAWS:
        if flaw not in stated:
            scene[flaw] = 0
    if scene["count"] == 1:
        scene["size"] = 0
        for n in ("shape", "colour"):
            if scene[n] == scene[n + "2"]:
                scene[n + "2"] = (scene[n] + 1) % len(ATTRIBUTES[n])
    return scene


def order_of(logits, i):
    plain = {"texture": [0, 1, 2], "weather": [0, 1, 2], "count": [0, 1]}  # nothing in the place of these
    return plain | {
        k: [v for v in logits[k][i].argsort(descending=True).tolist() if v < len(ATTRIBUTES[k])]
        for k in ("colour", "shape", "size", "motion", "background")
    }


def things_of(scene):
    things = [(f, f) for f in FLAWS if scene[f]]
    for n in ("weather", "texture", "count"):
        if scene[n]:
            things.append((n, ATTRIBUTES[n][scene[n]]))
    for n in ("background", "motion"):
        things.append((n, ATTRIBUTES[n][scene[n]]))
    if scene["count"] == 0:
        things.append(("size", ATTRIBUTES["size"][scene["size"]]))
    for n in ("shape", "colour"):
        things.append((n, ATTRIBUTES[n][scene[n]]))
    return things


def phrase(attribute, value, rng):
    if attribute == "count" and value == "two":
        return rng.choice(("two objects", "two shapes", "a pair of objects", "two objects"))
    choices = TERMS[attribute][value]
    return choices[0] if rng.random() < 0.7 else rng.choice(choices)


def pick_things(scene, unsure, rng):
    pool = [t for t in things_of(scene) if t[0] not in unsure]
    k = min(len(pool), rng.choices((1, 2, 3), (0.72, 0.2, 0.08))[0])
    picked = []
    for _ in range(k):
        t = rng.choices(pool, [PICK[t[0]] for t in pool])[0]
        picked.append(t)
        pool.remove(t)
    return picked


def shows_scene(scene, unsure, labels):
    """Whether labels are those of a scene, in what is not unsure; motion is not judged."""
    wrong = []
    for n in ("size", "texture", "background", "weather", *FLAWS, "count"):
        if n not in unsure and labels[n] != ATTRIBUTES[n][scene[n]]:
            wrong.append(n)
    for n in ("shape", "colour"):
        if n in unsure:
            continue
        want = {ATTRIBUTES[n][scene[n]]} | ({ATTRIBUTES[n][scene[n + "2"]]} if scene["count"] == 1 else set())
        if set(labels[n].split("+")) != want:
            wrong.append(n)
    return wrong


def shard(lab, reader, number):
    rng = random.Random(number)
    scenes = sample_scenes(SHARD, torch.Generator().manual_seed(900_000 + number))
    seeds = [FIRST_SEED + number * SHARD + i for i in range(SHARD)]
    rows = [scenes.row(i) for i in range(SHARD)]
    captions = [caption_of(row, rng) for row in rows]
    ahead = BANK / f"{number:04d}.unguided"
    if not ahead.exists():
        torch.save(lab.make([c.text for c in captions], seeds, decode=False).latents, ahead)
    if reader is None:
        return None
    unguided = torch.load(ahead)
    # The shipped detector says what is there (its gradient is never used), the latent reader how it moves: of nine
    # frames the detector reads the motion right in 48 %, the reader in 90.
    seen_ = lab.read(unguided)
    labels, logits = seen_.labels, seen_.logits
    moves, by_reader = read_latents(reader, unguided)
    labels["motion"], logits["motion"] = moves["motion"], by_reader["motion"]
    items = []
    for i in range(SHARD):
        seen = {n: labels[n][i] for n in labels}
        stated = captions[i].stated
        if seen["count"] == "none":
            seen["count"] = "one"
        unsure = [u for u in unsure_of(seen) if u not in stated]
        scene0 = scene_of(seen, rows[i], stated)
        things = pick_things(scene0, unsure, rng) if rng.random() < 0.65 else []
        scene = without(scene0, things, order_of(logits, i))
        if scene["count"] == 1 and scene["size"] != 0:
            scene["size"] = 0
        flawed = [f for f in FLAWS if seen[f] == f and f not in stated]
        same = not things and not flawed
        free = [u for u in unsure if u not in {t[0] for t in things}]
        text = captions[i].text if same else told(scene, rng, free)
        items.append(
            {
                "caption": captions[i].text,
                "stated": sorted(stated),
                "seed": seeds[i],
                "seen": seen,
                "scene0": scene0,
                "scene": scene,
                "things": things,
                "flawed": flawed,
                "same": same,
                "told": text,
                "unsure": free,
            }
        )
    again = [i for i, item in enumerate(items) if not item["same"]]
    final = unguided.clone()
    made = lab.make([items[i]["told"] for i in again], [seeds[i] for i in again], decode=False).latents
    final[again] = made
    after = {n: ["" for _ in items] for n in labels}
    for j, row in enumerate(lab.read(made).labels.items()):
        for i, value in zip(again, row[1], strict=True):
            after[row[0]][i] = value
    for i, item in enumerate(items):
        item["wrong"] = (
            [] if item["same"] else shows_scene(item["scene"], item["unsure"], {n: after[n][i] for n in after})
        )
    return {"items": items, "unguided": unguided.half(), "final": final.half()}


if __name__ == "__main__":
    from lab import Lab

    lab, reader = Lab(), None if "--ahead" in sys.argv else load_reader()
    BANK.mkdir(parents=True, exist_ok=True)
    t = time.time()
    for number in range(int(sys.argv[2]), int(sys.argv[2]) + int(sys.argv[1])):
        path = BANK / f"{number:04d}.pt"
        while reader is not None and not (BANK / f"{number:04d}.unguided").exists():
            time.sleep(3)
        if path.exists():
            continue
        s = shard(lab, reader, number)
        if s is None:
            print(number, time.time() - t, flush=True)
            continue
        torch.save(s, path.with_suffix(".part"))
        path.with_suffix(".part").rename(path)
        items = s["items"]
        told_ = [i for i in items if not i["same"]]
        print(
            number,
            round(time.time() - t),
            "told",
            len(told_),
            "right",
            sum(not i["wrong"] for i in told_) / max(1, len(told_)),
            "flawed",
            sum(bool(i["flawed"]) for i in items) / SHARD,
            flush=True,
        )
