"""`cvtrain compress run=FOLDER compression=[…]`: add compressed artifacts to a finished run."""

from __future__ import annotations

from typing import Any

from cvtrain.command.finished import extend
from cvtrain.errors import ConfigError


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Compress, prove all of the run's artifacts again, and print table and folder; return the exit code.

    Raises:
        ConfigError: There is nothing to compress, or nothing to do.
    """
    if config["run"] is None:
        raise ConfigError("give run=FOLDER, the folder that a run printed.")
    if not config["compression"]:
        raise ConfigError("compression=none: there is nothing to do; give compression=[ptq_static] or other steps.")
    return extend(config, trusted)
