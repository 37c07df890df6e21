"""How many threads torch's operations on the CPU take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread(device: torch.device | None = None) -> Iterator[None]:
    """Keep torch to one thread for work on the CPU whose tensors are too small to share: sharing them is slow.

    Args:
        device: Where the work is; nothing changes on an accelerator. None means the CPU.
    """
    threads = torch.get_num_threads()
    if threads == 1 or (device is not None and device.type != "cpu"):
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
