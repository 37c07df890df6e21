"""Weights as safetensors: tensors and plain text, no pickle written, and none read."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from cvtrain.core.files import write_atomic
from cvtrain.errors import WeightsError


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Serialise tensors (copied to the CPU, contiguous, unshared) and text metadata as one safetensors file."""
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    return _sorted_metadata(save(plain, metadata=metadata))


def _sorted_metadata(content: bytes) -> bytes:
    # The library writes metadata in a random order; equal weights should be equal files, with equal hashes.
    size = int.from_bytes(content[:8], "little")
    header, _ = json.JSONDecoder().raw_decode(content[8 : 8 + size].decode())
    header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the model's parameters and buffers with `metadata` durably to `path` (.safetensors)."""
    write_atomic(path, to_bytes(dict(model.state_dict()), metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors (on the CPU) and metadata of a safetensors file.

    Raises:
        WeightsError: The file is missing or not a whole safetensors file.
    """
    if not path.is_file():
        raise WeightsError(f"no weights at {path}. Check the path, or train first.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise WeightsError(f"{path} is not a whole safetensors file ({error}). Use another checkpoint.") from error


def load_into(model: nn.Module, path: Path) -> dict[str, str]:
    """Load weights strictly into `model` and return the file's metadata.

    Raises:
        WeightsError: Names or shapes differ; the message lists the first five differences.
    """
    tensors, metadata = read(path)
    own = model.state_dict()
    differences = [f"missing {name}" for name in own if name not in tensors]
    differences += [f"unexpected {name}" for name in tensors if name not in own]
    differences += [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if differences:
        shown = "; ".join(differences[:5])
        raise WeightsError(
            f"{path} does not fit this model, {len(differences)} differences: {shown}. Use the run's own model=."
        )
    model.load_state_dict(tensors)
    return metadata


def parse_metadata(metadata: dict[str, str], key: str) -> object:
    """Return the JSON value stored under `key` of a file's metadata.

    Raises:
        WeightsError: The key is absent: the file was not written by cvtrain.
    """
    if key not in metadata:
        raise WeightsError(
            f"the weights carry no {key!r}; they were not written by cvtrain. Use weights/model.safetensors of a run."
        )
    try:
        value: object = json.loads(metadata[key])
    except ValueError as error:
        raise WeightsError(f"the weights' {key!r} is not JSON ({error}); they were not written by cvtrain.") from error
    return value


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Return whether every floating-point tensor is finite."""
    return all(bool(torch.isfinite(t).all()) for t in tensors.values() if t.is_floating_point())
