"""diffusers' Wan transformer as a chunk-wise causal generator (CausVid, arXiv 2412.07772)."""

# B batch, T latent frames, C channels, H W latent height and width, S tokens

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from einops import rearrange
from torch import Tensor, nn

from causvid_adapter.accelerate.static_cache import StaticKVCache
from causvid_adapter.attention import Attend, CausalSelfAttention, SelfAttentionCall, sdpa
from causvid_adapter.cache import KVCache
from causvid_adapter.errors import ShapeError
from causvid_adapter.mask import block_causal_mask
from causvid_adapter.rope import FrameRope
from causvid_adapter.window import UNLIMITED, Window

# diffusers' Wan processor takes the last 512 tokens for text and what is in front of them for the image.
IMAGE_MODEL_TEXT_TOKENS = 512


class CausalWan(nn.Module):
    """Makes a :class:`~diffusers.WanTransformer3DModel` causal, in place.

    Only its self-attention processors and its rotary embedding are replaced; the weights, the cross-attention, LoRA
    adapters and diffusers' hooks stay what they are. Cross-attention processors may be exchanged freely (that is
    where guidance is installed).
    """

    def __init__(self, transformer: WanTransformer3DModel, attend: Attend = sdpa) -> None:
        super().__init__()
        if transformer.config.patch_size[0] != 1:
            raise ShapeError(
                f"patch_size must be 1 along time, got {tuple(transformer.config.patch_size)}: chunks, caches and "
                "timesteps count single latent frames"
            )
        self.transformer = transformer
        self._rope = FrameRope(transformer.rope) if not isinstance(transformer.rope, FrameRope) else transformer.rope
        transformer.rope = self._rope
        for layer, block in enumerate(transformer.blocks):
            block.attn1.set_processor(CausalSelfAttention(layer, attend))
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}
        # Set by compiled.compile_generator.
        self.static_cache = False
        self.cuda_graphs = False
        # Set by parallel.parallelise.
        self.processes = 1

    @property
    def num_layers(self) -> int:
        """Transformer blocks."""
        return len(self.transformer.blocks)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.transformer.device  # type: ignore[no-any-return]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.transformer.dtype  # type: ignore[no-any-return]

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of ``height`` x ``width`` latents.

        Raises:
            ShapeError: the patch does not divide the frame.
        """
        rows, columns = self._token_grid(height, width)
        return rows * columns

    def new_cache(
        self,
        height: int,
        width: int,
        window: Window = UNLIMITED,
        num_frames: int | None = None,
    ) -> KVCache:
        """An empty cache for videos of ``height`` x ``width`` latents; see :class:`~causvid_adapter.KVCache`."""
        tokens = self.tokens_per_frame(height, width)
        kind = StaticKVCache if self.static_cache else KVCache
        return kind(self.num_layers, tokens, window, num_frames)

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor | float,
        context: Tensor | None,
        *,
        cache: KVCache | None = None,
        frames_per_chunk: int | None = None,
        window: Window = UNLIMITED,
        image_context: Tensor | None = None,
    ) -> Tensor:
        """Predict the flow ``noise - x0``.

        Args:
            latents: (B, T, C, H, W); with a cache, the current chunk alone.
            timestep: in 0..1000; a number, (B,), or (B, T) for a noise level a frame.
            context: text embeddings (B, text tokens, text_dim), or None when the installed cross-attention brings
                its own keys. An image-to-video Wan takes exactly 512 tokens, by which diffusers tells text from image.
            cache: history to attend to; the chunk's keys are staged in it.
            frames_per_chunk: without a cache: block-causal attention with chunks of this size; None is bidirectional.
            window: restricts the block-causal mask as a cache with that window would.
            image_context: image embeddings of an image-to-video Wan, (B, image tokens, image_dim).

        Returns:
            (B, T, C, H, W).
        """
        if latents.ndim != 5:
            raise ShapeError(f"latents must be (B, T, C, H, W), got {tuple(latents.shape)}")
        latents = latents.to(self.device)  # given ones of a long video wait in the host's memory
        frames, _, height, width = latents.shape[1:]
        rows, columns = self._token_grid(height, width)
        tokens = frames * rows * columns
        if tokens % self.processes:
            raise ShapeError(
                f"{tokens} tokens of {frames} frames of {height} x {width} latents cannot be shared by "
                f"{self.processes} processes; change the size, or the number of processes"
            )
        if cache is not None:
            if frames_per_chunk is not None:
                raise ValueError("give either a cache (chunk by chunk) or frames_per_chunk (one masked pass), not both")
            if isinstance(cache, StaticKVCache):
                config = self.transformer.config
                heads, head_dim = config.num_attention_heads, config.attention_head_dim
                cache.allocate(latents.shape[0], heads, head_dim, self.dtype, self.device)
            cache.begin(frames)
            positions, key_positions = cache.positions
        else:
            positions = key_positions = torch.arange(frames)
        mask = cache.mask if isinstance(cache, StaticKVCache) else None
        if frames_per_chunk is not None:
            mask = block_causal_mask(frames, rows * columns, frames_per_chunk, window, latents.device)
        counts_in_window = cache is not None and cache.window.rope == "window"
        self._rope.call = SelfAttentionCall(
            table=self._table(positions, rows, columns),
            mask=mask,
            cache=cache,
            key_table=self._table(key_positions, rows, columns) if counts_in_window else None,
        )
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            flow: Tensor = self.transformer(
                rearrange(latents, "b t c h w -> b c t h w").to(self.dtype),
                self._expand_timestep(timestep, latents, rows * columns),
                self._expand_context(context, latents).to(self.dtype),
                encoder_hidden_states_image=None if image_context is None else image_context.to(self.dtype),
                return_dict=False,
            )[0]
        finally:
            self._rope.call = None
        # What a graph returned lies where its next replay writes.
        return rearrange(flow.clone() if self.cuda_graphs else flow, "b c t h w -> b t c h w")

    def _expand_context(self, context: Tensor | None, latents: Tensor) -> Tensor:
        config = self.transformer.config
        takes_images = config.added_kv_proj_dim is not None
        if context is None:
            # diffusers embeds the text before any block sees it; zero tokens keep that nearly free of cost.
            return latents.new_zeros(latents.shape[0], IMAGE_MODEL_TEXT_TOKENS if takes_images else 1, config.text_dim)
        if takes_images and context.shape[1] != IMAGE_MODEL_TEXT_TOKENS:
            raise ShapeError(
                f"the context of an image-to-video Wan must have {IMAGE_MODEL_TEXT_TOKENS} tokens, got "
                f"{context.shape[1]}; pad it with zeros"
            )
        return context

    def _token_grid(self, height: int, width: int) -> tuple[int, int]:
        _, patch_height, patch_width = self.transformer.config.patch_size
        if height % patch_height or width % patch_width:
            raise ShapeError(
                f"latent height and width must be multiples of {patch_height} and {patch_width}, got {height} x {width}"
            )
        return height // patch_height, width // patch_width

    def _expand_timestep(self, timestep: Tensor | float, latents: Tensor, tokens_per_frame: int) -> Tensor:
        batch, frames = latents.shape[:2]
        timestep = torch.as_tensor(timestep, dtype=torch.float32, device=latents.device)
        if timestep.ndim == 0 or timestep.shape == (batch,):
            return timestep.expand(batch)
        if timestep.shape == (batch, frames) and self.processes == 1:
            return timestep.repeat_interleave(tokens_per_frame, dim=1)
        raise ShapeError(f"timestep must be a number, ({batch},) or ({batch}, {frames}), got {tuple(timestep.shape)}")

    def _table(self, positions: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        key = (int(positions[0]), len(positions), rows, columns, self.device)
        if key not in self._tables:
            if len(self._tables) > 8:  # a chunk needs two; an endless rollout must not keep one a chunk
                self._tables.clear()
            self._tables[key] = self._rope.build(positions, rows, columns, self.device)
        return self._tables[key]
