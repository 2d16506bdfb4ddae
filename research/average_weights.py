"""A mean of two models' weights: python research/average_weights.py FIRST SECOND SHARE OUTPUT

FIRST and SECOND are safetensors files of one architecture, SHARE in [0, 1] is what the second counts. A mean of a tuned
model's weights and those it began with is a good model too (arXiv 2109.01903); docs/method/variety.md says what for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from safetensors.torch import load_file, save_file


def average(
    first: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    second: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    share: Annotated[float, typer.Argument(min=0, max=1)],
    output: Path,
) -> None:
    """Writes (1 - SHARE) FIRST + SHARE SECOND, each tensor in the first file's type."""
    one, other = load_file(first), load_file(second)
    shapes = [{name: value.shape for name, value in weights.items()} for weights in (one, other)]
    if shapes[0] != shapes[1]:
        raise typer.BadParameter("the files hold different tensors; a mean needs two models of one architecture")
    mean = {name: value.float().lerp(other[name].float(), share).to(value.dtype) for name, value in one.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    save_file(mean, output)


if __name__ == "__main__":
    typer.run(average)
