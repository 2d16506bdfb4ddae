"""Errors that people can act on; programming mistakes stay plain assertions."""


class CausvidAdapterError(Exception):
    """Base of everything that this package raises on purpose."""


class CheckpointError(CausvidAdapterError):
    """A file is not a checkpoint that this model can take; the message says why and what it looks like."""


class ShapeError(CausvidAdapterError, ValueError):
    """Sizes that the model, the chunking or the cache does not allow; the message names those that it does."""
