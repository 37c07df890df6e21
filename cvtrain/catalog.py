"""What there is to choose from, read from the YAML files themselves; torch-free and Hydra-free.

The first comment of each file (after `# @package`) says in a few words what the option is.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

_TARGET = re.compile(r"_target_:\s*['\"]?([\w.]+)")
_KEY = re.compile(r"^(\w+):\s*([^#]*?)\s*(?:#\s*(.*))?$")
_TAKES_TRAIN = re.compile(r"^\s+- train$", re.MULTILINE)


def config_folder() -> Path:
    """Return the folder of the shipped YAML."""
    return Path(str(resources.files("cvtrain.configs")))


def verbs() -> dict[str, str]:
    """Return each verb that is a Hydra app, and its description, `train` first."""
    found = {path.stem: _describe(path) for path in sorted(config_folder().glob("*.yaml"))}
    return {"train": found.pop("train"), **found}


def groups(extra: Path | None = None) -> dict[str, dict[str, str]]:
    """Return group -> option -> description.

    Args:
        extra: The user's own config folder (`-cd`); its options come after the shipped ones.
    """
    found: dict[str, dict[str, str]] = {}
    for root in (config_folder(), *([extra] if extra else [])):
        for path in sorted(root.glob("*/*.yaml")):
            found.setdefault(path.parent.name, {})[path.stem] = _describe(path)
    order = _defaults_order()
    return dict(sorted(found.items(), key=lambda item: order.index(item[0]) if item[0] in order else len(order)))


def defaults(verb: str = "train") -> dict[str, str]:
    """Return the option, or the list of options, that each group of a verb has in its YAML; empty without groups."""
    block = (config_folder() / f"{verb}.yaml").read_text().partition("defaults:\n")[2].split("\n\n", 1)[0]
    pairs = re.findall(r"^\s+- (\w+):\s*([^#\n]+)", block, flags=re.MULTILINE)
    below = defaults() if _TAKES_TRAIN.search(block) else {}
    return below | {group: option.strip() for group, option in pairs}


def keys(verb: str) -> list[tuple[str, str, str]]:
    """Return name, default and comment of each plain key at the top of a verb's YAML, and of `train` where it is in."""
    found: list[tuple[str, str, str]] = []
    content = (config_folder() / f"{verb}.yaml").read_text()
    for line in content.splitlines():
        match = _KEY.match(line)
        if match and match[1] not in ("defaults", "hydra"):
            found.append((match[1], match[2], match[3] or ""))
    own = {name for name, _, _ in found}
    return found + [key for key in (keys("train") if _TAKES_TRAIN.search(content) else []) if key[0] not in own]


def shipped_targets() -> frozenset[str]:
    """Return every `_target_` named in the shipped YAML: the only ones that run without `trusted=`."""
    return frozenset(
        target
        for path in config_folder().rglob("*.yaml")
        for target in _TARGET.findall(path.read_text(encoding="utf-8"))
    )


def _describe(path: Path) -> str:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            if not line.startswith("# @package"):
                return line.lstrip("# ").strip()
    return ""


def _defaults_order() -> list[str]:
    return [*defaults()]
