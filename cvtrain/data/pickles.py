"""CIFAR's pickles, read without giving a pickle the power to run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cvtrain.errors import DataError

_RECONSTRUCT: Any = np.empty(0).__reduce__()[0]
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Builds numbers, text, lists, dicts and NumPy arrays, and refuses to look up anything else."""

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401 - the signature of pickle
        try:
            return _ALLOWED[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR file does") from None


def read_pickle(path: Path) -> dict[str, Any]:
    """Read a pickled dict of text, numbers and arrays.

    Args:
        path: A file of Python 2's or 3's pickle.

    Returns:
        The dict, its keys as text.

    Raises:
        DataError: The file is unreadable, not such a dict, or asks for anything that could run code.
    """
    try:
        with path.open("rb") as stream:
            content = _ArrayUnpickler(stream, encoding="latin1").load()
    # A damaged pickle raises nearly anything; whatever it is, nothing has been run.
    except Exception as error:
        raise DataError(
            f"{path}: refused or damaged: {error or type(error).__name__}\n"
            "  delete it and download it again from https://www.cs.toronto.edu/~kriz/cifar.html"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a dict\n  it is not a CIFAR file")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def cifar_arrays(path: Path, label_key: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one batch file of CIFAR.

    Args:
        path: The file.
        label_key: `labels` (CIFAR-10) or `fine_labels` (CIFAR-100).

    Returns:
        Pictures uint8 `(N, 32, 32, 3)` and labels int64 `(N,)`.

    Raises:
        DataError: As `read_pickle`, or data and labels are not those of CIFAR.
    """
    content = read_pickle(path)
    pixels, labels = content.get("data"), content.get(label_key)
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.ndim != 2
        or pixels.shape[1] != 3 * 32 * 32
        or not isinstance(labels, list)
        or len(labels) != len(pixels)
        or not all(isinstance(label, int) for label in labels)
    ):
        raise DataError(
            f"{path}: expected 'data' uint8 (N, 3072) and '{label_key}', a list of N numbers\n"
            "  it is not a CIFAR file in the python version"
        )
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, dtype=np.int64)
