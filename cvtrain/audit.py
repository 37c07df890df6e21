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
FREE_HYDRA_KEYS = ("overrides", "runtime", "job.override_dirname", "verbose")
"""Below `hydra`: what Hydra itself writes down about a command, and its verbosity."""
CHOSEN_HYDRA_KEYS = ("launcher", "sweeper")
"""Below `hydra`: nodes that an option of Hydra's own may replace."""


def audit(config: dict[str, Any], trusted: Sequence[str]) -> None:
    """Check every `_target_` of a run's config, resolved to plain values.

    Args:
        config: The composed config without `hydra`, as plain dictionaries and lists.
        trusted: Packages named on the command line.

    Raises:
        ConfigError: A target is not allowed; the message names its key and the fix.
    """
    stated = config.get("trusted") or []
    if not isinstance(stated, list):
        raise ConfigError(f"trusted={stated} is not a list of packages; write trusted=[mypkg] on the command line.")
    if sorted(map(str, stated)) != sorted(trusted):
        raise ConfigError(
            f"trusted={list(stated)} stands in a YAML file. Give it on the command line: "
            f"trusted=[{','.join(map(str, stated))}]"
        )
    allowed = shipped_targets()
    for path, key, value in _walk(config):
        if "${" in key or (isinstance(value, str) and "${" in value):
            # It would be resolved later, by then unseen.
            raise ConfigError(f"{path}={value!r} is refused: an interpolation is left over after composing. Remove it.")
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


def audit_hydra(config: dict[str, Any], shipped: dict[str, Any]) -> None:
    """Check the `hydra` node: it must be the shipped one but for Hydra's own launchers and sweepers.

    Hydra acts on this node by itself: it calls callbacks, configures logging, sets environment variables.

    Args:
        config: `cfg.hydra` as plain values, not resolved.
        shipped: The same of a command without any override or folder of the user's.

    Raises:
        ConfigError: Something else differs; the message names the key.
    """
    before = {path: value for path, _, value in _walk(shipped) if not isinstance(value, (dict, list))}
    now = {path: value for path, _, value in _walk(config) if not isinstance(value, (dict, list))}
    for path in sorted(before.keys() | now.keys()):
        if before.get(path) == now.get(path) and (path in before) == (path in now):
            continue
        value = now.get(path)
        if path.startswith(FREE_HYDRA_KEYS):
            continue
        if path in ("run.dir", "sweep.dir", "sweep.subdir"):
            raise ConfigError(
                f"hydra.{path}={value} is refused: cvtrain names the run folder. Use output_dir=DIR and name=NAME."
            )
        chosen = path.startswith(CHOSEN_HYDRA_KEYS) and not path.startswith("sweeper.params") and "${" not in str(value)
        is_target = path.rpartition(".")[2] == "_target_"
        if not chosen or (is_target and value not in HYDRA_TARGETS):
            raise ConfigError(
                f"hydra.{path}={value} is refused: Hydra would act on it by itself. Only Hydra's own "
                f"launchers, sweepers "
                "and hydra.verbose may be chosen; sweep with -m key=a,b."
            )


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, str, Any]]:  # noqa: ANN401 - any plain value
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in pairs:
        path = f"{prefix}.{key}" if prefix else str(key)
        yield path, str(key), value
        yield from _walk(value, path)
