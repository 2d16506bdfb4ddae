"""One attention signature over two kernels, and the text keys that guidance works on.

Layout everywhere: (B, tokens, H, D), as xformers has it.
"""

# B batch, Q query tokens, N key tokens, H heads, D head dim, L text tokens

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nasa_video.errors import InputError, NasaVideoError
from nasa_video.guidance.fused_lse import fused_with_lse

Backend = Literal["sdpa", "xformers"]


FOLDED_TILE = 16
"""Folded prompts have a multiple of so many keys: kernels of a CPU take what is left over key by key, 14 in up to three
times the time of 16, and a compiled model needs no other graph for a prompt of another length."""


class AttentionError(NasaVideoError, RuntimeError):
    """The chosen kernel cannot do what is asked; the message names one that can."""


@dataclass(frozen=True)
class TextKeys:
    """Keys and values of one prompt (batch) in one layer.

    Attributes:
        k, v: (B, N, H, D), after the layer's own projections and key norm.
        bias: (B, 1, 1, N) float32 added to the scores, or None. A key that stands for m equal ones carries log m;
            a key that is not there carries -inf.
        rounded: the same in the model's half precision, see :func:`shifted_bias`; None rounds ``bias`` as it is.
        padding_v: (1, 1, H, D), the value of the token that pads every prompt of this model, which is what a prompt
            without words attends to; None where there is no such token.
    """

    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    rounded: Tensor | None = None
    padding_v: Tensor | None = None

    def to(self, device: torch.device) -> TextKeys:
        """The same on another device."""
        moved = self.by_rows(lambda x: x.to(device))
        return replace(moved, padding_v=None if self.padding_v is None else self.padding_v.to(device))

    def by_rows(self, change: Callable[[Tensor], Tensor]) -> TextKeys:
        """With another batch: what has a row a sample, changed."""
        bias, rounded = (None if x is None else change(x) for x in (self.bias, self.rounded))
        return replace(self, k=change(self.k), v=change(self.v), bias=bias, rounded=rounded)

    def bias_in(self, dtype: torch.dtype) -> Tensor | None:
        """The bias for a kernel that takes it in ``dtype``."""
        if self.rounded is not None and self.rounded.dtype == dtype:
            return self.rounded
        return None if self.bias is None else self.bias.to(dtype)


def shifted_bias(bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A bias that keeps its precision in half precision, as ``dtype``, and the shift (B, 1, 1, 1) float32 it took.

    bfloat16 stores log m with an error of up to 0.016, which would weigh the padding 1.6 % wrongly. A softmax does not
    change when all scores move by the same amount: moved by that error, log m is stored exactly, and the zeros beside
    it become small numbers, which bfloat16 stores finely. Scores' log-sum-exp is that of the shifted ones + shift.
    """
    rest = torch.nan_to_num(bias - bias.to(dtype).float(), nan=0.0)  # of -inf: nothing
    shift = rest.sum(dim=-1, keepdim=True)
    return (bias - shift).to(dtype), shift


WeightedKeys = tuple[TextKeys, float]
"""A negative's keys and its weight."""


class Attend(Protocol):
    """The attention that guidance methods are given."""

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        """(B, Q, H, D) -> (B, Q, H, D)."""
        ...

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        """The same output, and the log-sum-exp of the scores, (B, Q, H, 1) float32."""
        ...


class SdpaAttend:
    """PyTorch's scaled dot product attention; any device, any dtype."""

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        bias = keys.bias_in(q.dtype)
        q, k, v = (x.transpose(1, 2) for x in (q, keys.k, keys.v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        # SDPA throws the log-sum-exp away. Text keys are few (folded: the prompt's own tokens and one more), so that
        # the scores are small enough to be formed; image keys of joint attention are not.
        fused = fused_with_lse(q, keys.k, keys.v, keys.bias)
        if fused is not None:
            return fused
        scores = torch.einsum("bqhd,bnhd->bhqn", q.float(), keys.k.float()) / math.sqrt(q.shape[-1])
        if keys.bias is not None:
            scores = scores + keys.bias
        lse = scores.logsumexp(dim=-1, keepdim=True)
        out = torch.einsum("bhqn,bnhd->bqhd", (scores - lse).exp(), keys.v.float())
        return out.to(q.dtype), lse.transpose(1, 2)


class XformersAttend:
    """xformers' memory-efficient attention; CUDA only."""

    def __init__(self) -> None:
        try:
            import xformers.ops as xops
        except ImportError as error:
            raise AttentionError(
                "attention backend 'xformers' needs the package: pip install 'nasa-video[xformers]', or use 'sdpa'"
            ) from error
        self._xops = xops

    def __call__(self, q: Tensor, keys: TextKeys) -> Tensor:
        self._check(q)
        out: Tensor = self._run(self._xops.memory_efficient_attention, q, keys, keys.bias_in(q.dtype))
        return out

    def with_lse(self, q: Tensor, keys: TextKeys) -> tuple[Tensor, Tensor]:
        self._check(q)
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, keys.k, keys.v)):
            raise AttentionError(
                "xformers gives the log-sum-exp of attention without a gradient, which VSF needs in training; use the "
                "backend 'sdpa'"
            )
        bias, shift = (None, None) if keys.bias is None else shifted_bias(keys.bias, q.dtype)
        out, lse = self._run(self._xops.memory_efficient_attention_forward_requires_grad, q, keys, bias)
        # Some kernels pad the query axis of the log-sum-exp.
        lse = lse[:, :, : q.shape[1]].transpose(1, 2).unsqueeze(-1).float()
        return out, lse if shift is None else lse + shift

    @staticmethod
    def _check(q: Tensor) -> None:
        if q.device.type != "cuda":
            raise AttentionError(f"xformers has no attention kernel for {q.device.type}; use the backend 'sdpa'")

    @staticmethod
    def _run(kernel: Callable[..., Any], q: Tensor, keys: TextKeys, bias: Tensor | None) -> Any:
        try:
            return kernel(q, keys.k, keys.v, attn_bias=None if bias is None else _aligned(bias, q))
        except (NotImplementedError, ValueError) as error:  # its dispatcher found none, or its checks refused the input
            reason = " ".join(str(error).split())
            raise AttentionError(
                f"xformers has no kernel for {q.dtype} with {q.shape[2]} heads of {q.shape[3]} on {q.device}; use the "
                f"backend 'sdpa' ({reason[:300]})"
            ) from error


def _aligned(bias: Tensor, q: Tensor) -> Tensor:
    """The bias (B, 1, 1, N) as (B, H, Q, N) in rows whose stride is a multiple of 8 elements, as xformers wants it."""
    batch, queries, heads, _ = q.shape
    num_keys = bias.shape[-1]
    padded = F.pad(bias, (0, -num_keys % 8))
    return padded.expand(batch, heads, queries, -1)[..., :num_keys]


def make_attend(backend: Backend = "sdpa") -> Attend:
    """The attention of a backend.

    Raises:
        AttentionError: it is not installed.
        ValueError: there is no such backend.
    """
    if backend == "sdpa":
        return SdpaAttend()
    if backend == "xformers":
        return XformersAttend()
    raise ValueError(f"attention backend must be 'sdpa' or 'xformers', got {backend!r}")


def key_bias(lengths: Tensor, num_tokens: int, *, fold: bool, padding: bool) -> Tensor | None:
    """Score bias that makes the folded keys act as ``num_tokens`` zero-padded ones.

    m identical keys act in a softmax exactly like one whose score carries + log m. Every padding token of a prompt
    has the same key and value, so attention over the padded prompt equals attention over its real tokens and one.

    Args:
        lengths: (B,), real tokens of each prompt.
        num_tokens: L, tokens of the padded prompt.
        fold: keep the real tokens and one padding token; otherwise all L.
        padding: whether padding takes part at all.

    Returns:
        (B, 1, 1, N) float32 with N of :func:`folded_tokens` or L, or None where no bias is needed.

    Raises:
        InputError: a prompt has no tokens, and padding takes no part: nothing is left to attend to.
    """
    if not fold and padding:
        return None
    if not padding and int(lengths.min()) == 0:
        raise InputError(
            "a prompt without tokens has only padding to attend to; leave it out, or let padding take part"
        )
    index = torch.arange(folded_tokens(lengths) if fold else num_tokens, device=lengths.device)
    real = index[None, :] < lengths[:, None]
    bias = torch.where(real, 0.0, -math.inf).float()
    if fold and padding:
        bias[:, -1] = (num_tokens - lengths).float().log()
    return bias[:, None, None, :]


def folded_embeds(embeds: Tensor, lengths: Tensor) -> Tensor:
    """The longest prompt's real tokens and, last, one padding token, (B, N, E), from (B, L, E).

    N is that of :func:`folded_tokens`; what is between the two is padding of which :func:`key_bias` takes none.
    """
    longest = int(lengths.max())
    return F.pad(embeds[:, :longest], (0, 0, 0, folded_tokens(lengths) - longest))


def folded_tokens(lengths: Tensor) -> int:
    """Keys of folded prompts of these lengths: the longest and one for its padding, in tiles of ``FOLDED_TILE``."""
    return math.ceil((int(lengths.max()) + 1) / FOLDED_TILE) * FOLDED_TILE
