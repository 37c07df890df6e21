"""A trained model that answers for pictures: `cvtrain.load(RUN).predict(["a.jpg"])`.

Torch is imported only for artifacts that need it: with an ONNX file the first answer is there in a second.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvtrain import runs
from cvtrain.command import worker
from cvtrain.core.artifact import Artifact
from cvtrain.core.index import INDEX, Entry, check, is_older, read_index
from cvtrain.core.picture import given_square, printable, read_square
from cvtrain.core.runtimes import ONNXRUNTIME, OPENVINO, TENSORRT, TORCH, TORCH_EXPORT, TORCHSCRIPT
from cvtrain.errors import ConfigError, DataError, WeightsError, did_you_mean
from cvtrain.runtime.base import Loaded
from cvtrain.runtime.prepare import MULTILABEL, class_names, preparation, temperature
from cvtrain.runtime.session import Session

AUTO = "auto"
MODEL = Path("weights") / "model.safetensors"

_UNASKED = {AUTO: (TORCH, ONNXRUNTIME, OPENVINO, TENSORRT), "cpu": (TORCH, ONNXRUNTIME, OPENVINO)}
"""What `artifact=auto` may take, by device: none whose files may run code when they are loaded."""

_RUNTIMES = {
    ".onnx": ONNXRUNTIME,
    ".xml": OPENVINO,
    ".pt2": TORCH_EXPORT,
    ".torchscript": TORCHSCRIPT,
    ".zip": TENSORRT,
}
"""By the end of a file's name; anything else must be a .safetensors, and says so when it is not."""

Picture: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | NDArray[np.uint8]
"""A file's path, a file's bytes, an image of Pillow's, or uint8 `(H, W)` or `(H, W, C)`."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of one picture.

    Attributes:
        name: The file's path as text that prints on one line; of what is no file its position: `#0`.
        classes: Class names with their calibrated probabilities 0..1, the likeliest first; empty with an `error`.
        labels: Of a multi-label model all classes with a probability of 0.5 or more, in the order of the class list;
            None where one class is chosen.
        error: Why the picture could not be read, its name in front; None where it could.
    """

    name: str
    classes: tuple[tuple[str, float], ...] = ()
    labels: tuple[str, ...] | None = None
    error: str | None = None

    @property
    def label(self) -> str:
        """Return the likeliest class."""
        return self._first[0]

    @property
    def probability(self) -> float:
        """Return its probability."""
        return self._first[1]

    @property
    def _first(self) -> tuple[str, float]:
        if self.error is not None:
            raise DataError(self.error)
        return self.classes[0]


class Predictor:
    """A trained model with its own preprocessing, class names and calibration; nothing but its file is needed.

    Args:
        run_or_file: A run folder, or a file: model.safetensors, .onnx, …
        artifact: A row of the run's artifacts.csv. `auto`: the run's winner; where it has none, the fastest file that
            gives the model's own answers; where nothing was exported, weights/model.safetensors.
        threads: CPU threads inside one operator, for torch those of the whole process; None: what the runtime takes.
        device: `auto`, `cpu`, `cuda`, `mps`. All but a PyTorch network run on the CPU: another device makes `auto` take
            the float model.
        trusted: Packages of one's own that a PyTorch network may come from.

    Attributes:
        artifact: What answers.
        class_names: K names.
        multilabel: Whether a picture may have several labels, or none.

    Raises:
        ConfigError: No run folder, no such artifact or device, or a runtime that is not installed.
        WeightsError: The file is missing or damaged.
    """

    def __init__(
        self,
        run_or_file: str | os.PathLike[str],
        artifact: str = AUTO,
        threads: int | None = None,
        device: str = AUTO,
        trusted: Sequence[str] = (),
    ) -> None:
        place = Path(run_or_file)
        self.artifact = _of_run(place, artifact, device) if place.is_dir() else _of_file(place, artifact)
        path = self.artifact.path
        loaded = _load(self.artifact, threads, device, trusted)
        self._session = Session(loaded, path)
        self._prepare = preparation(loaded.metadata, path)
        self._temperature = temperature(loaded.metadata, path)
        self.class_names = class_names(loaded.metadata, path)
        self.multilabel = loaded.metadata.get("task") == MULTILABEL

    @property
    def channels(self) -> int:
        """Return the channels of a picture; files are read for 1 or 3, arrays may have more."""
        return self._prepare.shape[0]

    def predict(self, sources: Picture | Iterable[Picture], topk: int = 1, batch_size: int = 32) -> list[Prediction]:
        """Answer for pictures.

        Args:
            sources: The pictures, or a single one.
            topk: Classes a picture, the likeliest first; all where there are not so many.
            batch_size: Pictures that the model takes at once.

        Returns:
            One answer for each, in their order.

        Raises:
            DataError: Pictures cannot be read; all are named. `stream` answers for the others.
        """
        answers = list(self.stream(sources, batch_size, topk))
        errors = [answer.error for answer in answers if answer.error is not None]
        if errors:
            raise DataError("\n".join(errors))
        return answers

    def stream(self, sources: Picture | Iterable[Picture], batch_size: int = 32, topk: int = 1) -> Iterator[Prediction]:
        """Answer for any number of pictures in the memory that one batch takes.

        Args:
            sources: The pictures, or a single one; taken `batch_size` at a time, when their answers are asked for.
            batch_size: Pictures that the model takes at once.
            topk: Classes a picture, the likeliest first; all where there are not so many.

        Yields:
            One answer for each, in their order; of a picture that cannot be read its `error`.
        """
        numbered = enumerate(_several(sources))
        while chunk := list(islice(numbered, batch_size)):
            read = [self._read(picture, f"#{number}") for number, picture in chunk]
            images = [image for _, image in read if not isinstance(image, DataError)]
            answers = self._answers(images, topk) if images else iter(())
            for name, image in read:
                if isinstance(image, DataError):
                    yield Prediction(name, error=str(image))
                else:
                    classes, labels = next(answers)
                    yield Prediction(name, classes, labels)

    def _read(self, picture: Picture, position: str) -> tuple[str, NDArray[np.uint8] | DataError]:
        """Return a picture's name, and uint8 `(C, resize, resize)` or why there is none."""
        channels, resize, _ = self._prepare.shape
        how = self._prepare.interpolation
        name = printable(os.fspath(picture)) if isinstance(picture, (str, os.PathLike)) else position
        try:
            if isinstance(picture, (Image.Image, np.ndarray)):
                return name, given_square(picture, resize, channels, name, how)
            if channels not in (1, 3):
                return name, DataError(f"{name}: files are read for models of 1 or 3 channels, not {channels}")
            content = picture if isinstance(picture, bytes) else os.fspath(picture)
            return name, read_square(content, resize, channels, place=name, interpolation=how)
        except DataError as error:
            return name, error

    def _answers(
        self, images: Sequence[NDArray[np.uint8]], topk: int
    ) -> Iterator[tuple[tuple[tuple[str, float], ...], tuple[str, ...] | None]]:
        """Yield the likeliest classes and the labels of each picture."""
        given = self._session.run(np.stack(images))
        embedded = self._session.embedded
        shares = given if embedded else probabilities(given, self._temperature, self.multilabel)
        decided = given >= (0.5 if embedded else 0.0)
        order = np.argsort(-shares, axis=1, kind="stable")[:, :topk]
        for row, best, chosen in zip(shares, order.tolist(), decided, strict=True):
            labels = tuple(self.class_names[k] for k in np.flatnonzero(chosen)) if self.multilabel else None
            yield tuple((self.class_names[k], float(row[k])) for k in best), labels


def _several(sources: Picture | Iterable[Picture]) -> Iterable[Picture]:
    if isinstance(sources, np.ndarray):
        return [sources] if sources.ndim < 4 else list(sources)
    return [sources] if isinstance(sources, (str, bytes, os.PathLike, Image.Image)) else sources


def probabilities(logits: NDArray[np.float32], temperature: float, multilabel: bool) -> NDArray[np.float32]:
    """Turn logits `(B, K)` into probabilities 0..1: `evaluation.calibration.to_probabilities` without torch.

    Args:
        logits: As the model gives them.
        temperature: What they are divided by, above 0.
        multilabel: Whether each class is decided by itself (sigmoid); otherwise the classes share 1 (softmax).
    """
    scaled = logits / np.float32(temperature)
    if multilabel:
        each: NDArray[np.float32] = np.exp(-np.logaddexp(np.float32(0), -scaled))
        return each
    powers = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _of_file(path: Path, artifact: str) -> Artifact:
    if artifact != AUTO:
        raise ConfigError(f"artifact={artifact} chooses among the files of a run folder; {path} is none.")
    return Artifact(path.stem, path, _RUNTIMES.get(path.suffix, TORCH), 0, 0)


def _of_run(folder: Path, name: str, device: str) -> Artifact:
    """Return the artifact of a run that is asked for, after a look whether its file is the one that was proved."""
    if not (folder / runs.ARGS).is_file():
        raise ConfigError(
            f"run={folder} is not a run folder: it has no {runs.ARGS}. Use the folder that a run printed."
        )
    table = folder / INDEX
    entries = read_index(table) if table.is_file() and not is_older(table) else []
    found = _best(folder, entries, device) if name == AUTO else _named(entries, name)
    if found is not None:
        check(found, table)
        return found.artifact
    model = Artifact("fp32", folder / MODEL, TORCH, 0, 0)
    if name not in (AUTO, model.name):
        known = [entry.artifact.name for entry in entries] or [model.name]
        raise ConfigError(f"artifact={name}: {did_you_mean(name, known, 'artifacts')} in {folder}")
    if not model.path.is_file():
        raise WeightsError(f"run={folder} has no {MODEL}. Let it finish: the same command with resume=auto.")
    return model


def _named(entries: Sequence[Entry], name: str) -> Entry | None:
    return next((entry for entry in entries if entry.artifact.name == name), None)


def _best(folder: Path, entries: Sequence[Entry], device: str) -> Entry | None:
    able = [entry for entry in entries if entry.artifact.runtime in _UNASKED.get(device, (TORCH,))]
    winner = _named(able, str(runs.read_json(folder / "metrics.json").get("winner")))
    # A compressed file that missed the budget may be fast and wrong.
    exact = [entry for entry in able if entry.artifact.exact and not math.isnan(entry.latency_ms)]
    return winner or min(exact, key=lambda entry: entry.latency_ms, default=None)


def _load(artifact: Artifact, threads: int | None, device: str, trusted: Sequence[str]) -> Loaded:
    if artifact.runtime == TORCH:
        return _load_torch(artifact.path, threads, device, trusted)
    if device not in (AUTO, "cpu"):
        raise ConfigError(
            f"device={device} is for PyTorch networks; {artifact.path} is run by {artifact.runtime}.\n"
            "Leave device= out, or take artifact=fp32."
        )
    if threads is None and artifact.runtime in (TORCH_EXPORT, TORCHSCRIPT):
        import torch

        threads = torch.get_num_threads()
    # To the other runtimes 0 means as many as they think best.
    return worker.load(artifact.runtime, artifact.path, threads or 0, trusted)


def _load_torch(path: Path, threads: int | None, device: str, trusted: Sequence[str]) -> Loaded:
    import torch

    from cvtrain.build import Builder
    from cvtrain.command import deployed

    if threads is not None:
        torch.set_num_threads(threads)
    shipped = deployed.load_file(path, Builder({"device": device}, []).device(), list(trusted))

    def forward(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            logits: NDArray[np.float32] = (
                shipped.model(torch.from_numpy(pixels).to(shipped.device)).float().cpu().numpy()
            )
            return logits

    return Loaded(forward, shipped.metadata)
