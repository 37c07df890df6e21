"""Export of a network's graph, written by a library and compared with the network before anyone else sees it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn

from cvtrain.core.artifact import Artifact
from cvtrain.core.complexity import count_macs, count_params
from cvtrain.export.base import Exporter
from cvtrain.export.check import compare
from cvtrain.export.network import Prepared, prepare
from cvtrain.export.writing import reporting, writing


class GraphExporter(Exporter):
    """Write a graph that runs in a runtime of its own.

    Attributes:
        option: The option's own name.
        runtime: One of `core.runtimes.RUNTIMES`.
        suffix: Of the file's name.
        note: What a reader of the table should know.
    """

    option: ClassVar[str]
    runtime: ClassVar[str]
    suffix: ClassVar[str]
    note: ClassVar[str] = ""

    def __init__(self, embed_preprocessing: bool = False) -> None:
        """Keep the settings.

        Args:
            embed_preprocessing: Take uint8 pictures as they are read and give probabilities.
        """
        self.embed_preprocessing = embed_preprocessing

    def export(
        self, model: nn.Module, example: Tensor, folder: Path, metadata: Mapping[str, str], name: str = "model"
    ) -> Artifact:
        """Write the file and check it.

        Args:
            model: Any device and mode; never changed.
            example: `(1, C, H, W)` float32 normalised input.
            folder: Where the file goes; exists.
            metadata: Text for the file.
            name: The file's, without its suffix.

        Returns:
            The file, already compared with `model`.

        Raises:
            CvtrainError: The model cannot be exported, or the file does not reproduce it.
            StorageError: The disk is full or read-only.
        """
        path = folder / f"{name}{self.suffix}"
        prepared = prepare(model, example, metadata, self.embed_preprocessing)
        with reporting(self.option), writing(path) as work:
            sizes = self._write(prepared, work)
            compare(prepared, work, self.runtime, sizes)
        params, macs = count_params(model), count_macs(model, example)
        return Artifact(self.option, path, self.runtime, params, macs, note=self.note)

    @abstractmethod
    def _write(self, prepared: Prepared, path: Path) -> tuple[int, ...]:
        """Write the file, and return the batch sizes that it takes.

        Raises:
            ExportError: The library cannot.
        """
