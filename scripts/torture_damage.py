"""Spoilt checkpoints: each field changed under a valid hash, single bits flipped, files cut short and swapped."""

from __future__ import annotations

import copy
import json
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torture_lives import BEST, LAST, PREVIOUS, Command, begin, compare, copied, ended, finish, read, tail

from cvtrain.build import Builder
from cvtrain.command.train import build_run
from cvtrain.core.files import sha256
from cvtrain.core.weights import to_bytes
from cvtrain.engine.checkpoint import CheckpointStore
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import CvtrainError
from cvtrain.resume import Effect, effect_of

RICH = (
    "averaging=ema", "scheduler=plateau", "scheduler.plateau_epochs=1", "min_delta=5", "optimizer=adamw",
    "optimizer.lr=0.002", "grad_accum_steps=3", "save_every_steps=1", "log_every_steps=2", "logger=tensorboard",
    "max_time=1h", "aug=weak", "patience=9", "limit_train_batches=7", "batch_size=16",
)  # fmt: skip
"""A run in which every field of a checkpoint has an effect."""
SAVES = 5
"""Saves before the stop: in the second epoch of three steps, behind a log, with a best epoch before it."""

Mutation = tuple[str, dict[str, torch.Tensor], dict[str, Any]]


def stop_after(saves: int) -> None:
    """Arrange for this process to end, without a word, behind its `saves`-th save."""
    original = CheckpointStore.save
    left = [saves]

    def save(store: CheckpointStore, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        original(store, *args, **kwargs)
        left[0] -= 1
        if left[0] == 0:
            store.wait()
            os._exit(77)

    CheckpointStore.save = save  # type: ignore[method-assign]


def leaves(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:  # noqa: ANN401 - JSON
    """Yield the path of every value that is no container."""
    if isinstance(node, (dict, list)):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield from leaves(value, (*path, key))
    else:
        yield path


def other(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Return another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value + 1e7
    return f"{value}x" if isinstance(value, str) else 1


def mutants(tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> Iterator[Mutation]:
    """Yield the checkpoint with one field changed, and the field's name: the list is the checkpoint's own."""
    for path in leaves(document):
        if path[0] == "config" and effect_of(".".join(map(str, path[1:]))) < Effect.ROUNDING:
            continue  # written down for people: no number depends on it
        spoilt = copy.deepcopy(document)
        node: Any = spoilt
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = other(node[path[-1]])
        yield ".".join(map(str, path)), tensors, spoilt
    for name, value in tensors.items():
        averaged = name.removeprefix("average/")
        if averaged != name and f"model/{averaged}" in tensors and f"optimizer/{averaged}/exp_avg" not in tensors:
            continue  # batch norm's statistics, measured anew before they are used
        flat = value.clone().reshape(-1)
        where = int(flat.abs().argmax())
        flat[where] = flat[where] + 1 if not flat.is_floating_point() else flat[where] * 1.25 + (flat[where] == 0)
        yield name, {**tensors, name: flat.reshape(value.shape)}, document


def write_alone(folder: Path, tensors: dict[str, torch.Tensor], document: dict[str, Any]) -> None:
    """Make this the only checkpoint of the folder, with a true hash."""
    weights = folder / "weights"
    for name in (LAST, PREVIOUS):
        (weights / name).unlink(missing_ok=True)
    (weights / LAST).write_bytes(to_bytes(tensors, {"cvtrain": json.dumps(document)}))
    manifest = json.loads((weights / "manifest.json").read_text())
    manifest["files"][LAST] = [sha256(weights / LAST)]
    (weights / "manifest.json").write_text(json.dumps(manifest))


def told(folder: Path, skip: int) -> list[str]:
    """Return what the lives after the first `skip` lines of the log said about resuming."""
    return [line for line in tail(folder, 10**6).splitlines()[skip:] if "resume" in line]


def mutations(place: Path, share: float, seed: int, rows: list[dict[str, object]]) -> bool:
    """Change each field of a checkpoint, or a share of them; say which changes the finished run does not show."""
    place.mkdir()
    started, command = time.monotonic(), Command.parse(RICH)
    if finish(command, place / "whole") != 0 or ended(begin(command, place / "half", lambda: stop_after(SAVES))) != 77:
        print(f"WRONG: the run to spoil did not work: {tail(place / 'whole')} {tail(place / 'half')}")
        return False
    tensors, document = read(place / "half" / "weights" / LAST)
    plain = resumed(command, place, "plain", tensors, document)
    same = compare(place / "whole", place / "plain").what
    if plain[0] != 0 or same:  # else every mutation would seem to be noticed
        print(f"WRONG: the unchanged checkpoint ends with {plain[0]} and differs in {same}")
        return False
    kinds: dict[str, list[str]] = {"differs": [], "refused": [], "told": [], "unnoticed": []}
    chance = random.Random(f"{seed}/fields")
    for name, spoilt_tensors, spoilt_document in mutants(tensors, document):
        if chance.random() >= share:
            continue
        code, lines = resumed(command, place, "spoilt", spoilt_tensors, spoilt_document)
        if code != 0:
            kind = "unnoticed" if code in (None, 1) else "refused"
        elif compare(place / "whole", place / "spoilt").what:
            kind = "differs"
        else:
            kind = "told" if lines != plain[1] else "unnoticed"
        kinds[kind].append(name if kind != "unnoticed" else f"{name} (exit {code})")
        print(f"  {kind}: {kinds[kind][-1]}", flush=True)
    rows += [{"case": "mutations", "variant": k, "value": len(v), "unit": "fields"} for k, v in kinds.items()]
    shown = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
    print(
        f"{sum(map(len, kinds.values()))} fields of a checkpoint changed: {shown} {kinds['unnoticed']}; "
        f"{time.monotonic() - started:.0f} s"
    )
    return not kinds["unnoticed"]


def resumed(
    command: Command, place: Path, name: str, tensors: dict[str, torch.Tensor], document: dict[str, Any]
) -> tuple[int | None, list[str]]:
    """Go on from a checkpoint in a copy of the half run; return exit code and what was said."""
    folder = copied(place / "half", place / name)
    folder.with_suffix(".log").unlink(missing_ok=True)
    write_alone(folder, tensors, document)
    code = finish(command, folder)
    return code, [line.replace(str(folder), "") for line in told(folder, 0)]


def flips(place: Path, count: int, seed: int, rows: list[dict[str, object]]) -> bool:
    """Damage `last` in many ways; each time a resume must notice, and take the one before."""
    place.mkdir()
    command, started = Command.parse(RICH), time.monotonic()
    if ended(begin(command, place / "half", lambda: stop_after(SAVES))) != 77:
        print(f"WRONG: the run to damage did not work: {tail(place / 'half')}")
        return False
    logging.disable(logging.WARNING)
    weights, chance = place / "half" / "weights", random.Random(f"{seed}/flips")
    content = (weights / LAST).read_bytes()
    damages: list[tuple[str, Callable[[], bytes]]] = [
        ("flip", lambda: flipped(content, chance.randrange(8 * len(content)))) for _ in range(count)
    ]
    damages += [("cut", lambda: content[: chance.randrange(len(content))]) for _ in range(20)]
    damages += [("swap", (weights / BEST).read_bytes), ("zeros", lambda: bytes(len(content)))]
    damages += [("longer", lambda: content + b"\0"), ("empty", lambda: b"")]
    noticed = fell_back = 0
    builder = Builder(command.config, [])
    sets, _ = builder.data()
    run = build_run(builder, sets, torch.device("cpu"), place / "half", StopRequest())
    for _, damage in damages:
        (weights / LAST).unlink()
        (weights / LAST).write_bytes(damage())
        store = CheckpointStore(weights, run.checkpoints.fixed)
        try:
            store.read(LAST)
        except CvtrainError:
            noticed += 1
        fell_back += store.restore(run) == PREVIOUS
    rows += [
        {"case": "damage", "variant": name, "value": value, "unit": "files"}
        for name, value in (("damaged", len(damages)), ("noticed", noticed), ("fell back", fell_back))
    ]
    logging.disable(logging.NOTSET)
    print(
        f"{len(damages)} damaged checkpoints ({count} single bits, 20 cut short, 4 more): {noticed} noticed, "
        f"{fell_back} fell back to the one before; {time.monotonic() - started:.0f} s"
    )
    return noticed == fell_back == len(damages)


def flipped(content: bytes, bit: int) -> bytes:
    """Return `content` with one bit changed."""
    damaged = bytearray(content)
    damaged[bit // 8] ^= 1 << (bit % 8)
    return bytes(damaged)
