"""Weights as safetensors: tensors and plain text, no pickle written, and none read."""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cvtrain.core.files import write_atomic
from cvtrain.core.types import Preprocess
from cvtrain.errors import WeightsError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_PICKLE_BYTES = 16 << 20
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pieces(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Iterator[bytes | memoryview]:
    """Serialise as one safetensors file, tensor by tensor: at most one is copied at a time.

    Args:
        tensors: Any device and memory format; `(…)` of a dtype that safetensors has.
        metadata: Text by name, written in the order of the names: equal weights are equal files with equal hashes.

    Yields:
        The header, then each tensor's bytes. Source: https://huggingface.co/docs/safetensors (format).
    """
    # The widest dtypes first, so that each tensor starts at a multiple of its own width.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    start = 0
    for name in names:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        # NumPy's copy, because torch's would start threads in a process that forks workers.
        plain = tensors[name].detach().cpu()
        array = np.ascontiguousarray(plain.view(_INTEGERS[plain.element_size()]).numpy())
        yield array.reshape(-1).view(np.uint8).data


def to_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """Return `pieces` as one."""
    return b"".join(pieces(tensors, metadata))


def save_weights(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    """Write the model's parameters and buffers with `metadata` durably to `path` (.safetensors)."""
    write_atomic(path, pieces(dict(model.state_dict()), metadata))


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
        names = pickle_globals(path)
        if names is not None:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise WeightsError(
                f"{path} is a pickle, which may run any code; it was not loaded. It asks for {shown or 'nothing'}.\n"
                "Use weights/model.safetensors of a run, or convert a file you trust: "
                "safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)."
            ) from error
        raise WeightsError(f"{path} is not a whole safetensors file ({error}). Use another checkpoint.") from error


def load_into(model: nn.Module, path: Path) -> dict[str, str]:
    """Load weights strictly into `model` and return the file's metadata.

    Raises:
        WeightsError: Names or shapes differ; the message lists the first five differences.
    """
    tensors, metadata = read(path)
    found = differences(model.state_dict(), tensors)
    if found:
        shown = "; ".join(found[:5])
        raise WeightsError(
            f"{path} does not fit this model, {len(found)} differences: {shown}. Use the run's own model=."
        )
    model.load_state_dict(tensors)
    return metadata


def differences(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> list[str]:
    """Return in words what keeps `tensors` of a file from taking the places of a model's `own`, by name and shape."""
    found = [f"missing {name}" for name in own if name not in tensors]
    found += [f"unexpected {name}" for name in tensors if name not in own]
    return found + [
        f"{name}: file {tuple(tensors[name].shape)}, model {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]


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
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"the weights' {key!r} is not JSON ({error}); they were not written by cvtrain.") from error
    return value


def parse_preprocess(metadata: dict[str, str], path: Path) -> Preprocess:
    """Return how a file's model wants its pictures prepared.

    Raises:
        WeightsError: The metadata do not say it, or are damaged.
    """
    values = parse_metadata(metadata, "preprocess")
    try:
        if not isinstance(values, dict):
            raise TypeError("not a mapping")
        found = Preprocess.from_dict(values)
        if not len(found.mean) == len(found.std) == found.channels or min(found.std) <= 0:
            raise ValueError(f"mean {found.mean} and std {found.std} for {found.channels} channels")
    except (KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{path} has a damaged preprocessing ({error!r}). Use weights/model.safetensors of a run."
        ) from error
    return found


def pickle_globals(path: Path) -> list[str] | None:
    """Return the names that a pickle would import, without running it; None when the file is no pickle.

    Args:
        path: Bare, or in a zip archive as `torch.save` writes it; only the first 16 MB are looked at.
    """
    with path.open("rb") as file:
        head = file.read(min(_PICKLE_BYTES, path.stat().st_size))
    if head.startswith(b"PK") and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            inside = [entry for entry in archive.infolist() if entry.filename.endswith(".pkl")]
            # A compressed one may be a bomb; torch.save does not compress.
            plain = [entry for entry in inside if entry.compress_type == zipfile.ZIP_STORED]
            head = b"".join(archive.read(entry) for entry in plain if entry.file_size <= _PICKLE_BYTES)
    elif not head.startswith(b"\x80"):
        return None
    found: dict[str, None] = {}
    with contextlib.suppress(Exception):  # whatever pickletools says of a torn one: it is refused all the same
        stream = io.BytesIO(head)
        while True:  # an old file is several pickles, one behind the other
            found |= dict.fromkeys(_globals(stream))
    return list(found)


def _globals(stream: io.BytesIO) -> Iterator[str]:
    strings: list[str] = []
    memo: dict[int, str] = {}
    top = ""
    for operation, argument, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            yield str(argument).replace(" ", ".")
        elif operation.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif operation.name == "MEMOIZE":
            memo[len(memo)] = top
        elif operation.name.endswith("PUT"):
            memo[int(argument or 0)] = top
        top = memo.get(int(argument or 0), "") if operation.name.endswith("GET") else str(argument or "")
        if isinstance(argument, str) or operation.name.endswith("GET"):
            strings.append(top)


def all_finite(tensors: dict[str, Tensor]) -> bool:
    """Return whether every floating-point tensor is finite; waits for their device once."""
    floating = [t for t in tensors.values() if t.is_floating_point()]
    # NaN and infinity outlive a sum, so a finite one clears the whole tensor at a tenth of the price of looking at each
    # value. Finite values may still add up to infinity; those are looked at.
    suspects = [t for t, total in zip(floating, _sums(floating), strict=True) if not math.isfinite(total)]
    return all(bool(torch.isfinite(t).all()) for t in suspects)


def _sums(tensors: list[Tensor]) -> list[float]:
    totals: list[float] = torch.stack([t.sum().float() for t in tensors]).tolist() if tensors else []
    return totals
