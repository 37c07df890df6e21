"""The IDX file format of MNIST (http://yann.lecun.com/exdb/mnist), plain or gzipped."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvtrain.errors import DataError


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """Read an IDX file of bytes.

    Args:
        path: The file; a name ending in .gz is unpacked.
        dims: How many dimensions it must have: 1 for labels, 3 for pictures.

    Returns:
        uint8 array of the shape the file's header states.

    Raises:
        DataError: The file cannot be read, has another magic number or dimensions, or its length does not match.
    """
    fix = "it is damaged or another file; delete it and download it again"
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise DataError(
                    f"{path}: not an IDX file of bytes in {dims} dimension(s), it begins {header[:4]!r}\n  {fix}"
                )
            shape = [int(n) for n in np.frombuffer(header, ">u4", offset=4)]
            expected = int(np.prod(shape, dtype=object))
            # One byte more than stated shows a file that is too long without unpacking a gzip bomb.
            body = stream.read(expected + 1)
    except (OSError, EOFError, zlib.error, MemoryError, OverflowError) as error:
        raise DataError(f"{path}: {error or type(error).__name__}\n  {fix}") from error
    if len(body) != expected:
        more = "more" if len(body) > expected else f"only {len(body)}"
        raise DataError(f"{path}: the header states {shape} = {expected} bytes, there are {more}\n  {fix}")
    return np.frombuffer(body, np.uint8).reshape(shape)
