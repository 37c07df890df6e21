"""Hand a checked command over to Hydra: `.hydra/`, multirun, `--cfg`, `--info`, completion."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from hydra._internal.utils import _run_hydra
from omegaconf import DictConfig

from cvtrain.compose import CONFIG_PATH


def to_hydra(
    args: argparse.Namespace, parser: argparse.ArgumentParser, verb: str, task: Callable[[DictConfig], Any]
) -> int:
    """Let Hydra run `task`; return 0. Errors of the task are raised as they are.

    Args:
        args: Hydra's own flags and overrides.
        parser: Hydra's parser.
        verb: Name of the primary config.
        task: Takes the composed config without `hydra`.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises, where it would print a traceback and leave with code 1
    _run_hydra(args=args, args_parser=parser, task_function=task, config_path=CONFIG_PATH, config_name=verb)
    return 0


def quoted(key: str, value: object) -> str:
    """Return the override `key='value'` that survives any character in `value`."""
    text = str(value).replace("\\", "\\\\").replace("'", "\\'")
    return f"{key}='{text}'"
