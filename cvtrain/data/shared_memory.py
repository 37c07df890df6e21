"""Whether the batches that workers hand over fit into shared memory: a container often has 64 MB of it."""

from __future__ import annotations

import logging
import os
from pathlib import Path

log = logging.getLogger("cvtrain")

SHARED_MEMORY = Path("/dev/shm")
PREFETCHED = 2
"""Batches that a worker reads ahead."""
COPIES = 2
"""How often a batch may be there while it is handed over."""


def workers_that_fit(workers: int, batch_bytes: int, folder: Path | None = None) -> int:
    """Return how many workers the free shared memory is enough for, and warn when those are fewer.

    A worker that finds it full dies by SIGBUS, in the middle of an epoch. Without such a folder nothing is known.

    Args:
        workers: How many are wanted.
        batch_bytes: Size of a batch as it is read.
        folder: Where shared memory lies; None: /dev/shm.
    """
    folder = folder or SHARED_MEMORY
    try:
        found = os.statvfs(folder)
    except OSError:
        return workers
    free = found.f_bavail * found.f_frsize
    each = COPIES * PREFETCHED * batch_bytes
    fit = min(workers, free // max(1, each))
    if fit < workers:
        log.warning(
            "workers=%d need %.0f MB of shared memory, %s has %.0f MB free: %d are used. Give the container more "
            "(docker run --shm-size), or lower batch_size.",
            *(workers, workers * each / 1e6, folder, free / 1e6, fit),
        )
    return fit
