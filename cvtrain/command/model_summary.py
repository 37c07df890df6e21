"""`cvtrain inspect what=model`: networks on paper, and several of them on the clock."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from torch import Tensor, nn

from cvtrain import runs
from cvtrain.build import Builder, lay_out
from cvtrain.command.results import write_csv
from cvtrain.compose import Composer
from cvtrain.core.files import to_json_line
from cvtrain.core.recompute import checkpoint_activations
from cvtrain.core.stages import find_stages
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource
from cvtrain.errors import EXIT_OK, ConfigError
from cvtrain.evaluation import measure
from cvtrain.finetune import Strategy
from cvtrain.inspection.model_summary import Layer, Memory, Shape, Summary, in_stages, kept_bytes, trace
from cvtrain.model.pretrained import resolve as resolve_pretrained
from cvtrain.precision import Amp, native_dtype
from cvtrain.report import models as shown
from cvtrain.report.console import attach_log, human_bytes, make_console
from cvtrain.runtime.session import clocked

log = logging.getLogger("cvtrain")

LARGER_BATCH = 16
"""Pictures in the second batch whose latency is measured."""
TIMED_S = 20.0
"""About how long measuring one batch size may take; slow networks still get a few runs."""
RUNS = 60


@dataclass(frozen=True)
class Inspected:
    """A network that was built and followed.

    Attributes:
        model: Its weights lie on the CPU.
        classes: Outputs.
        summary: What is known of it on paper.
    """

    model: nn.Module
    classes: int
    summary: Summary


def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Show the model of the run of the same command, or `config["models"]` side by side; return 0.

    Raises:
        ConfigError: An unknown model, or one that does not take pictures of this size.
        DataError: The data set, asked for what was not given, cannot be read.
    """
    console = make_console(bool(config["json"]))
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    choice = str(HydraConfig.get().runtime.choices["model"])
    variants = _composed(config["models"], trusted) if config["models"] else [(choice, config)]
    found = [_inspect(name, Builder(variant, trusted)) for name, variant in variants]
    several = bool(config["models"])
    folder = runs.create_folder(Path(str(config["output_dir"])) / f"inspect_{'models' if several else choice}")
    told: dict[str, Any] = {"run": str(folder), "exit_code": EXIT_OK}
    if several:
        device, threads = Builder(config, trusted).device(), torch.get_num_threads()
        timed = f"on {device}, {threads} CPU thread{'s' * (threads > 1)}, float32, measured in turn"
        rows = [_model_row(one) for one in found]
        for batch in (1, LARGER_BATCH):
            log.info("latency: %d models in turn, batches of %d", len(found), batch)
            latencies = measure(
                [_OnDevice(one, device, config["channels_last"]) for one in found], batch, RUNS, TIMED_S / len(found)
            )
            for row, latency in zip(rows, latencies, strict=True):
                times = latency.milliseconds
                row |= {f"batch_{batch}_ms_p{p}": float(np.percentile(times, p)) for p in (5, 50, 95)}
        write_csv(folder / "models.csv", rows)
        shown.draw_comparison(rows, timed, folder / "models.png")
        console.print(shown.comparison_table(rows, timed))
        told |= {"files": ["models.csv", "models.png"], "threads": threads, "device": str(device)}
        told["models"] = [{**row, **_figures(one)} for one, row in zip(found, rows, strict=True)]
    else:
        summary = found[0].summary
        write_csv(folder / "model.csv", [_layer_row(layer) for layer in summary.layers])
        shown.draw_layers(summary, folder / "model.png")
        console.print(shown.layer_table(summary))
        _tell_memory(summary.memory)
        told |= {"files": ["model.csv", "model.png"], **_figures(found[0])}
    sys.stdout.write((to_json_line(told) if config["json"] else "\n".join([*told["files"], str(folder)])) + "\n")
    return EXIT_OK


def _composed(names: Sequence[str], trusted: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return each option's name and the config of this same command with `model=` that option."""
    hydra = HydraConfig.get()
    given = [text for text in hydra.overrides.task if text.partition("=")[0] not in ("model", "models")]
    if len(given) < len(hydra.overrides.task) - 1:
        raise ConfigError(f"model= and models=[{','.join(names)}] contradict each other; leave one of them out.")
    folders = [source.path for source in hydra.runtime.config_sources if source.provider == "command-line"]
    composer = Composer("inspect", folders[0] if folders else None)
    return [(name, composer.check([*given, f"model={name}"], trusted)[1]) for name in names]


def _inspect(name: str, builder: Builder) -> Inspected:
    sets = _sets(builder)
    config, shape = builder.config, sets.preprocess.shape
    model = builder.model(sets)
    finetune = builder.finetune(model, sets)
    finetune.apply(model, 0)
    if config["activation_checkpointing"]:
        checkpoint_activations(model, shape, config["stages"])
    layers = trace(model, shape)
    with suppress(ConfigError):  # a network that cannot be divided
        layers = in_stages(layers, finetune.stages or find_stages(model, shape, config["stages"]))
    variant = config["model"].get("name")
    title = f"{name} {variant}" if variant not in (None, name) else name
    return Inspected(model, sets.num_classes, Summary(title, shape, layers, _memory(builder, model, finetune, shape)))


def _sets(builder: Builder) -> DataSets:
    """Return what the model is to be built for: as given, and what is not given as the data set has it."""
    config = builder.config
    classes, channels = config["num_classes"], config["in_channels"]
    if config["pretrained"] and None not in (classes, channels):  # else loading the data does it
        builder.pretrained = resolve_pretrained(config["pretrained"], config["model"])
    size = builder.asked_size()
    if size is None or None in (classes, channels):
        sets, _ = builder.data()
        log.info("inspect: classes, channels and size that are not given are those of data %s", sets.name)
        size = sets.preprocess.img_size
        classes, channels = classes or sets.num_classes, channels or sets.preprocess.channels
        names = sets.class_names
    else:
        names = []
    if len(names) != classes:
        names = [str(i) for i in range(classes)]
    half = (0.5,) * channels
    nothing = ArraySource(torch.zeros(0, channels, size, size, dtype=torch.uint8), np.zeros(0, dtype=np.int64), [])
    return DataSets("nothing", names, Preprocess(size, size, channels, half, half), nothing, nothing, nothing)


def _memory(builder: Builder, model: nn.Module, finetune: Strategy, shape: Shape) -> Memory:
    """Return what the first step of a run takes, with what the run freezes frozen."""
    batch = builder.config["batch_size"]
    precision = builder.build("precision")
    lower = native_dtype(builder.device())[0] if isinstance(precision, Amp) else precision.dtype
    trains = [p for p in model.parameters() if p.requires_grad]
    states = _states(builder, {p.ndim for p in trains})
    return Memory(
        batch_size=batch,
        weights=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        gradients=sum(p.numel() * p.element_size() for p in trains),
        optimizer=sum(p.numel() * p.element_size() * states[p.ndim] for p in trains),
        activations=kept_bytes(model, shape, batch, lower, lambda trained: finetune.train(trained, 0)),
    )


def _states(builder: Builder, ranks: set[int]) -> dict[int, int]:
    """Return how many numbers the optimizer keeps for each weight, by rank, as a step on small weights shows."""
    if not ranks:
        return {}
    small = {rank: nn.Parameter(torch.ones((2,) * rank)) for rank in ranks}
    optimizer = builder.optimizer(nn.ParameterDict({f"weight{rank}": weight for rank, weight in small.items()}))
    for weight in small.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = {rank: [v.shape for v in optimizer.state[p].values() if isinstance(v, Tensor)] for rank, p in small.items()}
    return {rank: kept[rank].count(weight.shape) for rank, weight in small.items()}


def _tell_memory(memory: Memory) -> None:
    log.info(
        "memory of a training step with batch_size=%d: weights %s + gradients %s + optimizer %s + activations kept for "
        "the backward pass %s = %s, and what operations take for a moment",
        memory.batch_size,
        *(human_bytes(size) for size in (memory.weights, memory.gradients, memory.optimizer, memory.activations)),
        human_bytes(memory.total),
    )


def _layer_row(layer: Layer) -> dict[str, object]:
    size = layer.field.size if layer.field else None
    return {
        "stage": layer.stage,
        "layer": layer.path,
        "kind": layer.kind,
        "output": "×".join(map(str, layer.shape)),
        "params": layer.params,
        "trainable": layer.params - layer.frozen,
        "macs": layer.macs,
        "activation_bytes": layer.activation_bytes,
        "receptive_field": shown.pixels(size),
        "stride": shown.stride(layer.stride),
    }


def _figures(inspected: Inspected) -> dict[str, Any]:
    """Return a network's figures as the last line has them."""
    summary = inspected.summary
    memory, maps, seen = summary.memory, summary.maps, shown.pixels(summary.receptive_field)
    return {
        "model": summary.name,
        "input": list(summary.input),
        "num_classes": inspected.classes,
        "layers": len(summary.layers),
        "params": summary.params,
        "trainable": summary.trainable,
        "macs": summary.macs,
        "activation_bytes": summary.activation_bytes,
        "receptive_field": int(seen) if seen.isdigit() else seen,
        "stride": shown.stride(maps[-1].stride if maps else None),
        "memory": {
            name: getattr(memory, name)
            for name in ("batch_size", "weights", "gradients", "optimizer", "activations", "total")
        },
    }


def _model_row(inspected: Inspected) -> dict[str, Any]:
    summary = inspected.summary
    return {
        "model": summary.name,
        "input": "×".join(map(str, summary.input)),
        "params": summary.params,
        "trainable": summary.trainable,
        "macs": summary.macs,
        "weights_bytes": summary.memory.weights,
        "activation_bytes": summary.activation_bytes,
        "batch_size": summary.memory.batch_size,
        "memory_bytes": summary.memory.total,
        "receptive_field": shown.pixels(summary.receptive_field),
    }


class _OnDevice:
    """A network and pictures for it, to be measured with others."""

    def __init__(self, inspected: Inspected, device: torch.device, channels_last: bool) -> None:
        self._model = lay_out(inspected.model, device, channels_last).eval()
        self._shape, self._device = inspected.summary.input, device
        self._format = torch.channels_last if channels_last else torch.contiguous_format

    def time(self, batch: int, runs: int) -> list[float]:
        """Return the milliseconds of `runs` calls on `batch` pictures."""
        images = torch.zeros(batch, *self._shape, device=self._device).contiguous(memory_format=self._format)
        with torch.inference_mode():
            return clocked(lambda: self._model(images).cpu(), runs)  # waits for a GPU
