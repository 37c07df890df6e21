"""Refuse configs that would run code nobody allowed; looked at before anything they name is imported. Torch-free.

`_target_` is code execution. Only the exact names that the shipped YAML uses may run, and names inside packages that
the command line trusts: `trusted=[mypkg]`. Keys under `hydra.` are held to a list of Hydra's own parts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from cvtrain.catalog import shipped_targets
from cvtrain.errors import ConfigError

HYDRA_TARGETS = frozenset(
    {
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
        "hydra._internal.core_plugins.basic_sweeper.BasicSweeper",
        "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher",
        "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher",
        "hydra_plugins.hydra_ray_launcher.ray_launcher.RayLauncher",
        "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper",
        "optuna.samplers.TPESampler",
        "optuna.samplers.RandomSampler",
        "optuna.samplers.GridSampler",
    }
)
LOGGING_CLASSES = frozenset(
    {"logging.StreamHandler", "logging.FileHandler", "logging.Formatter", "logging.NullHandler"}
)
LOGGING_STREAMS = frozenset({"ext://sys.stdout", "ext://sys.stderr"})


def audit(config: dict[str, Any], trusted: Sequence[str]) -> None:
    """Check every `_target_` of a run's config, resolved to plain values.

    Args:
        config: The composed config without `hydra`, as plain dictionaries and lists.
        trusted: Packages named on the command line.

    Raises:
        ConfigError: A target is not allowed; the message names its key and the fix.
    """
    stated = config.get("trusted") or []
    if sorted(map(str, stated)) != sorted(trusted):
        raise ConfigError(
            f"trusted={list(stated)} stands in a YAML file. Give it on the command line: "
            f"trusted=[{','.join(map(str, stated))}]"
        )
    allowed = shipped_targets()
    for path, key, value in _walk(config):
        if key != "_target_":
            continue
        if not isinstance(value, str) or not all(part.isidentifier() for part in value.split(".")):
            raise ConfigError(f"{path}={value!r} is refused: a _target_ is a dotted name, package.thing.")
        package = value.split(".")[0]
        if value not in allowed and package not in trusted:
            fix = (
                "It is part of Python, not of a model: remove it."
                if package in sys.stdlib_module_names
                else f"If {package!r} is your own package, add trusted=[{package}] to the command line."
            )
            raise ConfigError(f"{path}={value} is refused: it is not among the targets that cvtrain ships.\n{fix}")


def audit_hydra(config: dict[str, Any]) -> None:
    """Check the `hydra` node: only Hydra's own launchers, sweepers and plain logging may be named.

    Args:
        config: `cfg.hydra` as plain values, not resolved.

    Raises:
        ConfigError: A callback, an unknown target, or a logging class of somebody's.
    """
    for path, key, value in _walk(config):
        where = f"hydra.{path}"
        if key == "_target_" and value not in HYDRA_TARGETS:
            raise ConfigError(
                f"{where}={value} is refused: only Hydra's own launchers and sweepers may be named there. Remove it."
            )
        if path.startswith(("job_logging.", "hydra_logging.")):
            if key == "class" and value not in LOGGING_CLASSES:
                raise ConfigError(f"{where}={value} is refused; logging classes: {', '.join(sorted(LOGGING_CLASSES))}.")
            if key in ("()", "factory") or (isinstance(value, str) and "://" in value and value not in LOGGING_STREAMS):
                raise ConfigError(f"{where}={value} is refused: a logging config may not name code. Remove it.")


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:  # noqa: ANN401 - any plain value
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        path = f"{prefix}.{key}" if prefix else str(key)
        yield path, str(key), value
        yield from _walk(value, path)
