"""What F1, F2 and F3 of NASA do to one joint attention layer, by the share of attention that the text gets.

    python research/measure_joint_numerics.py

Random queries, keys and values with what trained models have: all prompts share a part of their values, and the text
gets a set share of the attention. Prints the table of docs/method/joint_attention.md. Seconds on one CPU thread.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasa_video.backbones.joint import JointFormula, NegativeMass, PositiveMass, WholeOutput
from nasa_video.guidance.attention import SdpaAttend, TextKeys
from nasa_video.guidance.methods import Nasa

IMAGE, TEXT, HEADS, DIM, ALPHA = 256, 64, 4, 64, 0.5


def keys(generator: torch.Generator, tokens: int, common: Tensor, bias: float) -> TextKeys:
    """Random keys whose values share a common part of equal size; ``bias`` is added to their scores."""
    k, v = (torch.randn(1, tokens, HEADS, DIM, generator=generator) for _ in range(2))
    return TextKeys(k, v + common, torch.full((1, 1, 1, tokens), bias))


def mass_bias(share: float) -> float:
    """Bias that gives text keys ``share`` of the attention on average."""
    return math.log(share / (1 - share) * IMAGE / TEXT)


def report(name: str, formula: JointFormula, share: float) -> str:
    """One row: what an unrelated negative, a longer one, and the prompt itself as negative do."""
    generator = torch.Generator().manual_seed(0)
    attend, common = SdpaAttend(), torch.randn(1, 1, HEADS, DIM, generator=generator)
    q = torch.randn(1, IMAGE, HEADS, DIM, generator=generator)
    image = keys(generator, IMAGE, torch.randn(1, 1, HEADS, DIM, generator=generator), 0.0)
    positive = keys(generator, TEXT, common, mass_bias(share))
    other = keys(generator, TEXT, common, mass_bias(share))
    bias = torch.full((1, 1, 1, 2 * TEXT), mass_bias(share))
    longer = TextKeys(other.k.repeat(1, 2, 1, 1), other.v.repeat(1, 2, 1, 1), bias)
    same = TextKeys(positive.k, positive.v, positive.bias)
    cells = []
    for negative in (other, longer, same):
        guided = formula(Nasa(ALPHA), q, positive, [(negative, 1.0)], image, attend)
        change = (guided.z - guided.z_pos).flatten(2).norm(dim=-1) / guided.z_pos.flatten(2).norm(dim=-1)
        cells.append(f"{change.mean():.0%}")
    guided = formula(Nasa(ALPHA), q, positive, [(other, 1.0)], image, attend)
    z_image, _ = attend.with_lse(q, image)
    direction = torch.nn.functional.normalize(z_image.flatten(2), dim=-1)
    along = ((guided.z_pos - guided.z).flatten(2) * direction).sum(-1).abs()
    cells.append(f"{(along / (guided.z_pos - guided.z).flatten(2).norm(dim=-1)).mean():.2f}")
    return f"| {share:.0%} | {name} | {' | '.join(cells)} |"


def main() -> None:
    """Print the table."""
    print("| text's share | formula | change | negative twice as long | prompt as negative | along the image |")
    print("|---|---|---|---|---|---|")
    for share in (0.05, 0.2, 0.5):
        for name, formula in (("F1", WholeOutput()), ("F2", NegativeMass()), ("F3", PositiveMass())):
            print(report(name, formula, share))


if __name__ == "__main__":
    main()
