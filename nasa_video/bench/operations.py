"""Operations a chunk of every method: counted by torch, and by formula."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from causvid_adapter.sizes import WanSizes
from nasa_video.bench.case import Case
from nasa_video.bench.flops import flop_counter, mean_chunk_flops, prompt_flops
from nasa_video.bench.subject import BASELINE, Method, Rollout, Subject

# Layers are alike, so the operations of any number of them follow from those of one and of two.
COUNTED_LAYERS = (1, 2)

Report = Callable[[str, int, int], None]
"""Told of what is done now, how much of it is done, and how much there is."""


class Operations:
    """Operations a chunk: counted over a video's first chunk, and by formula for it and for the mean of all."""

    def __init__(self, case: Case, subject: Subject, chunks: int, counted: dict[str, float]) -> None:
        self.case, self.subject, self.chunks, self.counted = case, subject, chunks, counted

    def row(self, method: Method) -> dict[str, float]:
        """Figures of a method; the ratio is that of the means."""
        mean, baseline = (analytic_flops(self.case, self.subject, m, self.chunks) for m in (method, BASELINE))
        return {
            "first_chunk_counted": self.counted[method.name],
            "first_chunk_analytic": analytic_flops(self.case, self.subject, method, 1),
            "mean_analytic": mean,
            "ratio": mean / baseline,
        }


def count_flops(case: Case, report: Report) -> dict[str, float]:
    """Operations of a video's first chunk by torch's counter, on tensors that have shapes and no numbers."""
    counts: dict[str, list[float]] = {}
    for layers in COUNTED_LAYERS:
        subject = case.subject(torch.device("meta"), layers)
        for number, method in enumerate(case.methods):
            report(f"counting operations at {case.width} x {case.height}", number, len(case.methods))
            counts.setdefault(method.name, []).append(count_video(subject, method, 1))
    first, second = COUNTED_LAYERS
    return {name: one + (case.layers - first) / (second - first) * (two - one) for name, (one, two) in counts.items()}


@torch.no_grad()
def count_video(subject: Subject, method: Method, chunks: int) -> float:
    """Operations of a video's chunks, counted while it is made; nothing is computed when the model is on "meta"."""
    device = subject.model.device

    def noise(frames: range, step: int) -> Tensor:
        return torch.zeros(1, len(frames), *subject.latent_shape, device=device)

    subject.branches(method)  # the prompt's keys are made once, before
    with flop_counter() as counter:
        rollout = Rollout(subject, method, chunks, noise, lambda: (float(counter.get_total_flops()),))
        for _ in range(chunks + Rollout.extra_turns):
            rollout.turn()
    return sum(operations for (operations,) in rollout.spent)


def analytic_flops(case: Case, subject: Subject, method: Method, chunks: int) -> float:
    """Mean over a video's first chunks, by formula, at the case's size and layers."""
    sizes = WanSizes.of(case.config, case.layers)
    loop = replace(subject.loop, tokens_per_frame=sizes.tokens_per_frame(*case.latent_shape[1:]))
    return mean_chunk_flops(sizes, loop, chunks, subject.branches(method))


def prompt_operations(subject: Subject, method: Method) -> int:
    """Operations that make the keys of the method's prompts, once a prompt, by formula."""
    return sum(prompt_flops(subject.sizes, n) for branch in subject.branches(method) for n in branch)
