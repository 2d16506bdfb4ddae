"""Bytes that are free: of a GPU, of this machine, of the container that this is."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch


def available(device: torch.device) -> int | None:
    """Free bytes that a run can take on a device; None where that cannot be known."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu":
        return _free_on_machine()
    return None


def _free_on_machine() -> int:
    free: int = psutil.virtual_memory().available
    limits = [room for room in (_room_in_container(*names) for names in _CONTAINER_FILES) if room is not None]
    return min([free, *limits])


_CONTAINER_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)


def _room_in_container(limit: str, used: str, statistics: str) -> int | None:
    """Bytes left under a container's limit; what the page cache holds counts as free."""
    try:
        room = int(Path(limit).read_text()) - int(Path(used).read_text())
        rows = dict(row.split() for row in Path(statistics).read_text().splitlines())
        return max(0, room + int(rows.get("inactive_file", 0)))
    except (OSError, ValueError):
        return None
