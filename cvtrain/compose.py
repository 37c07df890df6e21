"""From a command line to a checked config: Hydra composes, and nothing runs before audit and checks; torch-free."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cvtrain import catalog
from cvtrain.audit import audit, audit_hydra
from cvtrain.errors import ConfigError, did_you_mean, nearest
from cvtrain.schema import validate

CONFIG_PATH = "pkg://cvtrain.configs"
READABLE_VARIABLES = re.compile(r"HOME|USER|TMPDIR|DATA\w*|SLURM_\w+|CVTRAIN_\w+")
CHECKED_JOBS = 256
"""In a larger sweep each value is still checked, but not every combination."""


class Composer:
    """Composes and checks configs of one verb.

    Args:
        verb: Name of the primary config.
        config_dir: The user's own config folder (`-cd`), or None.

    Raises:
        ConfigError: `config_dir` is not a folder.
    """

    def __init__(self, verb: str, config_dir: str | None) -> None:
        self.verb = verb
        self.extra = Path(config_dir).absolute() if config_dir else None
        OmegaConf.register_new_resolver("oc.env", _environment, replace=True)
        search_path = create_config_search_path(CONFIG_PATH)
        if self.extra is not None:
            if not self.extra.is_dir():
                raise ConfigError(
                    f"--config-dir: {self.extra} is not a folder. Give the folder that holds your model/, data/ … YAML."
                )
            if isinstance(search_path, ConfigSearchPathImpl):
                search_path.prepend(provider="command-line", path=f"file://{self.extra}")
        GlobalHydra.instance().clear()
        self._hydra = Hydra.create_main_hydra2(verb, search_path)
        GlobalHydra.instance().clear()  # nobody else should meet this one
        self._parser = OverridesParser.create(config_loader=self._hydra.config_loader)

    def parse(self, overrides: Sequence[str]) -> list[Override]:
        """Parse overrides by Hydra's grammar.

        Raises:
            ConfigError: One does not parse.
        """
        for text in overrides:
            try:
                self._parser.parse_override(text)
            except HydraException as error:
                fix = "Write key=value, group=option or group=[a,b]."
                if "{" in text:
                    fix = """Braces need quotes of both kinds: 'data.root="shards/train-{000..012}.tar"'."""
                raise ConfigError(f"{text!r} is not an override ({str(error).splitlines()[0]}). {fix}") from error
        return self._parser.parse_overrides(list(overrides))

    def check(self, overrides: Sequence[str], trusted: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
        """Compose one job; return Hydra's config and the resolved plain config without `hydra`.

        Raises:
            ConfigError: Unknown names, wrong values, contradictions, refused targets.
        """
        self._check_names(overrides)
        try:
            composed = self._compose(overrides)
        except yaml.YAMLError as error:
            raise ConfigError(f"YAML that does not parse: {' '.join(str(error).split())}") from error
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, AssertionError, RecursionError) as error:
            raise self._explain(error, overrides) from error
        HydraConfig.instance().set_config(composed)
        if self.extra is not None or any("hydra" in text for text in overrides):  # else it is the shipped one
            audit_hydra(_hydra_node(composed), _hydra_node(Composer(self.verb, None)._compose([])))
            HydraConfig.instance().set_config(composed)
        config = plain(composed)
        audit(config, trusted)
        self._check_complete(config)
        validate(config, trusted)
        return composed, config

    def jobs(self, overrides: Sequence[str]) -> Iterator[list[str]]:
        """Expand a multirun's overrides into each job's; above CHECKED_JOBS only so that each value appears once."""
        choices: list[list[str]] = []
        for override in self.parse(overrides):
            if override.is_sweep_override() and override.is_discrete_sweep():
                choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
            elif not override.is_sweep_override():
                choices.append([override.input_line or ""])
        total = 1
        for values in choices:
            total *= len(values)
        if total <= CHECKED_JOBS:
            yield from (list(job) for job in itertools.product(*choices))
        else:
            yield from ([values[min(i, len(values) - 1)] for values in choices] for i in range(max(map(len, choices))))

    def _compose(self, overrides: Sequence[str]) -> DictConfig:
        return self._hydra.compose_config(
            config_name=self.verb,
            overrides=list(overrides),
            run_mode=RunMode.RUN,
            from_shell=True,
            with_log_configuration=False,
        )

    def _check_names(self, overrides: Sequence[str]) -> None:
        """Catch a misspelt group first: Hydra would suggest `+modle=…`, which trains the wrong model."""
        _refuse_expanded_braces(overrides)
        groups = catalog.groups(self.extra)
        if self.verb != "train":
            groups = {name: options for name, options in groups.items() if name in catalog.defaults(self.verb)}
        for override in self.parse(overrides):
            key = override.key_or_group
            if (
                override.is_add()
                or override.is_force_add()
                or override.is_delete()
                or key.startswith("hydra")
                or "." in key
            ):
                continue
            key = key.split("@")[0].strip("/")
            names = [name for name, _, _ in catalog.keys(self.verb)]
            if key in groups:
                value = override.value()
                for option in value if isinstance(value, list) else [value]:
                    if not override.is_sweep_override() and str(option) not in groups[key]:
                        raise ConfigError(
                            f"{key}={option} is unknown; {did_you_mean(str(option), groups[key], f'{key} options')}"
                        )
            elif key not in names:
                raise _unknown_name(key, override.get_value_element_as_str(), groups, names, self.verb)

    def _check_complete(self, config: dict[str, Any]) -> None:
        optional = {group for group, option in catalog.defaults(self.verb).items() if option == "null"}
        groups = set(catalog.defaults(self.verb)) - {"experiment", "debug"} - optional
        missing = sorted(groups.union(name for name, _, _ in catalog.keys(self.verb)) - config.keys())
        if missing:
            raise ConfigError(
                f"{missing[0]} was removed, and a run needs it. Leave ~{missing[0]} out; an option called "
                f"none does nothing."
            )

    def _explain(self, error: Exception, overrides: Sequence[str]) -> ConfigError:
        text = str(error)
        unknown = re.search(r"full_key: ([\w.\[\]]+)", text) or re.search(
            r"full_key: ([\w.\[\]]+)", str(error.__cause__)
        )
        key = unknown[1] if unknown else None
        missing = re.search(r"Could not override '([^']+)'", text)
        if key is None and missing:
            key = missing[1]
        if isinstance(error, MissingConfigException) and error.missing_cfg_file:
            group, _, option = error.missing_cfg_file.rpartition("/")
            options = catalog.groups(self.extra).get(group.strip("/"), {})
            return ConfigError(f"{group}={option} is unknown; {did_you_mean(option, options, f'{group} options')}")
        if key is not None and not key.startswith("hydra"):
            return ConfigError(
                f"unknown key {key!r}; {did_you_mean(key, self._known_keys(overrides), 'keys')}\nA new key needs a "
                f"plus: +{key}=…"
            )
        return ConfigError(" ".join(text.split()) or f"the config does not compose: {type(error).__name__}")

    def _known_keys(self, overrides: Sequence[str]) -> list[str]:
        groups = catalog.groups(self.extra)
        chosen = [text for text in overrides if text.partition("=")[0] in groups]
        return sorted(_leaves(plain(self._compose(chosen))))


def _refuse_expanded_braces(overrides: Sequence[str]) -> None:
    """Catch what a shell makes of unquoted braces; Hydra would keep the last shard and say nothing."""
    tars = [text.partition("=")[0] for text in overrides if text.endswith(".tar")]
    for key in tars:
        if tars.count(key) > 1:
            raise ConfigError(
                f"{key} is given {tars.count(key)} times: the shell has expanded its braces.\n"
                f"""Write 'data.root="shards/train-{{000..012}}.tar"', with both kinds of quotes."""
            )


def _hydra_node(composed: DictConfig) -> dict[str, Any]:
    container = OmegaConf.to_container(composed.hydra, resolve=False)
    return {str(key): value for key, value in container.items()} if isinstance(container, dict) else {}


def _environment(name: str, default: str | None = None) -> str | None:
    """Stand in for `oc.env`: a config is stored and shown, so it may read only variables that hold no secret.

    Raises:
        ConfigError: Another variable.
    """
    if not READABLE_VARIABLES.fullmatch(name):
        raise ConfigError(
            f"${{oc.env:{name}}} is refused; a config may read HOME, USER, TMPDIR, DATA…, SLURM_… and CVTRAIN_…."
        )
    return os.environ.get(name, default)


def plain(composed: DictConfig) -> dict[str, Any]:
    """Return the resolved config without `hydra` as plain dictionaries and lists.

    Raises:
        ConfigError: An interpolation does not resolve.
    """
    config = composed.copy()
    OmegaConf.set_readonly(config, False)
    OmegaConf.set_struct(config, False)
    config.pop("hydra", None)
    try:
        container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error.__cause__ or error).__name__
        raise ConfigError(f"an interpolation does not resolve: {reason}") from error
    if not isinstance(container, dict):
        raise ConfigError("the config is not a mapping.")
    return {str(key): _text_keys(value) for key, value in container.items()}


def _text_keys(value: Any) -> Any:  # noqa: ANN401 - any plain value
    """Return `value` with names as text: YAML reads a class called 1 as a number."""
    if isinstance(value, dict):
        return {str(key): _text_keys(below) for key, below in value.items()}
    return [_text_keys(below) for below in value] if isinstance(value, list) else value


def _unknown_name(key: str, value: str, groups: dict[str, dict[str, str]], names: list[str], verb: str) -> ConfigError:
    close = nearest(key, [*groups, *names])
    close.sort(key=lambda name: value not in groups.get(name, {}))  # a group that has this option is the likeliest
    hint = f"did you mean {' or '.join(f'{name}={value}' for name in close[:2])}? " if close else ""
    if not groups:
        return ConfigError(f"unknown key {key!r} of cvtrain {verb}; {hint}keys: {', '.join(names)}")
    return ConfigError(f"unknown group or key {key!r}; {hint}groups: {', '.join(groups)} (keys: cvtrain {verb} --help)")


def trusted_packages(overrides: Sequence[Override]) -> list[str]:
    """Return the packages of `trusted=[…]` on the command line.

    Raises:
        ConfigError: Not a list of package names.
    """
    found: list[str] = []
    for override in overrides:
        if override.key_or_group == "trusted":
            value = override.value()
            found = [str(v) for v in value] if isinstance(value, list) else []
            if not isinstance(value, list) or not all(name.isidentifier() for name in found):
                raise ConfigError(f"{override.input_line} is not a list of packages; write trusted=[mypkg]")
    return found


def group_choices(choices: Mapping[Any, Any]) -> dict[str, str]:
    """Return which option each group has, from `hydra.runtime.choices`."""
    return {str(key): str(value) for key, value in choices.items() if "hydra" not in str(key)}


def parse_flags(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parse Hydra's flags, wherever they stand between the overrides.

    Raises:
        ConfigError: An unknown flag.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    takes_value = {
        "-cd",
        "--config-dir",
        "-cp",
        "--config-path",
        "-cn",
        "--config-name",
        "-c",
        "--cfg",
        "-p",
        "--package",
        "-i",
        "--info",
    }
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in takes_value and rest and "=" not in rest[0]:
            flags.append(rest.pop(0))
    known = {option for action in parser._actions for option in action.option_strings}
    for flag in flags:
        if flag.startswith("-") and flag.split("=")[0] not in known:
            raise ConfigError(f"unknown flag {flag}; {did_you_mean(flag, sorted(known), 'flags')}")
    try:
        parser.exit_on_error = False
        return parser.parse_args([*overrides, *flags])
    except argparse.ArgumentError as error:
        raise ConfigError(f"{error}; see cvtrain --help") from error


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        if not str(key).startswith("_"):
            yield f"{prefix}{key}"
