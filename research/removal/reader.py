# ruff: noqa: B905, D103
"""Trains the latent reader on first chunks of the data (it has nothing in common with the detector that measures)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
import torch.nn.functional as nn_f
from lab import FOLDER
from torch import nn

from nasa_video.sprites import detectors
from nasa_video.sprites.detectors import HEADS, targets
from nasa_video.training.checkpoint import Average
from nasa_video.training.detector import detector_loss
from nasa_video.training.latent_detector import blurred_by_noise
from nasa_video.training.optimiser import MatrixOptimiser, inner_convolution, warm_then_linear


class FoldedReader(nn.Module):
    """Latents (B, 3, C, h, w) of a first chunk, time folded into channels, to logits as the detector has them."""

    def __init__(self, channels=12, width=96):
        super().__init__()
        self.first = nn.Conv2d(3 * channels, width, 3, 1, 1)
        self.rest = nn.ModuleList(nn.Conv2d(width, width, 3, 1, 1) for _ in range(3))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for _ in range(4))
        self.heads = nn.ModuleDict({n: nn.Linear(2 * width, s) for n, s in HEADS.items()})

    def forward(self, latents):
        x = self.norms[0](nn_f.silu(self.first(latents.flatten(1, 2).contiguous(memory_format=torch.channels_last))))
        for conv, norm in zip(self.rest, list(self.norms)[1:]):
            x = norm(x + nn_f.silu(conv(x)))
        pooled = torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)
        return {n: head(pooled) for n, head in self.heads.items()}


PATH = FOLDER / "reader.pt"


def load_reader():
    net = FoldedReader()
    net.load_state_dict(torch.load(PATH))
    return net.eval().requires_grad_(False)


@torch.no_grad()
def read_latents(net, x):
    logits = {k: v.float() for k, v in net(x).items()}
    read = detectors._read(logits)
    return {n: read[n] for n in detectors.ATTRIBUTES}, logits


if __name__ == "__main__":
    from clips import clips

    its, most = int(sys.argv[1]), 0.35
    pool = clips(256 * int(sys.argv[2]))
    n = len(pool.latents)
    held = 512
    torch.manual_seed(0)
    net = FoldedReader()
    opt = MatrixOptimiser(net, inner_convolution, 2e-3, 1e-3)
    avg = Average(net, 0.995)
    import time

    t = time.time()
    for step in range(1, its + 1):
        g = torch.Generator().manual_seed(step)
        i = torch.randint(n - held, (64,), generator=g)
        x = pool.latents[i].float()
        if torch.rand((), generator=g) < 0.5:
            x = blurred_by_noise(x, most, g)
        with torch.autocast("cpu", torch.bfloat16):
            lo = net(x)
        loss = detector_loss({k: v.float() for k, v in lo.items()}, targets(pool.scenes[i]))
        loss.backward()
        opt.step(warm_then_linear(step / its))
        avg.update(net)
        if step % 100 == 0:
            print(step, float(loss), time.time() - t, flush=True)
    avg.copy_to(net)
    net.eval()
    torch.save(net.state_dict(), PATH)
    i = torch.arange(n - held, n)
    lab, _ = read_latents(net, pool.latents[i].float())
    truth = detectors.truth(pool.scenes[i])
    print({k: sum(a == b for a, b in zip(lab[k], truth[k])) / held for k in lab})
