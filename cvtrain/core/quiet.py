"""Keeping the chatter of export and quantization libraries off the user's terminal."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Swallow prints, Python warnings and log records while the block runs; exceptions pass."""
    root = logging.getLogger()
    # `logging.warning` installs a handler on a root logger that has none, which would outlive the block.
    guard = logging.NullHandler()
    disabled = root.manager.disable
    root.addHandler(guard)
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.removeHandler(guard)
