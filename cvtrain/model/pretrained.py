"""Trained weights to start from: a library's by name, a local file's, or another run's."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import logging
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cvtrain import runs
from cvtrain.core.files import sha256
from cvtrain.core.quiet import quiet
from cvtrain.core.types import Preprocess
from cvtrain.core.weights import parse_metadata, parse_preprocess, pickle_globals, pieces, read
from cvtrain.errors import ConfigError, Interrupted, WeightsError, did_you_mean
from cvtrain.model.fitting import SMALL_PICTURE
from cvtrain.model.folding import fold_statistics
from cvtrain.model.timm_model import import_timm

log = logging.getLogger("cvtrain")

TIMEOUT = 30.0
"""Seconds without an answer or a byte from a server."""
FILES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "network")
"""Keys under which other tools keep the weights in a checkpoint, in the order in which they are looked for."""
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Pretrained:
    """Weights, and how the pictures that they were trained on were prepared.

    Attributes:
        source: Where they come from, for people.
        sha256: Of the file; of the tensors where a library keeps the file.
        mean: Mean a channel, of values in 0..1; None: nobody knows.
        std: Standard deviation a channel; None likewise.
        img_size: Side of the pictures in pixels; None likewise.
        interpolation: How they were resized; None likewise.
        stated: Whether the weights say so themselves; else it is only what the architecture's own weights have.
        small_stem: Whether they were trained with the stem for small pictures.
        class_names: The classes of the classifier, where the file tells them.
        state: Tensors by name, on the CPU; empty where a checkpoint holds what has become of them.
    """

    source: str
    sha256: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int | None = None
    interpolation: str | None = None
    stated: bool = True
    small_stem: bool = False
    class_names: list[str] | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def record(self) -> dict[str, Any]:
        """Return all but the tensors as plain JSON, which `Pretrained(**record)` reads back."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "state"}

    def reading(self, asked: str | None) -> str | None:
        """Return how pictures are to be resized; None leaves it to the data.

        Args:
            asked: `data.interpolation`.

        Raises:
            ConfigError: The weights state another one.
        """
        if asked is not None and self.stated and self.interpolation not in (None, asked):
            raise _contradiction("interpolation", asked, self.source, self.interpolation)
        return asked or self.interpolation

    def preparing(self, preprocess: Preprocess, asked: Mapping[str, Sequence[float]]) -> Preprocess:
        """Return the data's preprocessing with the normalisation of the weights, and log it.

        Args:
            preprocess: The data's.
            asked: `mean` and `std`, where the user set them.

        Raises:
            ConfigError: The weights state others.
        """
        if self.mean is None or self.std is None:
            if not asked:
                log.warning(
                    "pretrained: %s does not say how its pictures were normalised; the data's mean %s and std %s are "
                    "used. If it was trained otherwise, give data.mean=[…] data.std=[…]",
                    *(self.source, _shown(preprocess.mean), _shown(preprocess.std)),
                )
            return preprocess
        chosen: dict[str, Any] = {}
        for key, values in (("mean", self.mean), ("std", self.std)):
            folded = fold_statistics(values, preprocess.channels)
            given = asked.get(key)
            if given is not None and self.stated and tuple(map(float, given)) != folded:
                raise _contradiction(key, list(given), self.source, _shown(folded))
            chosen[key] = folded if given is None else tuple(map(float, given))
        found = dataclasses.replace(preprocess, **chosen)
        if not self.stated and len(asked) < len(chosen):
            log.warning(
                "pretrained: %s does not say how its pictures were prepared; taken is what this architecture's "
                "published weights have; data.mean=[…] data.std=[…] data.interpolation=… say it better",
                self.source,
            )
        folded_from = "" if len(self.mean) == found.channels else f" (of {len(self.mean)} channels)"
        log.info(
            "pretrained: mean %s, std %s of the weights%s, not the data's; pictures %s, %d px; trained with %s, %s px",
            *(_shown(found.mean), _shown(found.std), folded_from, found.interpolation, found.img_size),
            *(self.interpolation, self.img_size),
        )
        return found


def resolve(given: str | bool, model: Mapping[str, Any]) -> Pretrained:
    """Find and read trained weights; only a library's name asks the network.

    Args:
        given: A file (`.safetensors`; `.pt` and its like, read without running what a pickle may hold), the folder of
            a finished run, a name that torchvision or timm has for the model's weights, or true for their best.
        model: The config node of the model.

    Raises:
        ConfigError: No such name, or a model without published weights.
        WeightsError: Missing, damaged, refused, or not to be had without a network.
    """
    if isinstance(given, str) and (Path(given).exists() or "/" in given or given.endswith(FILES)):
        found = _from_file(given, model)
    else:
        library = _library(model)
        if library is None:
            what = ": no such file or folder" if isinstance(given, str) else ""
            raise ConfigError(
                f"pretrained={_word(given)}{what}; this model is neither torchvision's nor timm's, so no weights have "
                "names. Give a file or the folder of a run."
            )
        found = library(None if given is True else str(given), str(model["name"]))
    log.info("pretrained: %s, SHA-256 %s, %d tensors", found.source, found.sha256, len(found.state))
    return found


def _library(model: Mapping[str, Any]) -> Callable[[str | None, str], Pretrained] | None:
    libraries = {"cvtrain.model.torchvision_model": _from_torchvision, "cvtrain.model.timm_model": _from_timm}
    return libraries.get(str(model.get("_target_")))


def _from_torchvision(tag: str | None, name: str) -> Pretrained:
    entry = _torchvision_entry(tag, name)
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name
    state = _fetched(lambda: entry.get_state_dict(progress=False, check_hash=True, weights_only=True), tag, f"{cache}")
    described = _described_by_torchvision(entry, name)
    return Pretrained(f"torchvision {name} {entry.name}", _digest(state), **described, state=state)


def _torchvision_entry(tag: str | None, name: str) -> Any:  # noqa: ANN401 - a member of one of torchvision's enums
    from torchvision import models  # two seconds that other runs need not wait for

    names = models.list_models(module=models)
    entries = models.get_model_weights(name).__members__ if name in names else {}
    if not entries:
        raise ConfigError(
            f"pretrained={_word(tag)}: torchvision has no weights for model.name={name}; "
            f"{did_you_mean(name, names, 'some names')}. A file goes, too."
        )
    if tag is not None and tag not in entries:
        raise ConfigError(
            f"pretrained={tag} is neither a file nor weights of torchvision's {name}; "
            f"{did_you_mean(tag, entries, 'its weights')}"
        )
    return entries[tag or "DEFAULT"]


def _described_by_torchvision(entry: Any, name: str) -> dict[str, Any]:  # noqa: ANN401 - as `_torchvision_entry`
    preset = entry.transforms()
    # Both come from TensorFlow; torchvision's own constructors turn ImageNet's normalisation into this one.
    is_tensorflow = name in ("googlenet", "inception_v3")
    return {
        "mean": HALF if is_tensorflow else tuple(preset.mean),
        "std": HALF if is_tensorflow else tuple(preset.std),
        "img_size": int(preset.crop_size[0]),
        "interpolation": str(preset.interpolation.value),
    }


def _from_timm(tag: str | None, name: str) -> Pretrained:
    timm, full = import_timm(name), _timm_name(tag, name)
    from huggingface_hub.constants import HF_HUB_CACHE

    # The library's own loading turns other tools' formats into its own.
    model = _fetched(lambda: _from_hub(lambda: timm.create_model(full, pretrained=True)), tag, HF_HUB_CACHE)
    state = model.state_dict()
    return Pretrained(f"timm {full}", _digest(state), **_described_by_timm(full), state=state)


def _timm_name(tag: str | None, name: str) -> str:
    """Return `ARCHITECTURE.TAG` of weights that timm has."""
    timm = import_timm(name)
    architecture, _, own = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    if not tags:
        raise ConfigError(
            f"pretrained={_word(tag)}: timm has no weights for model.name={name}; "
            f"{did_you_mean(architecture, timm.list_models(), 'some names')}. A file goes, too."
        )
    wanted = tag or own or str(timm.get_pretrained_cfg(architecture).tag)
    if wanted not in tags:
        raise ConfigError(
            f"pretrained={wanted} is neither a file nor weights of timm's {architecture}; "
            f"{did_you_mean(wanted, tags, 'its weights')}"
        )
    return f"{architecture}.{wanted}"


def _described_by_timm(full: str) -> dict[str, Any]:
    config = import_timm(full).get_pretrained_cfg(full)
    return {
        "mean": tuple(config.mean),
        "std": tuple(config.std),
        "img_size": int(config.input_size[-1]),
        "interpolation": str(config.interpolation),
    }


def _usual(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return how the libraries' own weights for this architecture were prepared; empty where there are none."""
    library, name = _library(model), str(model.get("name"))
    try:
        if library is _from_torchvision:
            return _described_by_torchvision(_torchvision_entry(None, name), name)
        if library is _from_timm:
            return _described_by_timm(_timm_name(None, name))
    except ConfigError:
        log.debug("no weights of %s are published", name)
    return {}


def _from_file(given: str, model: Mapping[str, Any]) -> Pretrained:
    path = Path(given)
    if path.is_dir():
        path, _ = runs.shipped_weights(path, "pretrained")
    if not path.is_file():
        raise WeightsError(
            f"pretrained={given} does not exist; give a .safetensors or .pt file, or the folder that a run printed."
        )
    state, metadata = read(path) if path.suffix == ".safetensors" else (_unpickled(path), {})
    if "cvtrain" in metadata:
        raise WeightsError(f"pretrained={given} is a checkpoint; give the run's folder, or weights/model.safetensors.")
    digest = sha256(path)
    if "preprocess" not in metadata:
        return Pretrained(str(path), digest, **_usual(model), stated=False, state=state)
    prepared = parse_preprocess(metadata, path)
    names, node = (parse_metadata(metadata, key) if key in metadata else None for key in ("class_names", "model"))
    stem = node.get("small_stem", False) if isinstance(node, dict) else False
    return Pretrained(
        source=str(path),
        sha256=digest,
        mean=prepared.mean,
        std=prepared.std,
        img_size=prepared.img_size,
        interpolation=prepared.interpolation,
        small_stem=prepared.img_size <= SMALL_PICTURE if stem == "auto" else bool(stem),
        class_names=[str(name) for name in names] if isinstance(names, list) else None,
        state=state,
    )


def _unpickled(path: Path) -> dict[str, Tensor]:
    """Return the weights in a file of `torch.save`, wherever another tool's checkpoint keeps them.

    Raises:
        WeightsError: It is damaged, asks for more than tensors, or holds no weights.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Interrupted:
        raise
    except Exception as error:  # whatever torch raises for a file that is something else
        usual = ("torch.", "collections.OrderedDict")
        asked = [name for name in pickle_globals(path) or [] if not name.startswith(usual)]
        why = f"it asks for {', '.join(asked[:5])}" if asked else (str(error) or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"pretrained: {path} cannot be read as plain tensors: {why}.\n"
            "Save only those: torch.save(model.state_dict(), FILE)."
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {str(name): tensor for name, tensor in tensors if isinstance(tensor, Tensor)}
    if not state:
        held = f"the keys {', '.join(map(str, list(content)[:8]))}" if isinstance(content, Mapping) else "no mapping"
        raise WeightsError(f"pretrained: {path} holds no weights, but {held}. Save model.state_dict().")
    return state


def _fetched(load: Callable[[], Any], tag: str | None, cache: str) -> Any:  # noqa: ANN401 - what `load` returns
    """Return what `load` takes from the library's cache, or from the network where it is not there."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        with quiet():
            return load()
    except Interrupted:
        raise
    except Exception as error:  # what the libraries' many ways of asking raise
        if isinstance(error, OSError) and error.errno in FULL_DISK:
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsError(
            f"pretrained={_word(tag)}: not in {cache}, and no answer from the network ({reason}). Without one, "
            "put the weights there or give a local file: pretrained=FILE.safetensors."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _from_hub(load: Callable[[], Any]) -> Any:  # noqa: ANN401 - what `load` returns
    """Return what `load` takes from the cache of the Hugging Face hub, else from the hub, if that answers at all."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        return load()
    except Exception as error:
        if before or isinstance(error, Interrupted):
            raise
        log.debug("not in the cache: %s", error)
    finally:
        constants.HF_HUB_OFFLINE = before
    # The library itself would try again for a minute.
    with contextlib.suppress(urllib.error.HTTPError):  # which is an answer
        urllib.request.urlopen(constants.ENDPOINT, timeout=TIMEOUT).close()
    return load()


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for piece in pieces(dict(state), {}):
        digest.update(piece)
    return digest.hexdigest()


def _contradiction(key: str, asked: object, source: str, stated: object) -> ConfigError:
    return ConfigError(
        f"data.{key}={asked} contradicts pretrained: {source} was trained with {stated}.\n"
        f"Leave data.{key} out; the weights' own is taken."
    )


def _word(given: str | bool | None) -> str:
    return given if isinstance(given, str) else "true"


def _shown(values: Sequence[float]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
