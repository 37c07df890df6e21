"""What every key of a config may hold, and which values contradict each other; torch-free.

The YAML files hold names and defaults; this file holds types and ranges, by the key's own name, since a name means
the same wherever it stands. All errors of a config are reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cvtrain.errors import ConfigError, did_you_mean

METRICS = {
    "val/acc": "max",
    "val/balanced_acc": "max",
    "val/f1": "max",
    "val/f1_micro": "max",
    "val/hamming": "min",
    "val/loss": "min",
    "val/map": "max",
    "val/top5": "max",
    "train/acc": "max",
    "train/grad_norm": "min",
    "train/task": "min",
    "train/distillation": "min",
    "train/loss": "min",
}
"""Metrics that can be monitored, and whether more or less is better."""

ONE_CLASS = {
    "cvtrain.loss.CrossEntropy": ("cross_entropy", "bce"),
    "cvtrain.loss.Focal": ("focal", "focal_bce"),
}
"""Losses of one class a picture: their option, and the one for several labels."""

ANY_LABELS = {
    "cvtrain.loss.BinaryCrossEntropy": ("bce", "cross_entropy"),
    "cvtrain.loss.FocalBinaryCrossEntropy": ("focal_bce", "focal"),
}
"""Losses of any number of labels a picture: their option, and the one for one class."""

REMOVABLE = ("data.aug_overrides.", "aug.sample.", "aug.batch.", "resizing.phases.", "finetune.phases.")
"""Where null leaves a whole entry out."""

BY_NAME = ("class_weights", "lr_scale")
"""Keys that may hold a number above 0 for each of several names."""

DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")


@dataclass(frozen=True)
class Rule:
    """What one key may hold.

    Attributes:
        kind: `int`, `float`, `bool`, `str`, `list` (of `item`).
        low: Smallest value; `above` excludes it.
        high: Largest value; `below` excludes it.
        above: Whether `low` itself is excluded.
        below: Whether `high` itself is excluded.
        choices: The only values allowed.
        optional: Whether null is allowed.
        item: Rule of a list's items.
        length: How many items a list has; None: one or more, or any number for a list of text.
        also: Values allowed besides, such as `auto`.
        several: Whether a list of one or more such values is allowed too.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    choices: Sequence[str] | None = None
    optional: bool = False
    item: Rule | None = None
    length: int | None = None
    also: Sequence[Any] = ()
    several: bool = False

    def expected(self) -> str:
        """Return in words what is allowed."""
        words = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "str": "text",
            "list": "a list",
        }[self.kind]
        if self.choices is not None:
            words = "one of " + ", ".join(self.choices)
        if self.low is not None:
            words += f" {'above' if self.above else 'of at least'} {self.low:g}"
        if self.high is not None:
            words += f"{' and' if self.low is not None else ''} {'below' if self.below else 'at most'} {self.high:g}"
        if self.item is not None:
            words += f" of {self.length or 'one or more'} items, each {self.item.expected()}"
        extra = [str(value) for value in self.also] + ["a list of them"] * self.several + ["null"] * self.optional
        return words + (f", or {' or '.join(extra)}" if extra else "")

    def accepts(self, value: Any) -> bool:  # noqa: ANN401 - any plain value
        """Return whether `value` is allowed."""
        if value is None:
            return self.optional
        if value in self.also and isinstance(value, (str, bool)):
            return True
        if self.several and isinstance(value, list):
            return bool(value) and all(isinstance(v, (str, int, float)) and self.accepts(v) for v in value)
        if self.kind == "list":
            return self._accepts_list(value)
        if self.kind == "bool":
            return isinstance(value, bool)
        if self.kind == "str":
            return isinstance(value, (str, int, float)) and (self.choices is None or value in self.choices)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else (int, float)):
            return False
        return self._in_range(float(value))

    def _accepts_list(self, value: Any) -> bool:  # noqa: ANN401 - any plain value
        if not isinstance(value, list) or (self.item is not None and not all(self.item.accepts(v) for v in value)):
            return False
        if self.length is not None:
            return len(value) == self.length
        return bool(value) or self.item is TEXT

    def _in_range(self, value: float) -> bool:
        if not math.isfinite(value):
            return False
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)


COUNT = Rule("int", low=1)
COUNT_OR_NULL = Rule("int", low=1, optional=True)
WHOLE = Rule("int", low=0)
SHARE = Rule("float", low=0, high=1)
SHARE_BELOW_1 = Rule("float", low=0, high=1, below=True)
PART = Rule("float", low=0, high=1, above=True, below=True)
PART_OR_NULL = Rule("float", low=0, high=1, above=True, below=True, optional=True)
NOT_NEGATIVE = Rule("float", low=0)
POSITIVE = Rule("float", low=0, above=True)
SEED = Rule("int", low=0, high=2**63 - 1)
FLAG = Rule("bool")
TEXT = Rule("str")
TEXT_OR_NULL = Rule("str", optional=True)
TEXTS_OR_NULL = Rule("str", optional=True, several=True)
PAIR = Rule("list", item=Rule("float"), length=2)

RULES: dict[str, Rule] = {
    # the run
    "name": TEXT_OR_NULL,
    "output_dir": TEXT,
    "epochs": COUNT,
    "batch_size": COUNT,
    "grad_accum_steps": COUNT,
    "clip_grad_norm": Rule("float", low=0, above=True, optional=True),
    "clip_grad_value": Rule("float", low=0, above=True, optional=True),
    "on_nan": Rule("str", choices=("stop", "skip")),
    "on_oom": Rule("str", choices=("stop", "microbatch")),
    "compile": FLAG,
    "activation_checkpointing": FLAG,
    "stages": Rule("list", item=Rule("list", item=TEXT), optional=True),
    "log_every_steps": COUNT,
    "img_size": COUNT_OR_NULL,
    "pretrained": Rule("str", optional=True, also=(True, False)),
    "seed": SEED,
    "device": TEXT,
    "channels_last": FLAG,
    "sync_batchnorm": FLAG,
    "dist_timeout_s": Rule("float", low=5),
    "threads": COUNT_OR_NULL,
    "loader": Rule("str", choices=("auto", "device", "host")),
    "workers": WHOLE,
    "sampler": Rule("str", choices=("shuffle", "balanced")),
    "monitor": Rule("str", choices=tuple(METRICS)),
    "mode": Rule("str", choices=("auto", "max", "min")),
    "patience": COUNT_OR_NULL,
    "min_delta": NOT_NEGATIVE,
    "class_weights": Rule("str", choices=("none", "balanced", "effective")),
    "max_time": TEXT_OR_NULL,
    "save_every_steps": COUNT_OR_NULL,
    "profile": FLAG,
    "plots": FLAG,
    "report": FLAG,
    "log_gradients": FLAG,
    "overfit_batch": FLAG,
    "limit_train_batches": COUNT_OR_NULL,
    "limit_eval_batches": COUNT_OR_NULL,
    "resume": TEXT,
    "resume_allow": Rule("list", item=TEXT),
    "trusted": Rule("list", item=TEXT),
    "json": FLAG,
    # model
    "widths": Rule("list", item=COUNT),
    "small_stem": Rule("bool", also=("auto",)),
    "native_size": COUNT,
    "head": Rule("str", choices=("linear", "mlp")),
    # data
    "root": TEXT_OR_NULL,
    "download": FLAG,
    "val_fraction": Rule("float", low=0, high=1, above=True, below=True),
    "test_fraction": Rule("float", low=0, high=1, above=True, below=True),
    "split_seed": SEED,
    "mean": Rule("list", item=Rule("float"), optional=True),
    "std": Rule("list", item=POSITIVE, optional=True),
    "interpolation": Rule("str", choices=("bilinear", "bicubic"), optional=True),
    "channels": Rule("int", low=1),
    "on_error": Rule("str", choices=("fail", "skip")),
    "max_bad": SHARE,
    "allow_empty": FLAG,
    "cache": Rule("str", choices=("auto", "none", "memory", "disk")),
    "cache_mb": WHOLE,
    "cache_dir": TEXT_OR_NULL,
    "folds": Rule("int", low=2, optional=True),
    "fold": Rule("int", low=0, optional=True),
    "limit": COUNT_OR_NULL,
    "max_pixels": COUNT,
    "label_separator": TEXT_OR_NULL,
    "val_root": TEXT_OR_NULL,
    "test_root": TEXT_OR_NULL,
    "shards_mb": COUNT,
    "image_column": TEXT_OR_NULL,
    "label_column": TEXT_OR_NULL,
    # augmentation
    "prob": SHARE,
    "padding": WHOLE,
    "degrees": NOT_NEGATIVE,
    "translate": SHARE,
    "scale": PAIR,
    "brightness": NOT_NEGATIVE,
    "contrast": NOT_NEGATIVE,
    "saturation": NOT_NEGATIVE,
    "hue": Rule("float", low=0, high=0.5),
    "eval_resize": Rule("float", low=1),
    "alpha": NOT_NEGATIVE,
    "mixup_alpha": NOT_NEGATIVE,
    "cutmix_alpha": NOT_NEGATIVE,
    "switch_prob": SHARE,
    "distortion_scale": SHARE,
    "kernel_size": COUNT,
    "sigma": PAIR,
    "noise_mean": Rule("float", low=-1, high=1),
    "noise_sigma": SHARE,
    "amount": SHARE,
    "policy": Rule("str", choices=("cifar10", "imagenet", "svhn")),
    "num_ops": Rule("int", low=1, high=20),
    "magnitude": Rule("int", low=0, high=30),
    "severity": Rule("int", low=1, high=10),
    "mixture_width": Rule("int", low=1, high=10),
    "transforms": Rule("list"),  # Albumentations checks what stands in it
    # loss, regularizer, optimizer, scheduler, precision
    "focal_gamma": NOT_NEGATIVE,
    "focal_alpha": Rule("float", low=0, high=1, optional=True),
    "label_smoothing": SHARE_BELOW_1,
    "drop_prob": SHARE_BELOW_1,
    "lr": POSITIVE,
    "momentum": SHARE_BELOW_1,
    "nesterov": FLAG,
    "betas": Rule("list", item=SHARE_BELOW_1, length=2),
    "weight_decay": NOT_NEGATIVE,
    "fused": FLAG,
    "warmup_epochs": NOT_NEGATIVE,
    "step_epochs": COUNT,
    "gamma": Rule("float", low=0, high=1, above=True),
    "milestones_epochs": Rule("list", item=COUNT),
    "restart_epochs": COUNT,
    "restart_factor": COUNT,
    "power": POSITIVE,
    "min_lr": NOT_NEGATIVE,
    "plateau_epochs": WHOLE,
    "pct_start": Rule("float", low=0, high=1, above=True, below=True),
    "div_factor": POSITIVE,
    "final_div_factor": POSITIVE,
    "probe": FLAG,
    # finetune
    "layer_decay": Rule("float", low=0, high=1, above=True, optional=True),
    "lr_scale": Rule("str", choices=("none",)),
    "early_stages": COUNT_OR_NULL,
    "head_lr": POSITIVE,
    "late_lr": POSITIVE,
    "early_lr": POSITIVE,
    # averaging, distillation
    "decay": SHARE_BELOW_1,
    "every_steps": COUNT,
    "start": SHARE_BELOW_1,
    "teacher": TEXT_OR_NULL,
    "temperature": POSITIVE,
    "teacher_weight": SHARE,
    # compression, export, logger
    "sparsity": PART,
    "pruning_ratio": PART_OR_NULL,
    "target_macs": PART_OR_NULL,
    "target_params": PART_OR_NULL,
    "target_latency": PART_OR_NULL,
    "iterative_steps": Rule("list", item=PART, optional=True),
    "round_to": COUNT,
    "distill": FLAG,
    "importance": Rule("str", choices=("l1", "magnitude", "bn_scale", "taylor", "random")),
    "global_pruning": FLAG,
    "finetune_epochs": WHOLE,
    "finetune_lr": POSITIVE,
    "calibration_samples": COUNT,
    "method": Rule("str", choices=("minmax", "entropy", "percentile")),
    "per_channel": FLAG,
    "reduce_range": FLAG,
    "auto_skip": FLAG,
    "max_drop": Rule("float", low=0, high=1, optional=True),
    "opset": Rule("int", low=18),
    "dynamic": FLAG,
    "embed_preprocessing": FLAG,
    "images": COUNT,
    # budget, gate, benchmark
    "min_accuracy": Rule("float", low=0, high=1, optional=True),
    "latency_ms": Rule("float", low=0, above=True, optional=True),
    "max_latency_ms": Rule("float", low=0, above=True, optional=True),
    "size_mb": Rule("float", low=0, above=True, optional=True),
    "max_size_mb": Rule("float", low=0, above=True, optional=True),
    "batches": Rule("list", item=COUNT),
    "runs": Rule("int", low=5),
    # check
    "near": Rule("float", low=1, optional=True),
    # predict and the verbs on a finished run
    "what": Rule("str", choices=("aug", "lr", "model", "gradcam", "features", "filters", "tsne", "errors", "weights")),
    "layer": TEXT_OR_NULL,
    "layers": Rule("list", item=TEXT),
    "steps": Rule("int", low=20),
    "models": Rule("list", item=TEXT),
    "num_classes": COUNT_OR_NULL,
    "in_channels": COUNT_OR_NULL,
    "run": TEXTS_OR_NULL,
    "weights": TEXTS_OR_NULL,
    "source": TEXTS_OR_NULL,
    "topk": COUNT,
    "output": TEXT_OR_NULL,
    "format": Rule("str", choices=("auto", "csv", "json", "jsonl")),
    "split": Rule("str", choices=("train", "val", "test")),
    "artifact": Rule("str", several=True),
    "tta": Rule("str", choices=("none", "hflip", "flip", "rotate", "color"), several=True),
}


def validate(config: dict[str, Any], trusted: Sequence[str] = ()) -> None:
    """Check every value of a composed and resolved config, then what contradicts what.

    Args:
        config: Plain dictionaries and lists, without `hydra`.
        trusted: The user's own packages; what stands below their `_target_` is theirs to check.

    Raises:
        ConfigError: All findings, one a line.
    """
    errors = list(_value_errors(config, trusted))
    if not errors:
        errors = list(_contradictions(config))
    if errors:
        raise ConfigError("\n".join(errors))


def seconds(duration: str) -> float:
    """Turn `90s`, `30m`, `2h` or `1h30m` into seconds; raise ValueError for anything else."""
    parts = DURATION.findall(duration)
    if not parts or "".join(number + unit for number, unit in parts) != duration:
        raise ValueError(duration)
    return sum(float(number) * {"s": 1, "m": 60, "h": 3600}[unit] for number, unit in parts)


def _value_errors(node: dict[str, Any], trusted: Sequence[str], prefix: str = "") -> Iterator[str]:
    target = node.get("_target_")
    if isinstance(target, str) and target.split(".")[0] in trusted:
        return
    for key, value in node.items():
        path = f"{prefix}{key}"
        if key in ("_target_", "_partial_", "_recursive_", "_convert_"):
            continue
        if key in BY_NAME and isinstance(value, dict):
            yield from (
                f"{path}.{name}={_shown(weight)} is not allowed; expected {POSITIVE.expected()}"
                for name, weight in value.items()
                if not POSITIVE.accepts(weight)
            )
        elif isinstance(value, dict):
            yield from _value_errors(value, trusted, f"{path}.")
        elif value is None and path.startswith(REMOVABLE):
            continue  # null leaves an operation or a phase out
        elif key not in RULES:
            yield f"unknown key {path}={value}; {did_you_mean(key, RULES, 'keys')}"
        elif not RULES[key].accepts(value):
            rule = RULES[key]
            hint = f"; {did_you_mean(str(value), rule.choices)}" if rule.choices else f"; expected {rule.expected()}"
            yield f"{path}={_shown(value)} is not allowed{hint}"


def _shown(value: Any) -> str:  # noqa: ANN401 - any plain value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _contradictions(config: dict[str, Any]) -> Iterator[str]:
    if "epochs" not in config:
        return
    yield from _task_contradictions(config)
    optimizer, scheduler = config["optimizer"], config["scheduler"]
    if optimizer.get("nesterov") and not optimizer.get("momentum"):
        yield (
            "optimizer.nesterov=true needs optimizer.momentum above 0: set optimizer.momentum=0.9 or "
            "optimizer.nesterov=false"
        )
    if scheduler.get("min_lr", 0) > optimizer.get("lr", math.inf):
        yield f"scheduler.min_lr={scheduler['min_lr']} is above optimizer.lr={optimizer['lr']}: lower scheduler.min_lr"
    for name, epochs in _cycles(config):
        if scheduler.get("warmup_epochs", 0) >= epochs > 0 and scheduler.get("warmup_epochs", 0) > 0:
            yield (
                f"scheduler.warmup_epochs={scheduler['warmup_epochs']} leaves nothing of "
                f"{name}={epochs}: lower it, or raise {name}"
            )
            break
    if config["precision"].get("_target_", "").endswith(".Fp16") and config["device"] == "cpu":
        yield "precision=fp16 and device=cpu: a CPU has no fast float16; use precision=amp or precision=fp32"
    if config["batch_size"] < 2:
        yield "batch_size=1 is not allowed: batch norm needs two pictures; use batch_size=2 and grad_accum_steps"
    if config["max_time"] is not None:
        try:
            if seconds(str(config["max_time"])) <= 0:
                raise ValueError
        except ValueError:
            yield f"max_time={config['max_time']} is not a duration; write 90s, 30m, 2h or 1h30m"
    yield from _split_contradictions(config["data"])
    yield from _finetune_contradictions(config)
    yield from _memory_contradictions(config)


def _task_contradictions(config: dict[str, Any]) -> Iterator[str]:
    task, loss = config["task"].get("_target_"), config["loss"].get("_target_", "")
    distillation = config.get("distillation", {})
    if distillation.get("teacher", "") is None:
        yield (
            "distillation=kd has no teacher; give distillation.teacher=FOLDER, the folder of a finished run, or a "
            "model.safetensors"
        )
    if task == "cvtrain.task.Multilabel" and loss in ONE_CLASS:
        name, instead = ONE_CLASS[loss]
        yield f"task=multilabel and loss={name}: this loss knows one class a picture; use loss={instead}"
    if task == "cvtrain.task.Classification" and loss in ANY_LABELS:
        name, instead = ANY_LABELS[loss]
        yield (
            f"task=classification and loss={name}: a picture has one class; use loss={instead}, or task=multilabel "
            "for data with several labels"
        )
    if config.get("sampler") == "balanced" and config.get("class_weights", "none") != "none":
        yield (
            f"sampler=balanced and class_weights={config['class_weights']} would correct for rare classes twice; "
            "use class_weights=none or sampler=shuffle"
        )


def _memory_contradictions(config: dict[str, Any]) -> Iterator[str]:
    if config.get("activation_checkpointing") and config["compile"]:
        yield (
            "activation_checkpointing=true and compile=true: the compiler itself decides what to compute again; "
            "use one of them"
        )


def _finetune_contradictions(config: dict[str, Any]) -> Iterator[str]:
    finetune, decay = config.get("finetune", {}), config.get("layer_decay")
    if decay is not None and isinstance(finetune.get("lr_scale"), dict):
        yield f"layer_decay={decay} and finetune.lr_scale both set the rates of the stages; use one of them"
    if finetune.get("phases") and config.get("resizing", {}).get("phases"):
        yield (
            "finetune=progressive and resizing=progressive both divide the run into learning-rate cycles; "
            "use resizing=none, or another finetune="
        )


def _split_contradictions(data: dict[str, Any]) -> Iterator[str]:
    folds, fold = data.get("folds"), data.get("fold")
    if fold is not None and (folds is None or fold >= folds):
        yield f"data.fold={fold} needs data.folds above {fold}, it is {_shown(folds)}: set it, or leave data.fold out"
    fractions = [data.get(key) or 0 for key in ("val_fraction", "test_fraction")]
    if sum(fractions) >= 1:
        yield (
            f"data.val_fraction={fractions[0]} and data.test_fraction={fractions[1]} leave nothing to "
            f"train on; keep their sum below 1"
        )


def _cycles(config: dict[str, Any]) -> list[tuple[str, int]]:
    """Return name and length of each learning-rate cycle: the run's, or its phases'."""
    for group in ("resizing", "finetune"):
        phases = {name: p for name, p in (config.get(group, {}).get("phases") or {}).items() if p}
        rest = config["epochs"] - sum(phase.get("epochs") or 0 for phase in phases.values())
        if phases:
            return [(f"{group}.phases.{name}.epochs", p.get("epochs") or rest) for name, p in phases.items()]
    return [("epochs", config["epochs"])]
