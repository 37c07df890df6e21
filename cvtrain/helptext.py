"""Help pages, made from the YAML files and their comments; torch-free and Hydra-free."""

from __future__ import annotations

from pathlib import Path

from cvtrain import catalog
from cvtrain.errors import ConfigError, did_you_mean

EXAMPLES = """\
  cvtrain                                              train the default: handwritten digits, on this machine
  cvtrain model=resnet18 aug=cutmix precision=amp      choose options of groups
  cvtrain data=folder data.root=photos epochs=50       your own pictures: photos/<class>/*.jpg
  cvtrain -m model=lenet5,simple_cnn seed=0,1          a sweep: every combination
"""


def overview() -> str:
    """Return the page of `cvtrain --help`: verbs, groups and their options, one line each."""
    chosen = catalog.defaults()
    lines = [
        "cvtrain: train, compress, export and prove a vision model with one command.",
        "",
        "Usage: cvtrain [VERB] [group=option] [key=value] [flags]",
        "",
        EXAMPLES.rstrip("\n"),
        "",
        "Verbs",
    ]
    lines += [
        f"  {name:<14}{text}"
        for name, text in {**catalog.verbs(), "list": "Show the options of a group: cvtrain list model"}.items()
    ]
    for group, options in catalog.groups().items():
        lines += ["", f"{group}  (default: {chosen.get(group, 'none')})"]
        lines += [f"  {name:<20}{text}" for name, text in options.items()]
    lines += [
        "",
        "Keys and flags: cvtrain train --help. One group: cvtrain list GROUP. The whole config: cvtrain --cfg job.",
        "",
    ]
    return "\n".join(lines)


def verb_help(verb: str) -> str:
    """Return the page of `cvtrain VERB --help`: its keys with defaults, and Hydra's flags."""
    if verb == "list":
        return "cvtrain list [GROUP]: show the groups, or the options of one group.\n"
    lines = [f"cvtrain {verb}: {catalog.verbs()[verb]}", "", "Keys (set with key=value)"]
    lines += [f"  {name + '=' + default:<34}{text}" for name, default, text in catalog.keys(verb)]
    chosen = catalog.defaults(verb)
    if chosen:
        lines += ["", "Groups (set with group=option; cvtrain list GROUP shows the options)"]
        lines += [
            f"  {group + '=' + default:<34}{' '.join(catalog.groups()[group])}" for group, default in chosen.items()
        ]
    lines += [
        "",
        "Flags",
        "  -m, --multirun                    run every combination of comma-separated values",
        "  --cfg job [--resolve]             print the composed config and stop",
        "  -cd DIR                           add a folder with your own YAML; see trusted=",
        "  --info, --hydra-help              Hydra's own pages",
        "  --shell-completion                see `cvtrain --hydra-help`",
        "",
    ]
    return "\n".join(lines)


def listing(words: list[str], extra: Path | None = None) -> str:
    """Return the page of `cvtrain list [GROUP]`, the options of the `-cd` folder `extra` included.

    Raises:
        ConfigError: Unknown group.
    """
    groups = catalog.groups(extra)
    if not words:
        return "".join(f"{group:<14}{' '.join(options)}\n" for group, options in groups.items())
    unknown = [word for word in words if word not in groups]
    if unknown:
        raise ConfigError(f"unknown group {unknown[0]!r}; {did_you_mean(unknown[0], groups, 'groups')}")
    chosen = catalog.defaults()
    lines: list[str] = []
    for group in words:
        default = chosen.get(group, "none").strip("[]").split(", ")
        lines += [f"{'*' if name in default else ' '} {name:<20}{text}" for name, text in groups[group].items()]
    return "\n".join([*lines, "* default", ""])
