"""The training step through `torch.compile`."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from cvtrain.errors import ConfigError


def compiled(model: nn.Module, device: torch.device) -> nn.Module:
    """Return `model` compiled for training; they share their weights, and `model` itself stays as it is.

    Every batch size gets kernels of its own: general ones, made when a second size comes, would not give the same bits
    in a run that is resumed at another batch.

    Raises:
        ConfigError: What compiles the kernels is missing.
    """
    lacking = _lacking(device)
    if lacking:
        raise ConfigError(f"compile=true: {lacking}, or use compile=false.")
    # Sizes of batches and pictures: beyond its limit a run would not be compiled, and a resumed one would be.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    wrapped: nn.Module = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return wrapped


def _lacking(device: torch.device) -> str:
    """Return what is missing and how to install it, or nothing."""
    if device.type == "cuda":
        return (
            "" if find_spec("triton") else "a GPU's kernels are compiled by Triton, which is absent: pip install triton"
        )
    compiler = shlex.split(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))[0]
    if shutil.which(compiler) is None:
        return (
            f"kernels are compiled by {compiler}, which is absent: install it (apt-get install g++), or name one in CXX"
        )
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "kernels are compiled with Python's headers, which are absent: apt-get install python3-dev"
    return ""
