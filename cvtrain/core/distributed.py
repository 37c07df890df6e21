"""Rank and world size as the launcher (torchrun) states them; one process when it states nothing."""

from __future__ import annotations

import os


def rank() -> int:
    """Return this process's global rank, 0 when not launched by torchrun."""
    return int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes, 1 when not launched by torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))
