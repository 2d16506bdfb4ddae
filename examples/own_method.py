"""A guidance method of one's own: registered once, it has a spelling and works wherever the built-in ones do.

python examples/own_method.py [OUTPUT.mp4]

The method here is centred NASA that acts only on tokens where the negative is strong: a hard gate in place of a limit.
"""

# B batch, Q query tokens, H heads, D head dim

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor

from nasa_video import AttentionGuidance, VideoPipeline, register
from nasa_video.files.sinks import open_sink
from nasa_video.guidance.attention import Attend, TextKeys, WeightedKeys
from nasa_video.guidance.formulas import nasa, norm_share
from nasa_video.guidance.methods import GuidedAttention, setting


@register
@dataclass(frozen=True)
class Gated(AttentionGuidance):
    """``Z = Z+ - scale g (Z- - Z0)``, g = 1 in tokens where |Z- - Z0| is more than ``threshold`` of |Z+|, else 0."""

    name: ClassVar[str] = "gated"
    label: ClassVar[str] = "gated NASA"

    threshold: float = setting(0.2, "share of |Z+| from which a token is guided")

    def __call__(
        self, q: Tensor, positive: TextKeys, negatives: Sequence[WeightedKeys], attend: Attend
    ) -> GuidedAttention:
        """Guide one layer; q is (B, Q, H, D)."""
        z_pos = attend(q, positive)
        added = z_pos.new_zeros(z_pos.shape)
        for keys, weight in negatives:
            its_own = attend(q, keys) - keys.padding_v
            lengths, longest = (x.flatten(-2).norm(dim=-1)[..., None, None] for x in (its_own, z_pos))
            added = added + weight * (lengths > self.threshold * longest) * its_own
        return GuidedAttention(nasa(z_pos, added, scale=self.scale), z_pos, norm_share(z_pos, self.scale * added))


def main(output: str) -> None:
    """Use it by its spelling, as the command line, a preset or a timeline would."""
    pipe = VideoPipeline.from_pretrained("sprites")
    chunks = list(pipe.stream("a red ball bouncing", negative="red", guidance="gated:1,threshold=0.3", seed=3))
    print(f"{chunks[0].state.guidance}: effect {chunks[-1].effect}")
    with open_sink(output, fps=pipe.preset.video.fps) as sink:
        sink.write(np.concatenate([chunk.frames for chunk in chunks]))
    print(output)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "own_method.mp4")
