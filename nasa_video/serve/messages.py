"""What a client is told of an error."""

from __future__ import annotations

import logging

import torch

from causvid_adapter.errors import CausvidAdapterError
from nasa_video.errors import NasaVideoError

log = logging.getLogger(__name__)


def message_of(error: BaseException) -> str:
    """The message of an error that a person can mend; any other one goes to the server's log."""
    if isinstance(error, NasaVideoError | CausvidAdapterError):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "there is not enough memory for one more video; stop another one, or ask for fewer at once"
    log.error("a video failed", exc_info=error)
    return "something went wrong inside the server; its log says what"
