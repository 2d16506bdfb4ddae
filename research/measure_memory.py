"""Measure the peak memory of a run with random weights at a model's true size, and compare it with the plan.

    python research/measure_memory.py --model causvid --width 416 --height 240 --frames 21

    python research/measure_memory.py --model longlive --width 208 --height 128 --frames 165     # a rolling window

The run is a process of its own on the CPU; what it takes is its peak resident memory less what it had when everything
was imported. Prints one line a phase, for a window what it took while the window rolled, and last one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Wanted:
    """What to run."""

    model: str = "causvid"
    width: int = 416
    height: int = 240
    frames: int = 21
    steps: int = 1
    weights: str = "plain"
    dtype: str = "bfloat16"
    decode: int = 1  # 0 leaves out the VAE, which takes most of a CPU's time at full resolution
    window: int = -1  # latent frames; 0 is none, -1 the model's own
    sink: int = -1

    def preset(self) -> Any:
        """The model's, with the window that was asked for."""
        from nasa_video.models.presets import find_preset

        preset = find_preset(self.model)
        window, sink = (None if frames < 0 else frames for frames in (self.window, self.sink))
        return preset.model_copy(update={"sampler": preset.sampler.with_window(window, sink, None)})


def resident(peak: bool = False) -> int:
    """Bytes of this process that are in memory now, or were at most since the last reset."""
    name = "VmHWM" if peak else "VmRSS"
    row = next(row for row in STATUS.read_text().splitlines() if row.startswith(name))
    return int(row.split()[1]) * 1024


class Phases:
    """The peak of each phase, above what the process had at the start."""

    def __init__(self) -> None:
        self.base = resident()
        self.peaks: dict[str, int] = {}

    def end(self, name: str) -> int:
        """A phase is over: note the most that was taken since the last one was."""
        taken = resident(peak=True) - self.base
        self.peaks[name] = max(self.peaks.get(name, 0), taken)
        CLEAR.write_text("5")
        return taken


def child(wanted: Wanted) -> dict[str, Any]:
    """Make the model and the video; the peak of each phase in bytes, and those of each chunk."""
    import torch

    from nasa_video.bench.random_model import RandomText, random_generator, random_vae
    from nasa_video.models.loading import FullDecoder
    from nasa_video.models.part_sizes import transformer_config, vae_config
    from nasa_video.models.placement import Placement, place, quantise
    from nasa_video.video.pipeline import VideoPipeline

    dtype = getattr(torch, wanted.dtype)
    preset = wanted.preset()
    config = transformer_config(preset)
    assert config is not None
    vae = vae_config(preset, int(config["in_channels"]))
    # Whatever the libraries load at their first use is not of the run.
    small = {"num_attention_heads": 1, "attention_head_dim": 24, "text_dim": 8, "freq_dim": 8, "ffn_dim": 8}
    small["num_layers"] = 1
    warm = random_generator({**config, **small}, dtype=dtype)
    if wanted.weights != "plain":
        quantise(warm, wanted.weights)  # type: ignore[arg-type]
    warm(torch.zeros(1, 1, config["in_channels"], 4, 4), 1.0, torch.zeros(1, 4, 8))
    FullDecoder(random_vae({**vae, "base_dim": 4})).decode(torch.zeros(1, 2, vae["z_dim"], 4, 4))

    phases = Phases()
    passes: list[int] = []

    class Watched(FullDecoder):
        def decode(self, latents: torch.Tensor, clamp: bool = True) -> torch.Tensor:
            passes.append(phases.end("a pass of the model"))
            if wanted.decode:
                return super().decode(latents, clamp)
            height, width = latents.shape[-2] * 8, latents.shape[-1] * 8
            return torch.zeros(1).expand(1, 4 * latents.shape[1] - 3, 3, height, width)

    text = RandomText(preset.components.text_encoder.max_tokens, config["text_dim"])
    model = place(random_generator(config, dtype=dtype), Placement(weights=wanted.weights), torch.device("cpu"))  # type: ignore[arg-type]
    sizes = vae if wanted.decode else {**vae, "base_dim": 4}
    pipeline = VideoPipeline(model, random_vae(sizes), text, preset, new_decoder=Watched)
    phases.end("loading")
    phases.peaks["weights"] = resident() - phases.base
    steps = {wanted.steps: preset.sampler.timesteps(preset.sampler.default_steps)[: wanted.steps]}
    pipeline.preset = preset.model_copy(
        update={"sampler": preset.sampler.model_copy(update={"steps": steps, "default_steps": wanted.steps})}
    )
    chunks = pipeline.stream("a red fox in the snow", negative="blurry", width=wanted.width, height=wanted.height,
                             frames=wanted.frames)  # fmt: skip
    decoded = [phases.end("decoding" if wanted.decode else "a pass of the model") for _ in chunks]
    phases.peaks["history"] = resident() - phases.base - phases.peaks["weights"]
    return {**phases.peaks, "chunks": [max(pair) for pair in zip(passes, decoded, strict=True)]}


def plan(wanted: Wanted) -> Any:
    """What the plan says of the same run, whose prompts are known (the run has no text encoder)."""
    from dataclasses import replace

    import torch

    from nasa_video.models.memory_estimate import estimate
    from nasa_video.models.memory_plan import PlanRequest, make_plan

    request = PlanRequest(wanted.width, wanted.height, wanted.frames, weights=wanted.weights, prompts=())  # type: ignore[arg-type]
    made = make_plan(wanted.preset(), torch.device("cpu"), getattr(torch, wanted.dtype), request)
    assert made is not None
    # Folded: the words and one more.
    return estimate(replace(made.run, text_encoder=0, text_tokens=2 * 22, decoded=bool(wanted.decode)))


def measure(wanted: Wanted) -> dict[str, Any]:
    """Run the child, and put its peaks beside the plan's."""
    command = [sys.executable, __file__, "--child", json.dumps(asdict(wanted))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the measured run failed:\n{done.stderr}")
    peaks = json.loads(done.stdout.splitlines()[-1])
    needs = plan(wanted)
    peaks.setdefault("decoding", 0)
    sampler = wanted.preset().sampler
    full = (sampler.window_frames or 0) // sampler.frames_per_chunk  # chunks that fit into the window
    rolling = peaks["chunks"][full:] if full else []
    measured = max(peaks["a pass of the model"], peaks["decoding"])
    return {
        **asdict(wanted),
        "planned": {**asdict(needs), **needs.phases, "peak": needs.peak},
        "measured": {**peaks, "peak": measured},
        "ratio": needs.peak / measured,
        "rolling": {"chunks": len(rolling), "smallest": min(rolling), "largest": max(rolling)} if rolling else None,
    }


def main() -> None:
    """Measure, print, and say how far the plan is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(Wanted()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    wanted = options.pop("child")
    if wanted is not None:
        with warnings.catch_warnings(action="ignore"):
            print(json.dumps(child(Wanted(**json.loads(wanted)))))
        return
    result = measure(Wanted(**options))
    print(f"{'':22}{'plan':>10}{'measured':>12}")
    for name, key in (("weights", "weights"), ("a pass of the model",) * 2, ("decoding",) * 2, ("peak",) * 2):
        print(f"{name:22}{result['planned'][key] / 1e9:>8.2f}GB{result['measured'][key] / 1e9:>10.2f}GB")
    if rolling := result["rolling"]:
        print(f"{rolling['chunks']} chunks after the window was full: from {rolling['smallest'] / 1e9:.3f} to "
              f"{rolling['largest'] / 1e9:.3f} GB")  # fmt: skip
    print(f"the plan is {100 * (result['ratio'] - 1):+.1f} % off the measured peak")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
