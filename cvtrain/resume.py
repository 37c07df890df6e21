"""What may change between a run and its continuation, and how exact the continuation is; torch-free."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from cvtrain.core.files import to_json_line
from cvtrain.errors import ConfigError, did_you_mean


class Effect(IntEnum):
    """What another value of a key does to a run that has begun; the first three are free."""

    NOTHING = 0
    """No number changes."""
    ENDING = 1
    """Training ends elsewhere, or something else follows it: a finished run goes on."""
    ROUNDING = 2
    """The same samples in the same order, rounded elsewhere."""
    TRAINING = 3
    """The rest trains otherwise: `resume_allow` must name the key."""
    IDENTITY = 4
    """It would be another run: refused."""

    @property
    def word(self) -> str:
        """Return what the user may do with such a change: free, confirm or never."""
        return {Effect.TRAINING: "confirm", Effect.IDENTITY: "never"}.get(self, "free")


CLASSES = {
    Effect.NOTHING: """
        name output_dir json trusted resume resume_allow workers logger save_every_steps log_every_steps
        on_nan on_oom profile log_gradients plots report
        data.download data.cache data.cache_mb data.cache_dir data.shards_mb dist_timeout_s budget gate""",
    Effect.ENDING: """
        epochs max_time patience compression export""",
    Effect.ROUNDING: """
        threads device compile channels_last activation_checkpointing loader optimizer.fused""",
    Effect.TRAINING: """
        optimizer scheduler loss regularizer precision aug finetune resizing averaging distillation
        layer_decay stages clip_grad_norm clip_grad_value class_weights sync_batchnorm min_delta limit_eval_batches
        data.aug_overrides data.root data.val_root data.test_root""",
    Effect.IDENTITY: """
        task model pretrained head data img_size seed batch_size grad_accum_steps sampler limit_train_batches
        overfit_batch monitor mode aug.eval_resize
        optimizer._target_ finetune._target_ averaging._target_ distillation._target_""",
}
"""What another value of a key does, or of any key below it that is not named itself; `_target_` is a group's option.

A smaller number of epochs is refused. Data that moved is found again by its fingerprint.
"""

EFFECTS = {key: effect for effect, keys in CLASSES.items() for key in keys.split()}

LEVELS = ("bit-exact", "sample-exact", "approximate")
"""How a continuation compares with a run that was never interrupted, best first."""

SHOWN = 4
"""Changes that an error or a log line names before it counts the rest."""


@dataclass(frozen=True)
class Change:
    """One value that differs; None where it is absent."""

    key: str
    old: Any
    new: Any
    effect: Effect

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"

    def named_by(self, keys: Sequence[str]) -> bool:
        """Return whether the key, or a group it belongs to, is among `keys`."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def effect_of(key: str) -> Effect:
    """Return the class of a dotted key; a key that nobody has classified is never changed."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((EFFECTS[prefix] for prefix in prefixes if prefix in EFFECTS), Effect.IDENTITY)


def without_free(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values that are not free, by dotted key."""
    return {key: value for key, value in _leaves(config) if effect_of(key) >= Effect.TRAINING}


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return what differs between two resolved configs; another option of a group is one change."""
    asked = ("resume", "resume_allow")  # how to go on, not what to train
    return [change for change in _changes(_stored(old), _stored(new)) if change.key not in asked]


def blocking(changes: Sequence[Change], allowed: Sequence[str] = ()) -> list[Change]:
    """Return the changes that a run does not go on with."""
    return [c for c in changes if c.effect >= (Effect.IDENTITY if c.named_by(allowed) else Effect.TRAINING)]


def asks_for_more(changes: Sequence[Change]) -> bool:
    """Return whether a finished run would have something left to do."""
    return any(change.effect not in (Effect.NOTHING, Effect.ROUNDING) for change in changes)


def check(folder: object, old: dict[str, Any], new: dict[str, Any]) -> list[Change]:
    """Return what differs when the run in `folder` may go on with config `new`.

    Args:
        folder: For the message.
        old: Resolved config of the run.
        new: Resolved config of the command; its `resume_allow` counts.

    Raises:
        ConfigError: It may not; names every value and what to do.
    """
    changes = compare(old, new)
    refused = blocking(changes, new["resume_allow"])
    never = [c for c in refused if c.effect is Effect.IDENTITY]
    if never:
        raise ConfigError(
            f"{folder} cannot go on with this config: a run keeps some values from beginning to end.\n"
            f"{described(changes)}\n"
            f"Give {', '.join(c.key for c in never[:SHOWN])} as before, or start a new run with resume=none."
        )
    if refused:
        raise ConfigError(
            f"{folder} was started with another config, and would train otherwise from here on.\n"
            f"{described(changes)}\n"
            f"If that is meant, add {allowance(refused, new['resume_allow'])}; else give the same values, or use "
            "resume=none."
        )
    return changes


def check_names(config: dict[str, Any]) -> None:
    """See that `resume_allow` names keys.

    Raises:
        ConfigError: One is unknown.
    """
    keys = [key for key, _ in _leaves(config)]
    known = {".".join(key.split(".")[:length]) for key in keys for length in range(1, 1 + key.count(".") + 1)}
    for key in config["resume_allow"]:
        if key not in known:
            ends = [name for name in keys if name.endswith(f".{key}")]
            hint = f"did you mean {ends[0]!r}?" if ends else did_you_mean(str(key), sorted(known), "keys")
            raise ConfigError(f"resume_allow=[{key}] is no key of the config; {hint}")


def described(changes: Sequence[Change]) -> str:
    """Return `key: old -> new` of each change with its class, the gravest first, in one line."""
    ordered = sorted(changes, key=lambda change: -change.effect)
    shown = [f"{change} ({change.effect.word})" for change in ordered[:SHOWN]]
    return ", ".join(shown) + (f", and {len(ordered) - SHOWN} more" if len(ordered) > SHOWN else "")


def allowance(changes: Sequence[Change], given: Sequence[str] = ()) -> str:
    """Return the override `resume_allow=[…]` that allows `changes` besides `given`; one name for several of a group."""
    names: dict[str, None] = dict.fromkeys(str(key) for key in given)
    groups = [change.key.split(".")[0] for change in changes]
    for change, group in zip(changes, groups, strict=True):
        names[group if groups.count(group) > 1 else change.key] = None
    return f"resume_allow=[{','.join(names)}]"


def exactness(
    changes: Sequence[Change], before: Mapping[str, Any], now: Mapping[str, Any], exact_device: bool
) -> tuple[str, list[str]]:
    """Return the level of a continuation and what keeps it from a better one.

    Args:
        changes: Between the checkpoint's config and this one.
        before: What the checkpoint was computed with: versions, threads, hardware, number of processes.
        now: The same of this process.
        exact_device: Whether the device rounds alike in every run.

    Returns:
        One of `LEVELS`, and its reasons, such as "threads 1 then 2".
    """
    differs = {key: f"{key} {before.get(key)} then {now[key]}" for key in now if before.get(key) != now[key]}
    version = [differs.pop(key) for key in ("cvtrain",) if key in differs]
    approximate = [_then(change) for change in changes if change.effect >= Effect.TRAINING] + version
    if approximate:
        return "approximate", approximate
    named = [_then(c) for c in changes if c.effect is Effect.ROUNDING and c.key not in differs]
    reasons = [*differs.values(), *named]
    if not exact_device:
        reasons.append(f"{now.get('device')} rounds differently from run to run")
    return ("sample-exact", reasons) if reasons else ("bit-exact", [])


def worst(levels: Sequence[str]) -> str | None:
    """Return the worst of several levels, None of none."""
    return max(levels, key=LEVELS.index, default=None)


def _then(change: Change) -> str:
    return f"{change.key} {_shown(change.old)} then {_shown(change.new)}"


def _changes(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[Change]:
    for key in dict.fromkeys([*new, *old]):
        path, before, now = f"{prefix}{key}", old.get(key), new.get(key)
        if before == now:
            continue
        if isinstance(before, dict) and isinstance(now, dict) and before.get("_target_") == now.get("_target_"):
            yield from _changes(before, now, f"{path}.")
        else:
            yield Change(path, before, now, _effect(path, before, now))


def _effect(path: str, before: Any, now: Any) -> Effect:  # noqa: ANN401 - any plain value
    if path == "epochs" and before is not None and now < before:
        return Effect.IDENTITY
    return effect_of(f"{path}._target_" if isinstance(before or now, dict) else path)


def _stored(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config as it comes back from a JSON file."""
    value: dict[str, Any] = json.loads(to_json_line(config))
    return value


def _leaves(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:  # noqa: ANN401 - any plain value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, dict) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    return str(value).replace(" ", "") if isinstance(value, (list, dict)) else str(value)
