"""The one frame type that sinks, sources and contact sheets share, and its way to and from tensors.

Legend: F frames, H height, W width; a video is uint8 (F, H, W, 3), RGB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Frames = NDArray[np.uint8]
Upscale = Literal["lanczos", "nearest"]


def check_frames(frames: NDArray[Any]) -> Frames:
    """Return `frames` if they are a uint8 (F, H, W, 3) array with F, H, W >= 1; ValueError with the rule if not."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or frames.size == 0:
        raise ValueError(f"frames must be uint8 (F, H, W, 3), no side 0; got {frames.dtype} {frames.shape}")
    return frames


def frames_from_tensor(video: torch.Tensor) -> Frames:
    """Turn a float video (F, 3, H, W) in [-1, 1] into uint8 frames (F, H, W, 3).

    Values beyond the range are clamped (decoders overshoot a little); one that is not finite raises ValueError,
    because a cast to uint8 would hide a model that broke.
    """
    if video.ndim != 4 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(f"a video tensor must be floating (F, 3, H, W); got {video.dtype} {tuple(video.shape)}")
    if not bool(video.isfinite().all()):
        raise ValueError("the decoded video has values that are NaN or infinite, so there is nothing to show")
    bytes_FCHW = video.detach().float().clamp(-1, 1).add(1).mul(127.5).round().byte()
    return bytes_FCHW.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def tensor_from_frames(frames: Frames) -> torch.Tensor:
    """Inverse of `frames_from_tensor`: uint8 (F, H, W, 3) to float32 (F, 3, H, W) in [-1, 1], on the CPU."""
    import torch

    # The copy keeps a read-only array (a memory map, a decoder's buffer) out of the tensor, which could be written to.
    video = torch.from_numpy(check_frames(frames).copy()).permute(0, 3, 1, 2).float()
    return video.div_(127.5).sub_(1).contiguous()


def enlarge(frames: Frames, scale: int, upscale: Upscale = "lanczos") -> Frames:
    """Frames (F, H, W, 3) as (F, scale * H, scale * W, 3): smooth, or with hard pixels ("nearest")."""
    from PIL import Image

    if scale == 1:
        return frames
    resample = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}[upscale]
    size = (frames.shape[2] * scale, frames.shape[1] * scale)
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, resample)) for frame in frames])
