"""Packages that only some options need."""

from __future__ import annotations

import importlib
from typing import Any

from cvtrain.errors import ConfigError


def import_extra(module: str, option: str, extra: str) -> Any:  # noqa: ANN401 - a module without types
    """Import `module` of the extra `extra`, which `option` needs.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{option} needs the package {package}, which cannot be imported ({error})\n"
            f"  install it: pip install 'cvtrain[{extra}]'"
        ) from error
