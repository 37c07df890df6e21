"""What published data sets share: their files are looked for, named when absent, and downloaded when asked for."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cvtrain.errors import DataError


@dataclass(kw_only=True)
class Official:
    """A data set in its official files.

    Attributes:
        root: Folder of the files; null means `data/<name>` under the current folder.
    """

    name: ClassVar[str]
    subfolders: ClassVar[tuple[str, ...]] = ("",)
    """Where the files may lie below `root`, the folder that the official archive makes first."""
    needed: ClassVar[tuple[str, ...]] = ()
    """Names of the files, and of folders with a slash behind."""
    fix: ClassVar[str] = "give the folder with data.root=DIR"

    root: str | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of the files."""
        return Path(self.root) if self.root is not None else Path("data") / self.name

    def _files(self) -> dict[str, Path]:
        """Return the files by role.

        Raises:
            DataError: They are absent.
        """
        found = self._find()
        if found is None:
            raise DataError(
                f"data={self.name}: no data in {self.folder.absolute()}\n"
                f"  expected there: {self._expected()}\n"
                f"  {self.fix}"
            )
        return found

    def _expected(self) -> str:
        """Return the names of the files, for messages."""
        names = ", ".join(self.needed)
        return f"{self.subfolders[0]}/ with {names}" if self.subfolders[0] else names

    def _find(self) -> dict[str, Path] | None:
        """Return the files by role, None when not all are there."""
        for subfolder in self.subfolders:
            found = {name: self.folder / subfolder / name for name in self.needed}
            if all(path.is_dir() if name.endswith("/") else path.is_file() for name, path in found.items()):
                return found
        return None


@dataclass(kw_only=True)
class Downloadable(Official):
    """A data set that torchvision can download.

    Attributes:
        download: Let torchvision download the files into `root` when they are absent.
    """

    torchvision_name: ClassVar[str]
    torchvision_splits: ClassVar[tuple[Mapping[str, Any], ...]] = ({"train": True}, {"train": False})
    fix: ClassVar[str] = "give the folder with data.root=DIR, or download it with data.download=true"

    download: bool = False

    def _files(self) -> dict[str, Path]:
        """Return the files by role, downloading them when that was asked for and they are absent."""
        if self.download and self._find() is None:
            self._fetch()
        return super()._files()

    def _fetch(self) -> None:
        # Slow to import and needed for nothing else.
        from torchvision import datasets

        dataset: Any = getattr(datasets, self.torchvision_name)
        try:
            for split in self.torchvision_splits:
                dataset(str(self.folder), **split, download=True)
        # torchvision's downloaders raise a dozen types, from URLError to RuntimeError.
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"data={self.name}: the download into {self.folder.absolute()} failed: {reason}\n"
                f"  put the files there yourself ({self._expected()}) or give their folder with data.root=DIR"
            ) from error


def read_mat(path: Path, *names: str) -> list[NDArray[Any]]:
    """Return variables of a MATLAB file (version 5).

    Raises:
        DataError: It is damaged or another file, or has no integers of that name.
    """
    from scipy.io import loadmat

    fix = "it is damaged or another file; delete it and download it again"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = loadmat(path, variable_names=names)
    # The parser meets damage with whatever its next step raises.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: {reason}\n  {fix}") from error
    arrays = []
    for name in names:
        array = content.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
            raise DataError(f"{path}: no integers '{name}'\n  {fix}")
        arrays.append(array)
    return arrays
