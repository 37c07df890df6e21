"""From config to objects: the only caller of `hydra.utils.instantiate`, and the only place that knows group keys."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from torch import Tensor, nn

from cvtrain.catalog import shipped_targets
from cvtrain.core import distributed
from cvtrain.core.compiler import spare
from cvtrain.core.stages import find_stages
from cvtrain.core.types import CropChooser, DataSets, Preprocess
from cvtrain.data.base import EncodedDataSet
from cvtrain.data.loader import Loader, LoaderConfig
from cvtrain.distillation import Teacher
from cvtrain.engine.parts import Distillation, Finetune, Task
from cvtrain.engine.run import TrainOptions
from cvtrain.errors import ConfigError, CvtrainError, RefusedError, did_you_mean
from cvtrain.finetune import Full, Strategy
from cvtrain.loss import class_weights
from cvtrain.model.folding import transfer
from cvtrain.model.head import put_mlp_head
from cvtrain.model.pretrained import Pretrained
from cvtrain.model.pretrained import resolve as resolve_pretrained
from cvtrain.model.size import sized
from cvtrain.optimizer import param_groups
from cvtrain.regularizer import Regularizer
from cvtrain.schema import METRICS, seconds

log = logging.getLogger("cvtrain")

CONTROL_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")


class Builder:
    """Builds the parts of a run.

    Args:
        config: Resolved, audited and validated.
        trusted: The user's own packages.
    """

    def __init__(self, config: dict[str, Any], trusted: Sequence[str]) -> None:
        self.config = config
        self.trusted = tuple(trusted)
        self.pretrained: Pretrained | None = None
        """The weights that the model begins with, known from `data` on."""

    def build(self, group: str, node: dict[str, Any] | None = None, **runtime: Any) -> Any:  # noqa: ANN401
        """Instantiate `config[group]`, or `node`.

        Args:
            group: Name for errors.
            node: A config node with `_target_`; None: the group's own.
            runtime: Values known only now; those that the target does not take are left out.

        Raises:
            ConfigError: A key that the target does not take, or one that is set by the run itself.
        """
        node = self.config[group] if node is None else node
        if "_target_" not in node:
            raise ConfigError(f"{group} has no _target_; choose an option: cvtrain list {group}")
        self._check_nested(group, node)
        target = resolve(node["_target_"], self.trusted)
        given = {key: value for key, value in node.items() if key not in CONTROL_KEYS}
        accepted = self._accepted(group, target, given, runtime)
        both = sorted(set(given) & set(accepted))
        for key in [key for key in both if given[key] is not None and (group, key) != ("model", "img_size")]:
            raise ConfigError(f"{group}.{key}={given[key]} is set by the run itself; remove it.")
        clean = {key: value for key, value in node.items() if key not in both}
        try:
            return instantiate(clean, **accepted, _convert_="all")
        except CvtrainError:
            raise
        except Exception as error:
            cause = error.__cause__ or error
            if isinstance(cause, CvtrainError):
                raise cause from error
            if isinstance(cause, (TypeError, ValueError, AssertionError, ImportError)):
                raise RefusedError(f"{group}: {node['_target_']} refuses its settings: {cause}") from error
            raise cause from error

    def build_each(self, group: str, **runtime: Any) -> dict[str, Any]:  # noqa: ANN401
        """Instantiate each option of a list-like group, in order, by name."""
        return {name: self.build(f"{group}.{name}", node, **runtime) for name, node in self.config[group].items()}

    def device(self) -> torch.device:
        """Return the device, the best one for `auto`.

        Raises:
            ConfigError: No such device here.
        """
        name = str(self.config["device"])
        if name == "auto":
            if torch.cuda.is_available():
                return torch.device("cuda", torch.cuda.current_device())
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            known = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            raise ConfigError(f"device={name} is not available here; {did_you_mean(name, known, 'devices')}") from error
        return device

    def data(self, begun: dict[str, Any] | None = None) -> tuple[DataSets, Any]:
        """Load the data set as the pretrained weights want it; return it with the object that loaded it.

        Args:
            begun: What a run that has a checkpoint recorded of its pretrained weights, which it needs no more.

        Raises:
            ConfigError: The weights and what the user set for the data contradict each other.
            WeightsError: The weights cannot be had.
        """
        given, model = self.config.get("pretrained"), self.config["model"]
        if given and model:  # without a model, as where only pictures are looked at, there is nothing to begin with
            self.pretrained = Pretrained(**begun) if begun else resolve_pretrained(given, model)
        weights = self.pretrained
        node = {key: value for key, value in self.config["data"].items() if key != "aug_overrides"}
        if weights is not None and "interpolation" in node:
            node["interpolation"] = weights.reading(node["interpolation"])
        source = self.build("data", node)
        img_size = self.asked_size()
        if img_size is None and isinstance(source, EncodedDataSet):  # arrays have a size of their own
            img_size = model.get("native_size")
        sets = source.load(img_size, self.config["aug"].get("eval_resize", 1.0), self.config["workers"])
        if weights is not None:
            asked = {key: node[key] for key in ("mean", "std") if node.get(key) and _is_override(f"data.{key}")}
            sets = dataclasses.replace(sets, preprocess=weights.preparing(sets.preprocess, asked))
        return sets, source

    def asked_size(self) -> int | None:
        """Return the side that the user asks for, else the pretrained weights, else the model; None: nobody does."""
        size: int | None = self.config["img_size"]
        if size is None and self.pretrained is not None:
            size = self.pretrained.img_size
        return self.config["model"].get("img_size") if size is None else size

    def loader(self, sets: DataSets, device: torch.device, crop: CropChooser | None = None) -> Loader:
        """Build the loader; `crop` is the augmentation's, to be taken while pictures are read."""
        config = self.config
        return Loader(
            sets,
            LoaderConfig(
                batch_size=config["batch_size"],
                seed=config["seed"],
                device=device,
                mode=config["loader"],
                sampler=config["sampler"],
                workers=config["workers"],
                rank=distributed.rank(),
                world_size=distributed.world_size(),
            ),
            crop,
        )

    def augmentation(self, preprocess: Preprocess) -> Any:  # noqa: ANN401 - aug.Augmentation or the user's own
        """Build the augmentation, changed where the data set's own defaults say so and told what it works on."""
        node = dict(self.config["aug"])
        sample = dict(node.get("sample") or {})
        for name, change in (self.config["data"].get("aug_overrides") or {}).items():
            if sample.get(name) is None:
                continue
            if change is None:
                del sample[name]
                what = f"no {name}, it would change what a picture is"
            elif "_target_" in change:
                sample[name] = change
                what = f"{change['_target_'].rpartition('.')[2]} in place of {name}"
            else:
                sample[name] = {**sample[name], **change}
                what = f"{name} with {', '.join(f'{key}={value}' for key, value in change.items())}"
            log.info("aug: %s, on this data set (data.aug_overrides={} keeps the preset as it is)", what)
        if "sample" in node:
            node["sample"] = sample
        augmentation = self.build("aug", node)
        augmentation.adapt(preprocess)
        return augmentation

    def model(self, sets: DataSets) -> nn.Module:
        """Build the network for the data's classes, channels and size, the same weights for the same seed."""
        torch.manual_seed(self.config["seed"])
        prepared = sets.preprocess
        head = self.config.get("head", "linear")
        model = build_model(self, self.model_node(), sets.num_classes, prepared.channels, prepared.img_size, head)
        if self.pretrained is not None and self.pretrained.state:
            transfer(model, self.pretrained, prepared.shape, sets.class_names)
        return model

    def model_node(self) -> dict[str, Any]:
        """Return the model's config node; with pretrained weights `small_stem=auto` means the stem that they have."""
        node: dict[str, Any] = self.config["model"]
        if self.pretrained is not None and node.get("small_stem") == "auto":
            return {**node, "small_stem": self.pretrained.small_stem}
        return node

    def task(self, sets: DataSets, regularizers: Sequence[Regularizer], device: torch.device) -> Task:
        """Build the task with its loss, weighted by class where `class_weights` asks for it.

        Raises:
            ConfigError: The task, the loss, `class_weights` and the data do not go together.
        """
        loss = self.build("loss")
        task: Task = self.build(
            "task",
            loss=loss,
            regularizers=list(regularizers),
            num_classes=sets.num_classes,
            class_weights=self._class_weights(sets, loss, device),
        )
        if sets.multilabel and not task.multilabel:
            raise ConfigError(f"data {sets.name} gives a picture several labels; use task=multilabel loss=bce.")
        if task.multilabel and not sets.multilabel:
            raise ConfigError(
                f"task=multilabel: data {sets.name} gives a picture one class; "
                "use task=classification loss=cross_entropy, or data=csv with data.label_separator."
            )
        return task

    def finetune(self, model: nn.Module, sets: DataSets) -> Strategy:
        """Divide the model into stages and build what says which of them train.

        Raises:
            ConfigError: The option does not fit the model's stages, the epochs or `layer_decay`.
        """
        node, decay = self.config["finetune"], self.config["layer_decay"]
        target = resolve(node["_target_"], self.trusted)
        if decay is not None and "layer_decay" not in inspect.signature(target).parameters:
            raise ConfigError(
                f"layer_decay={decay} does nothing with finetune._target_={node['_target_']}, which sets the rates "
                "itself; leave one of them out."
            )
        asked = decay is not None or isinstance(node.get("lr_scale"), dict) or self.config["stages"] is not None
        # Otherwise all parameters train alike, whatever they are part of.
        divided = target is not Full or asked
        stages = find_stages(model, sets.preprocess.shape, self.config["stages"]) if divided else []
        fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
        runtime = {"stages": stages, "fixed": fixed, "layer_decay": decay, "epochs": self.config["epochs"]}
        make = self.build("finetune", {**node, "_partial_": True})  # Hydra would make plain dictionaries of stages
        strategy = make(**self._accepted("finetune", target, {}, runtime))
        if not isinstance(strategy, Strategy):
            raise ConfigError(f"finetune._target_={node['_target_']} must derive from cvtrain.finetune.Strategy.")
        untrained = not self.config["pretrained"] and str(self.config["model"]["_target_"]).startswith("cvtrain.")
        if untrained and not all(strategy.phase(0).factors):
            names = [s.name for s, factor in zip(stages, strategy.phase(0).factors, strict=True) if not factor]
            log.warning(
                "finetune: what is frozen (%s) has weights that nobody has trained; set pretrained=", ", ".join(names)
            )
        return strategy

    def optimizer(self, model: nn.Module, finetune: Finetune | None = None) -> torch.optim.Optimizer:
        """Build the optimizer over the parts of `finetune`, with norms and biases spared from weight decay."""
        node = dict(self.config["optimizer"])
        groups = param_groups(model, float(node.get("weight_decay", 0.0)), (finetune or Full()).part_of)
        target = resolve(node["_target_"], self.trusted)
        kwargs = {key: value for key, value in node.items() if key not in CONTROL_KEYS}
        self._accepted("optimizer", target, kwargs, {})
        spare(torch.optim.Optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                optimizer: torch.optim.Optimizer = target(groups, **kwargs)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ConfigError(f"optimizer: {node['_target_']} refuses its settings: {error}") from error
        return optimizer

    def distillation(self, task: Task, teacher: Teacher | None) -> Distillation:
        """Build what a teacher adds to the objective; `distillation.teacher`, its place, has become `teacher`."""
        node = {key: value for key, value in self.config["distillation"].items() if key != "teacher"}
        runtime = {} if teacher is None else {"teacher": teacher, "multilabel": task.multilabel}
        distillation: Distillation = self.build("distillation", node, **runtime)
        return distillation

    def options(self, rank: int) -> TrainOptions:
        """Return the loop's plain settings."""
        config = self.config
        return TrainOptions(
            epochs=config["epochs"],
            seed=config["seed"],
            base_lr=float(config["optimizer"]["lr"]),
            grad_accum_steps=config["grad_accum_steps"],
            clip_grad_norm=config["clip_grad_norm"],
            clip_grad_value=config["clip_grad_value"],
            on_nan=config["on_nan"],
            on_oom=config["on_oom"],
            log_every_steps=config["log_every_steps"],
            channels_last=config["channels_last"],
            save_every_steps=config["save_every_steps"],
            limit_train_batches=config["limit_train_batches"],
            limit_eval_batches=config["limit_eval_batches"],
            max_seconds=seconds(str(config["max_time"])) if config["max_time"] else None,
            rank=rank,
        )

    def monitor_mode(self) -> str:
        """Return `max` or `min`."""
        mode = str(self.config["mode"])
        return METRICS[self.config["monitor"]] if mode == "auto" else mode

    def _class_weights(self, sets: DataSets, loss: Any, device: torch.device) -> Tensor | None:  # noqa: ANN401
        spec = self.config.get("class_weights", "none")
        weights = class_weights(spec, sets.train.labels, sets.class_names)
        if weights is None:
            return None
        task = resolve(self.config["task"]["_target_"], self.trusted)
        for group, called, name in (("task", task, "class_weights"), ("loss", loss, "weight")):
            if name not in inspect.signature(called).parameters:
                refusing = self.config[group]["_target_"]
                raise ConfigError(f"class_weights={spec}: {refusing} takes no {name}; use class_weights=none.")
        shown = weights[:, 1] if sets.multilabel else weights
        least, most = int(shown.argmin()), int(shown.argmax())
        log.info(
            "class_weights: from %.3g (%s) to %.3g (%s)",
            *(float(shown[least]), sets.class_names[least], float(shown[most]), sets.class_names[most]),
        )
        return weights.to(device)

    def _accepted(self, group: str, target: Any, given: dict[str, Any], runtime: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        parameters = inspect.signature(target).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            return runtime
        unknown = [key for key in given if key not in parameters]
        if unknown:
            raise ConfigError(
                f"unknown key {group}.{unknown[0]}={given[unknown[0]]}; {did_you_mean(unknown[0], parameters, 'keys')}"
            )
        return {key: value for key, value in runtime.items() if key in parameters}

    def _check_nested(self, path: str, node: Any) -> None:  # noqa: ANN401 - any plain value
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            if key == "_target_":
                resolve(str(value), self.trusted)
            self._check_nested(f"{path}.{key}", value)


def build_model(
    builder: Builder, node: dict[str, Any], num_classes: int, in_channels: int, img_size: int, head: str = "linear"
) -> nn.Module:
    """Build a network from its config node and the three values that the data decides, and see that it takes the size.

    Args:
        builder: Knows the user's own packages.
        node: With `_target_`. The sizes in it ask for what the run has granted by now.
        num_classes: K.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels.
        head: `linear` leaves the network's own last layer, `mlp` replaces it.

    Raises:
        ConfigError: The target does not return a `torch.nn.Module`, or takes larger pictures only.
    """
    node = {key: value for key, value in node.items() if key not in ("img_size", "native_size")}

    def make(side: int) -> nn.Module:
        model = builder.build("model", node, num_classes=num_classes, in_channels=in_channels, img_size=side)
        if not isinstance(model, nn.Module):
            kind = type(model).__name__
            raise ConfigError(f"model._target_={node['_target_']} returned {kind}, not a torch.nn.Module.")
        return model

    name = f"model.name={node['name']}" if "name" in node else f"model {str(node['_target_']).rpartition('.')[2]}"
    model = sized(make, in_channels, img_size, name)
    if head == "mlp":
        put_mlp_head(model, (in_channels, img_size, img_size))
    return model


def _is_override(key: str) -> bool:
    """Return whether the user set `key` on the command line, where a YAML of the data set may have it as well."""
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    return any(text.lstrip("+").startswith(f"{key}=") for text in given)


def lay_out(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move `model` to `device` in place, its 4-D weights in the memory format asked for, and return it."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    moved: nn.Module = model.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
    return moved


def resolve(target: str, trusted: Sequence[str]) -> Any:  # noqa: ANN401 - whatever the name stands for
    """Import what an allowed `_target_` names.

    The audit has passed the string; here the thing itself must come from where the string says, so that a trusted
    package does not lend its name to something it merely imported.

    Raises:
        ConfigError: Not allowed, not found, or from another package.
    """
    package = target.split(".")[0]
    if target not in shipped_targets() and package not in trusted:
        raise ConfigError(f"_target_={target} is refused; add trusted=[{package}] to the command line if it is yours.")
    parts = target.split(".")
    found: Any = None
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            found = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is not None and module_name.startswith(error.name):
                continue
            raise ConfigError(
                f"_target_={target}: importing {module_name} failed: {error}. Install what it needs."
            ) from error
        except Exception as error:
            if package not in trusted:
                raise
            raise ConfigError(
                f"_target_={target}: importing {module_name} failed: {type(error).__name__}: {error}"
            ) from error
        for name in parts[split:]:
            found = getattr(found, name, None)
        break
    if found is None or not callable(found):
        where = Path.cwd()
        raise ConfigError(
            f"_target_={target} was not found. Check the name, and that {package!r} is installed or lies in {where}."
        )
    origin = str(getattr(found, "__module__", "") or "")
    if package in trusted and origin.split(".")[0] != package:
        raise ConfigError(
            f"_target_={target} is refused: it comes from {origin or 'nowhere'}, not from the trusted {package!r}."
        )
    return found
