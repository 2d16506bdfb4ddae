"""One removal table in every way a run can go: whole, killed and resumed, damaged, in two shards, on Ray.

    python research/check_resume.py FOLDER [--n 2] [--ways killed,damaged,shards,ray] [--kills 3] [--seed 0]

Runs `nasa-video eval removal` on the shipped model each time, in processes of its own: one without a break; one that is
killed (SIGKILL, at random moments) and started again until it ends; one whose outputs were cut and changed; two shards
at once; Ray on this machine (pip install 'nasa-video[ray]'). Every way must give the rows of the first to the
last digit, make no finished cell again, and remake exactly what was damaged. Prints one line a way, and JSON last; ends
with status 1 where one differs. About two minutes on two free cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

# Four cells: enough that a kill comes before, in and after some of them.
TABLE = ("--methods", "none,nasa:1", "--steps", "1", "--cases", "conflict", "--attributes", "colour,background",
         "--frames", "9", "--device", "cpu", "--json")  # fmt: skip
CELLS = 4
Rows = list[dict[str, Any]]


class Wrong(Exception):
    """A way gave something else than the run without a break."""


def main() -> None:
    """Run every way and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n", type=int, default=2, help="videos a cell")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--ways", default="killed,damaged,shards,ray", help="comma list")
    asked = parser.parse_args()
    ways = {
        "killed": lambda: killed(table, whole, asked.kills, random.Random(asked.seed)),
        "damaged": lambda: damaged(table, whole),
        "shards": lambda: shards(table, whole),
        "ray": lambda: on_ray(table, whole),
    }
    chosen = [way.strip() for way in asked.ways.split(",")]
    if not set(chosen) <= set(ways):
        parser.error(f"--ways must be among {', '.join(ways)}, got {asked.ways}")
    shutil.rmtree(asked.folder, ignore_errors=True)
    table = Table(asked.folder, asked.n)
    start = time.monotonic()
    whole = table.run("whole")
    seconds = time.monotonic() - start
    print(f"whole: {CELLS} cells in {seconds:.0f} s", flush=True)
    told: dict[str, Any] = {"seconds": round(seconds, 1), "cells": CELLS, "n": asked.n}
    try:
        for way in chosen:
            told[way] = ways[way]()
    except Wrong as error:
        print(f"WRONG: {error}", file=sys.stderr)
        print(json.dumps({**told, "wrong": str(error)}))
        sys.exit(1)
    print(json.dumps({**told, "same": True}))


class Table:
    """Starts the command in folders below one."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder = folder
        self._n = n
        folder.mkdir(parents=True)

    def start(self, name: str, *options: str) -> subprocess.Popen[str]:
        """The command, in a process group of its own."""
        command = [sys.executable, "-m", "nasa_video", "eval", "removal", *TABLE, "--n", str(self._n)]
        return subprocess.Popen(
            [*command, "-o", str(self.folder / name), *options],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
            # Ray's workers give way to everything else by default, and would starve on a busy machine.
            env={**os.environ, "RAY_worker_niceness": "0"},
        )  # fmt: skip

    def end(self, process: subprocess.Popen[str]) -> tuple[dict[str, Any], str]:
        """Its JSON and what it told people."""
        out, said = process.communicate()
        if process.returncode:
            raise Wrong(f"the command ended with status {process.returncode}: {said[-600:]}")
        answer: dict[str, Any] = json.loads(out.splitlines()[-1])
        return answer, said

    def run(self, name: str, *options: str) -> Rows:
        """The rows of a whole run."""
        rows: Rows = self.end(self.start(name, *options))[0]["rows"]
        return rows

    def working(self, name: str, process: subprocess.Popen[str]) -> bool:
        """Whether it makes a cell right now: then it has a scratch folder with its number."""
        return any((self.folder / name / "cells" / ".work").glob(f"*-{process.pid}-*"))

    def cell_seconds(self, name: str) -> float:
        """How long a cell took."""
        times = sorted(self.finished(name).values())
        return (times[-1] - times[0]) / 1e9 / (len(times) - 1)

    def finished(self, name: str) -> dict[str, int]:
        """Records of finished cells, with their times of writing."""
        folder = self.folder / name / "cells"
        return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}


def killed(table: Table, whole: Rows, kills: int, rng: random.Random) -> dict[str, Any]:
    """Kill at random moments until it was killed so often, then let it end."""
    done: list[int] = []
    seconds = table.cell_seconds("whole")
    while len(done) < kills:
        before = table.finished("killed")
        process = table.start("killed")
        # The next cell or the one after it, and a random moment of it or of what follows.
        target = min(len(before) + rng.randrange(2), CELLS - 1)
        while process.poll() is None and (
            len(table.finished("killed")) < target or not table.working("killed", process)
        ):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 1.2 * seconds))
        ended = process.poll() is not None
        if not ended:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        unchanged(before, table.finished("killed"))
        if ended:
            break
        done.append(len(table.finished("killed")))
    before = table.finished("killed")
    same(table.run("killed"), whole, "the killed run")
    unchanged(before, table.finished("killed"))
    print(f"killed: {len(done)} times, with {done} of {CELLS} cells finished; then the same rows", flush=True)
    if not done:
        raise Wrong("the run ended before it was ever killed; give a larger --n")
    return {"kills": len(done), "finished_at_kill": done}


def damaged(table: Table, whole: Rows) -> dict[str, Any]:
    """Cut one output, change another, spoil a record: these three are made again, and nothing else."""
    shutil.copytree(table.folder / "whole", table.folder / "damaged")
    cells = table.folder / "damaged" / "cells"
    pictures = sorted(cells.glob("*.png"))
    pictures[0].write_bytes(pictures[0].read_bytes()[:100])
    content = bytearray(pictures[1].read_bytes())
    content[len(content) // 2] ^= 1
    pictures[1].write_bytes(content)
    record = pictures[2].with_suffix(".json")
    record.write_text(record.read_text()[:50])
    before = table.finished("damaged")
    same(table.run("damaged"), whole, "the run with damaged outputs")
    after = table.finished("damaged")
    remade = sorted(name for name in after if after[name] != before.get(name))
    expected = sorted(path.with_suffix(".json").name for path in pictures[:3])
    if remade != expected:
        raise Wrong(f"damaged were {expected}, remade {remade}")
    print("damaged: 3 cells found and remade, 1 left alone; the same rows", flush=True)
    return {"remade": 3}


def shards(table: Table, whole: Rows) -> dict[str, Any]:
    """Two processes at once, then the table from what they left."""
    parts = [table.start("shards", "--shard", f"{index}/2") for index in (0, 1)]
    for part in parts:
        table.end(part)
    before = table.finished("shards")
    same(table.run("shards"), whole, "two shards")
    unchanged(before, table.finished("shards"))
    if len(before) != CELLS:
        raise Wrong(f"two shards left {len(before)} of {CELLS} cells")
    print("shards: two at once; the same rows", flush=True)
    return {"count": 2}


def on_ray(table: Table, whole: Rows) -> dict[str, Any]:
    """The cells spread over Ray's actors on this machine."""
    same(table.run("ray", "--engine", "ray"), whole, "Ray")
    print("ray: the same rows", flush=True)
    return {"cells": len(table.finished("ray"))}


def same(rows: Rows, whole: Rows, what: str) -> None:
    """Equal to the last digit."""
    if rows != whole:
        raise Wrong(f"{what} gave other rows: {json.dumps(rows)[:400]} instead of {json.dumps(whole)[:400]}")


def unchanged(before: dict[str, int], after: dict[str, int]) -> None:
    """No finished cell was made again or lost."""
    again = sorted(name for name in before if after.get(name) != before[name])
    if again:
        raise Wrong(f"finished cells were made again: {', '.join(again)}")


if __name__ == "__main__":
    main()
