"""Prompts as text embeddings."""

from nasa_video.text.encoders import TextContext, TextEncoder, Umt5Encoder, WordLlamaEncoder

__all__ = ["TextContext", "TextEncoder", "Umt5Encoder", "WordLlamaEncoder"]
