"""The verbs, one file each, and what runs them; nothing here imports torch before a job starts."""

from __future__ import annotations

import importlib
from typing import Any


def run_verb(verb: str, config: dict[str, Any], trusted: list[str]) -> int:
    """Run a verb that works on a finished run; return its exit code.

    Args:
        verb: Name of a module of this package with a `run(config, trusted)`.
        config: Resolved and checked config.
        trusted: The user's own packages.
    """
    module = importlib.import_module(f"cvtrain.command.{verb}")
    code: int = module.run(config, trusted)
    return code
