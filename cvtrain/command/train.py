"""Train: the steps of a run, in order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from cvtrain import runs
from cvtrain.averaging import NoAveraging
from cvtrain.build import Builder, lay_out
from cvtrain.command import continuation, debugging, processes, report
from cvtrain.command.artifacts import forget_artifacts, make_and_prove, subject_of
from cvtrain.command.provenance import deployment_metadata, environment, fingerprint, write_manifest
from cvtrain.command.results import Evaluation, write_csv, write_results
from cvtrain.command.teacher import load_teacher, refuse_another_teacher
from cvtrain.core import distributed, weights
from cvtrain.core.complexity import count_params
from cvtrain.core.files import write_atomic, write_json
from cvtrain.core.metrics import class_counts
from cvtrain.core.recompute import checkpoint_activations, keep_activations
from cvtrain.core.types import Batch, DataSets
from cvtrain.engine import overfit
from cvtrain.engine.checkpoint import BEST, LAST, CheckpointStore, SharedCheckpoints
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.parts import Task
from cvtrain.engine.ranks import SharedStop
from cvtrain.engine.run import TrainRun
from cvtrain.engine.signals import StopRequest
from cvtrain.engine.state import TERMS, TrainState
from cvtrain.errors import ConfigError, DataError, Interrupted, did_you_mean
from cvtrain.evaluation import fit_temperature
from cvtrain.logger import NoLogger
from cvtrain.model.size import first_line, refusal
from cvtrain.precision.compiling import compiled
from cvtrain.report.console import (
    Progressing,
    attach_log,
    class_histogram,
    imbalance_notice,
    make_console,
    stages_table,
)
from cvtrain.resizing import Constant

log = logging.getLogger("cvtrain")

UNREADABLE = "unreadable.txt"
SCHEDULE_POINTS = 5000
"""At how many steps of a long run the learning rate is drawn."""


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports."""

    metrics: dict[str, float]
    artifacts: list[dict[str, Any]]
    data: dict[str, int]


def train(config: dict[str, Any], folder: Path, trusted: list[str], choices: dict[str, str]) -> TrainResult:
    """Train, evaluate, compress, export and prove; every file goes to `folder`.

    Args:
        config: Resolved, audited and validated.
        folder: The run folder; exists and is locked by the caller.
        trusted: The user's own packages.
        choices: Which option each group has.

    Raises:
        CvtrainError: Any failure with a known cause.
    """
    console = make_console(bool(config["json"]))
    console.quiet = not distributed.main()
    attach_log(console)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    builder = Builder(config, trusted)
    device = builder.device()
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    processes.announce(device, config["threads"])
    (folder / "weights").mkdir(exist_ok=True)
    stops = SharedStop if distributed.world_size() > 1 else StopRequest
    with stops(lambda reason, code: runs.write_status(folder, "stopped", code, reason, True)) as stop:
        begun = distributed.shared(lambda: _begun(folder))
        with distributed.first_on_main("data"):
            sets, source = _load(builder, folder, begun)
        origin = None if builder.pretrained is None else builder.pretrained.record()
        processes.refuse_other_data(sets.name, fingerprint(sets))
        _refuse_changed_data(folder, sets)
        if not (folder / "weights" / LAST).exists():  # else the checkpoint's config stands until it is restored
            write_manifest(folder, config, choices, sets, device, pretrained=origin)
        for note in sets.notes:
            log.info("data: %s", note)
        run = build_run(builder, sets, device, folder, stop)
        _show_classes(console, config, sets)
        _show_stages(console, run)
        run.display = Progressing(console)
        if config["overfit_batch"]:
            overfit.prepare(run)
        resumed = run.checkpoints.restore(run)
        if resumed:
            refuse_another_teacher(run, config)
            write_manifest(folder, config, choices, sets, device, continuation.record(run, config, resumed), origin)
            runs.write_status(folder, "running", None)
        elif getattr(source, "splits", None):
            write_json(folder / "splits.json", source.splits)
        try:
            if distributed.main():
                first_step = run.state.step + 1 if resumed else None
                run.tracker = builder.build("logger", folder=folder, purge_step=first_step)
                if config["plots"]:
                    show_batch(run, folder, sets.class_names)
                    show_schedule(run, folder)
                run.checkpoints.committed = lambda: _tell_progress(run, folder)
            debugging.attach(run, config, folder, console)
            fit(run)
            debugging.tell_times(run, config, choices, console)
            if config["overfit_batch"]:
                return TrainResult(debugging.end_overfit(run, folder), [], sets.counts())
            return conclude(builder, run, sets, folder, console)
        finally:
            run.timer.close()
            run.tracker.close()


def _tell_progress(run: TrainRun, folder: Path) -> None:
    """Say in the run folder how far the run has come."""
    runs.write_status(folder, "running", None)
    write_csv(folder / "results.csv", [{"epoch": i + 1, **row} for i, row in enumerate(list(run.state.history))])


def _begun(folder: Path) -> dict[str, Any] | None:
    """Return what the run recorded of its pretrained weights, once a checkpoint holds what has become of them."""
    has_checkpoint = any((folder / "weights" / name).exists() for name in runs.CHECKPOINTS)
    return runs.read_json(folder / runs.MANIFEST).get("pretrained") if has_checkpoint else None


def _load(builder: Builder, folder: Path, begun: dict[str, Any] | None) -> tuple[DataSets, Any]:
    """Load the data; every picture that cannot be read is named in a file of the run folder."""
    try:
        sets, source = builder.data(begun)
    except DataError as error:
        if error.details:
            write_atomic(folder / UNREADABLE, "\n".join(error.details) + "\n")
        raise
    if sets.bad:
        write_atomic(folder / UNREADABLE, "\n".join(sets.bad) + "\n")
    return sets, source


def _show_classes(console: Console, config: dict[str, Any], sets: DataSets) -> None:
    counts = class_counts(sets.train.labels, sets.num_classes).tolist()
    console.print(class_histogram(sets.class_names, counts))
    notice = imbalance_notice(sets.class_names, counts, sets.multilabel)
    if notice and config["class_weights"] == "none" and config["sampler"] != "balanced":
        log.warning(notice)


def _show_stages(console: Console, run: TrainRun) -> None:
    stages, phases = getattr(run.finetune, "stages", ()), getattr(run.finetune, "phases", ())
    if stages:
        sizes = {name: parameter.numel() for name, parameter in run.model.named_parameters()}
        console.print(stages_table(stages, phases, sizes, run.options.base_lr, run.options.epochs))


def _refuse_changed_data(folder: Path, sets: DataSets) -> None:
    stored = runs.read_json(folder / "manifest.json").get("data", {}).get("fingerprint")
    if stored not in (None, fingerprint(sets)) and (folder / "weights" / LAST).exists():
        raise DataError(
            f"data {sets.name} has changed since {folder} was started: other files or labels would move between train, "
            "val and test.\nBring the data back as it was, or start a new run with resume=none."
        )


def build_run(builder: Builder, sets: DataSets, device: torch.device, folder: Path, stop: StopRequest) -> TrainRun:
    """Build every part of the run; nothing has trained yet.

    Raises:
        CvtrainError: A setting that only shows now does not fit, told before the first epoch.
    """
    config = builder.config
    augmentation = builder.augmentation(sets.preprocess)
    loader = builder.loader(sets, device, augmentation.crop)
    regularizers = list(builder.build_each("regularizer").values())
    task = builder.task(sets, regularizers, device)
    model = builder.model(sets)
    for regularizer in regularizers:
        regularizer.attach(model, sets.preprocess.shape)
    finetune = builder.finetune(model, sets)
    if config["activation_checkpointing"]:
        checkpoint_activations(model, sets.preprocess.shape, config["stages"])
    if config["sync_batchnorm"]:
        model = processes.with_shared_batch_norm(model, device)
    lay_out(model, device, config["channels_last"])
    averaging = builder.build("averaging")
    averaging.begin(model)
    distillation = builder.distillation(task, load_teacher(builder, sets, device, folder))
    _check_monitor(config["monitor"], task, distillation.terms, sets.num_classes)
    builder.build_each("export")  # built again when they are due; wrong settings are told now
    for step in builder.build_each("compression").values():
        if hasattr(step, "check"):
            step.check(model, torch.zeros(1, *sets.preprocess.shape))
    accepted = runs.read_json(folder / runs.MANIFEST).get("config_hashes", [])
    stored = {
        "config_hash": runs.config_hash(config),
        "config": config,
        "environment": environment(device),
        "class_names": sets.class_names,
        "preprocess": sets.preprocess.to_dict(),
        "teacher_sha256": distillation.teacher_sha256,
    }
    store = CheckpointStore if distributed.main() else SharedCheckpoints
    run = TrainRun(
        options=builder.options(distributed.rank()),
        device=device,
        model=model,
        preprocess=sets.preprocess,
        loader=loader,
        augmentation=augmentation,
        resizing=_resizing(builder, sets, model),
        task=task,
        optimizer=builder.optimizer(model, finetune),
        schedule=builder.build("scheduler"),
        precision=builder.build("precision"),
        finetune=finetune,
        averaging=averaging,
        distillation=distillation,
        monitor=Monitor(config["monitor"], builder.monitor_mode(), config["patience"], config["min_delta"]),
        checkpoints=store(folder / "weights", stored, accepted),
        tracker=NoLogger(),
        stop=stop,
        state=TrainState.new(device, (*TERMS, *distillation.terms)),
        wrapped=compiled(model, device) if config["compile"] else None,
    )
    counts, size = sets.counts(), sets.preprocess.img_size
    log.info(
        "data %s: %d train, %d val (chooses the checkpoint), %d test (reported once); %d classes; %d×%d×%d",
        *(sets.name, counts["train"], counts["val"], counts["test"], sets.num_classes),
        *(sets.preprocess.channels, size, size),
    )
    log.info("loader: %s, %s", loader.mode, loader.reason)
    log.info("device: %s, %d CPU threads; %s parameters", device, torch.get_num_threads(), f"{count_params(model):,}")
    batch = first_batch(run, 0)
    probed = max(2, len(batch) // 2)  # a float32 probe of a whole batch would take the most memory of the run
    images, targets = run.train_images(batch, 0)[:probed], run.task.encode(batch.targets)[:probed]
    run.precision.setup(device, model, lambda trial: run.task.losses(trial, images, targets)["loss"])
    if distributed.world_size() > 1:  # what a probe has found differs from process to process
        run.precision.load_state(distributed.shared(run.precision.state))
    run.share()
    return run


def _resizing(builder: Builder, sets: DataSets, model: nn.Module) -> Constant:
    """Build the phases, and see that the model takes pictures of each size."""
    size = sets.preprocess.img_size
    resizing: Constant = builder.build("resizing", epochs=builder.config["epochs"], img_size=size)
    if len(resizing.phases) == 1:
        return resizing
    for phase in resizing.phases:
        reason = refusal(model, (sets.preprocess.channels, phase.img_size, phase.img_size))
        if reason is not None:
            raise ConfigError(
                f"resizing.phases.{phase.name}.img_size={phase.img_size}: this model does not take that size "
                f"({first_line(reason)})\n  choose larger phases, or a model that pools at its end"
            ) from reason
        log.info(
            "resizing: epochs %d to %d at %d×%d, lr %g; evaluation at %d×%d",
            *(phase.first + 1, phase.first + phase.epochs, phase.img_size, phase.img_size),
            *(builder.config["optimizer"]["lr"] if phase.lr is None else phase.lr, size, size),
        )
    return resizing


def _check_monitor(monitor: str, task: Task, terms: Sequence[str], num_classes: int) -> None:
    measured = task.metrics(torch.device("cpu")).compute()
    names = [*(f"train/{name}" for name in (*TERMS, *terms, "grad_norm")), *(f"val/{name}" for name in measured)]
    if monitor not in names:
        raise ConfigError(
            f"monitor={monitor} is not measured by this task on {num_classes} classes; "
            f"{did_you_mean(monitor, names, 'metrics')}"
        )


def first_batch(run: TrainRun, epoch: int) -> Batch:
    """Return an epoch's first training batch; worker processes end with it."""
    with closing(run.loader.train_batches(epoch, img_size=run.resizing.phase(epoch).img_size)) as batches:
        return next(batches)


def show_batch(run: TrainRun, folder: Path, class_names: list[str]) -> None:
    """Write what the model is about to see: an augmented training batch with its labels, and log it."""
    from cvtrain.report import plots  # matplotlib: a run without pictures need not wait for it

    options, state = run.options, run.state
    batch = first_batch(run, state.epoch)
    images = run.augmented(batch, state.epoch).float() / 255
    targets = run.task.encode(batch.targets)
    images, targets = run.augmentation.mix(images, targets, options.seed, state.step, options.rank)
    captions = [_caption(row, class_names) for row in targets.cpu()]
    plots.batch(images, captions, folder / "train_batch0.jpg")
    run.tracker.pictures("train/batch", images, state.step)


def show_schedule(run: TrainRun, folder: Path) -> None:
    """Draw the learning rate of the whole run, before its first step, and log it."""
    from cvtrain.report import plots

    total = run.options.epochs * run.steps_per_epoch
    stride = -(-total // SCHEDULE_POINTS)
    rates = [run.schedule.lr(*run.clock(step)) for step in range(0, total, stride)]
    title = getattr(run.schedule, "caption", "learning rate")
    dividing = run.finetune if run.finetune.cycle(0) else run.resizing
    figure = plots.learning_rate(
        rates, run.steps_per_epoch / stride, folder / "learning_rate.png", title, getattr(dividing, "phases", ())
    )
    run.tracker.figure("learning_rate", figure, run.state.step)


def _caption(target: Tensor, names: list[str]) -> str:
    top = target.topk(min(2, len(target)))
    shares = [(float(p), names[int(k)]) for p, k in zip(top.values, top.indices, strict=True) if p > 0.005]
    return " + ".join(name if share > 0.995 else f"{name} {share:.2f}" for share, name in shares)


def conclude(builder: Builder, run: TrainRun, sets: DataSets, folder: Path, console: Console) -> TrainResult:
    """Evaluate the best checkpoint once on the test set, then compress, export, prove and report."""
    metadata = deployment_metadata({**builder.config, "model": builder.model_node()}, sets)
    if builder.config["sync_batchnorm"]:
        run.model = processes.with_batch_norm_alone(run.model, builder, sets)
    if run.checkpoints.has(BEST):
        run.checkpoints.load_model(BEST, run.model)
    else:
        run.model.load_state_dict(run.deployed.state_dict())
    run.averaging = NoAveraging()  # what was averaged is now the model
    keep_activations(run.model)
    model = run.model.eval()
    metadata["temperature"] = f"{_temperature(run, sets):.6g}"
    if distributed.main():
        forget_artifacts(folder)
        weights.save_weights(model, folder / "weights" / "model.safetensors", metadata)
        run.checkpoints.record("model.safetensors")
    metrics, logits = evaluate_model(run, model, "test", full_precision=True)
    if not processes.go_on_alone(run, builder, sets):
        return TrainResult({}, [], {})
    seen = len(logits)
    evaluation = Evaluation(
        *(metrics, logits, sets.test.labels[:seen], sets.test.names[:seen], sets.class_names),
        temperature=float(metadata["temperature"]),
        pictures=sets.test.read,
    )
    measured = {**metrics.compute(), **evaluation.scores.values}
    results = {**run.monitor.best_row, **{f"test/{name}": value for name, value in measured.items()}}
    intervals, figures = write_results(folder, run.state.history, evaluation, builder.config["plots"])
    for name, figure in figures.items():
        run.tracker.figure(name, figure, run.state.step)
    low, high = intervals["test/acc"]
    measure = "exact match" if sets.multilabel else "accuracy"
    console.print(
        f"best epoch {run.monitor.best_epoch + 1} of {run.state.epoch} by {run.monitor.name}; "
        f"trained {run.state.seconds:.1f} s; test {measure} {100 * results['test/acc']:.2f} % "
        f"[{100 * low:.2f}, {100 * high:.2f}] on {seen} pictures"
    )
    counts = sets.counts()
    report = {"metrics": results, "intervals_95": intervals, "artifacts": [], "data": counts}
    write_json(folder / "metrics.json", report)  # stands even when an artifact fails
    proved = make_and_prove(builder, subject_of(builder, run, sets, folder, metadata))
    proved.show(console, torch.get_num_threads())
    write_json(folder / "metrics.json", {**report, "artifacts": proved.table, "winner": proved.verdict.winner})
    finals = {name: results[name] for name in (run.monitor.name, "test/acc") if name in results}
    # Behind the last step, so that a run which is killed here and concluded again hides them before it writes them.
    behind = run.state.step + 1
    run.tracker.hparams(flat(builder.config), {f"hparam/{name}": value for name, value in finals.items()}, behind)
    if builder.config["report"]:
        _write_report(folder, run.model, sets)
    proved.settle(builder.config["gate"])
    return TrainResult(results, proved.table, counts)


def _write_report(folder: Path, model: nn.Module, sets: DataSets) -> None:
    """Write report.html; a run is no worse for lacking it."""
    look = partial(report.error_pictures, source=sets.test, model=model, preprocess=sets.preprocess)
    try:
        report.write_report(folder, look)
    except Interrupted:
        raise
    except Exception as error:  # also a mistake in drawing it: what was trained and proved is worth more
        log.warning("%s is missing: %s: %s", report.PAGE, type(error).__name__, error)


def _temperature(run: TrainRun, sets: DataSets) -> float:
    """Return what logits are divided by before they become probabilities, fitted on val; 1 in a run that only tries."""
    if run.options.limit_eval_batches is not None:
        return 1.0
    _, logits = evaluate_model(run, run.model, "val", full_precision=True)
    return fit_temperature(logits, torch.from_numpy(sets.val.labels), sets.multilabel)


def flat(node: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a nested config as `group.key` -> value, without nulls."""
    pairs: dict[str, Any] = {}
    for key, value in node.items():
        if isinstance(value, dict):
            pairs |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            pairs[f"{prefix}{key}"] = value
    return pairs
