"""What every exporter does, and the preprocessing written beside its file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor, nn

from cvtrain.core.artifact import Artifact
from cvtrain.core.files import write_json


class Exporter(Protocol):
    """One option of the `export` group."""

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Write `model` to a file in `folder`, and compare the file with it.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where the file goes; exists.
            metadata: Text to store inside the file: JSON of the class names and the preprocessing, the version.
            name: The file's, without its suffix.

        Returns:
            The file, ready to be proved, as a row with the option's own name.
        """
        ...

    def retry(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact | None:
        """Write the same file in another way, when a proof has refused the one that `export` wrote.

        Args:
            model: As for `export`.
            example: As for `export`.
            folder: As for `export`.
            metadata: As for `export`.
            name: As for `export`.

        Returns:
            The file; None where there is no other way.
        """
        return None


def write_preprocess(folder: Path, metadata: Mapping[str, str]) -> Path:
    """Write the metadata of an export beside it, for programs that do not read the file's own.

    Args:
        folder: Where `preprocess.json` goes; exists.
        metadata: Values that are JSON are written as JSON, other text as text.

    Returns:
        Path of the file.

    Raises:
        StorageError: The disk is full or read-only.
    """
    path = folder / "preprocess.json"
    write_json(path, {key: _parse(value) for key, value in metadata.items()})
    return path


def _parse(text: str) -> object:
    # Only structures: a version such as "1.0" must stay text.
    if not text.lstrip().startswith(("{", "[")):
        return text
    try:
        value: object = json.loads(text)
    except ValueError:
        return text
    return value
