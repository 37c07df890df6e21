"""Where a run and its files come from: manifest.json, and the metadata inside every deployed file."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from cvtrain import __version__, runs
from cvtrain.core import distributed
from cvtrain.core.files import write_atomic, write_json
from cvtrain.core.types import DataSets
from cvtrain.precision import cpu_features
from cvtrain.runtime.prepare import MULTILABEL


def write_manifest(
    folder: Path,
    config: dict[str, Any],
    choices: dict[str, str],
    sets: DataSets,
    device: torch.device,
    resumed: dict[str, Any] | None = None,
    pretrained: dict[str, Any] | None = None,
) -> None:
    """Write args.yaml and manifest.json: config, versions, hardware, the data's fingerprint, the commit.

    Args:
        folder: The run folder. What an earlier manifest.json says about the run's past is kept.
        config: Resolved.
        choices: Which option each group has.
        sets: The data.
        device: The run's.
        resumed: What `continuation.record` says about a resume; added to the earlier ones.
        pretrained: Source, SHA-256 and preparation of the weights that the run begins with.
    """
    write_atomic(folder / runs.ARGS, OmegaConf.to_yaml(OmegaConf.create(config)))
    before, digest = runs.read_json(folder / runs.MANIFEST), runs.config_hash(config)
    packages = ("torch", "torchvision", "hydra-core", "onnx", "onnxruntime", "numpy", "pillow")
    write_json(
        folder / runs.MANIFEST,
        {
            "number": before.get("number") or runs.next_number(folder.parent),
            "config_hash": digest,
            "config_hashes": list(dict.fromkeys([*before.get("config_hashes", []), digest])),
            "config": config,
            "resumes": [*before.get("resumes", []), *([resumed] if resumed else [])],
            "command": sys.argv,
            "choices": choices,
            "versions": {
                "cvtrain": __version__,
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in packages},
            },
            "hardware": {
                "machine": platform.machine(),
                "system": platform.platform(),
                "cpu": cpu_name(),
                "cpu_bf16": sorted(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"}),
                "threads": torch.get_num_threads(),
                "device": str(device),
                "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            },
            "data": {
                "name": sets.name,
                "classes": sets.class_names,
                **sets.counts(),
                "fingerprint": fingerprint(sets),
            },
            "pretrained": pretrained,
            "git": git_sha(),
        },
    )


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the bits of a run depend on beside its config and its data."""
    return {
        "cvtrain": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "world_size": distributed.world_size(),
    }


def deployment_metadata(config: dict[str, Any], sets: DataSets) -> dict[str, str]:
    """Return what a deployed file carries: how to rebuild the model and how to feed it, as text."""
    return {
        "cvtrain_version": __version__,
        "task": MULTILABEL if sets.multilabel else "classification",
        "class_names": json.dumps(sets.class_names),
        "preprocess": json.dumps(sets.preprocess.to_dict()),
        "model": json.dumps(config["model"]),
        "head": config["head"],
        "git": git_sha() or "",
    }


def cpu_name() -> str:
    """Return the processor's name as Linux gives it, or what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def git_sha() -> str | None:
    """Return the commit of the folder the user is in, if it is under git."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def fingerprint(sets: DataSets) -> str:
    """Return a SHA-256 over the labels and names of every split, in order: what a resume must find again."""
    digest = hashlib.sha256()
    for source in (sets.train, sets.val, sets.test):
        digest.update(np.ascontiguousarray(source.labels).tobytes())
        digest.update("\n".join(source.names).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
