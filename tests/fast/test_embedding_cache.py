"""Embeddings from disk are the encoder's, and the encoder is loaded only when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from nasa_video.text import TextContext, WordLlamaEncoder
from nasa_video.text.embedding_cache import CachedEncoder, identity_of


class Loads:
    """Counts how often the encoder is loaded and what it is asked."""

    def __init__(self) -> None:
        self.count = 0
        self.asked: list[str] = []
        self.encoder = WordLlamaEncoder(max_tokens=6)

    def __call__(self) -> Loads.Encoder:
        self.count += 1
        return Loads.Encoder(self)

    class Encoder:
        max_tokens = 6

        def __init__(self, loads: Loads) -> None:
            self.loads = loads

        def __call__(self, prompts: Sequence[str]) -> TextContext:
            self.loads.asked += prompts
            return self.loads.encoder(prompts)


PROMPTS = ["a red ball", "", "a red ball", "one two three four five six seven eight"]


def same(a: TextContext, b: TextContext) -> bool:
    return torch.equal(a.embeds, b.embeds) and torch.equal(a.lengths, b.lengths) and a.cut == b.cut


def test_what_comes_from_disk_is_what_the_encoder_gives(tmp_path: Path) -> None:
    loads = Loads()
    first = CachedEncoder(loads, "x", 6, tmp_path)(PROMPTS)
    again = CachedEncoder(loads, "x", 6, tmp_path)(PROMPTS)
    assert same(first, loads.encoder(PROMPTS))
    assert same(again, first)
    assert (loads.count, len(loads.asked)) == (1, 3)


def test_other_weights_are_asked_anew(tmp_path: Path) -> None:
    loads = Loads()
    CachedEncoder(loads, "x", 6, tmp_path)(["a"])
    CachedEncoder(loads, "y", 6, tmp_path)(["a"])
    assert loads.count == 2
    weights = tmp_path / "w"
    weights.write_bytes(b"1")
    before = identity_of(weights, torch.float32)
    weights.write_bytes(b"22")
    assert identity_of(weights, torch.float32) != before
    assert identity_of(weights, torch.bfloat16) != identity_of(weights, torch.float32)


def test_the_encoder_is_let_go_unless_it_is_wanted_again(tmp_path: Path) -> None:
    loads = Loads()
    once, live = CachedEncoder(loads, "x", 6, tmp_path), CachedEncoder(loads, "y", 6, tmp_path, keep_loaded=True)
    for prompt in ("a", "b"):
        once([prompt])
        live([prompt])
    assert loads.count == 2 + 1


def test_a_damaged_entry_is_made_again(tmp_path: Path) -> None:
    loads = Loads()
    first = CachedEncoder(loads, "x", 6, tmp_path)(["a red ball"])
    (entry,) = tmp_path.glob("*.safetensors")
    entry.write_bytes(entry.read_bytes()[:20])
    assert same(CachedEncoder(loads, "x", 6, tmp_path)(["a red ball"]), first)
    assert loads.count == 2


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    loads = Loads()
    encoder = CachedEncoder(loads, "x", 6, tmp_path / "file" / "below")
    assert same(encoder(["a"]), loads.encoder(["a"]))
