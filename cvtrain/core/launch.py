"""How this process was launched: alone, or by torchrun or SLURM as one of several; torch-free."""

from __future__ import annotations

import os
import socket


def rank() -> int:
    """Return this process's number among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Return this process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Return how many processes were launched together, 1 for a process by itself."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def restarts() -> int:
    """Return how often torchrun has started these processes again (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def identity() -> str:
    """Return what tells this launch from every other, the same after a restart by `--max-restarts`.

    It is torchrun's `--rdzv-id`, or, where none was given, the process of torchrun on this machine.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()}:{os.getppid()}"
