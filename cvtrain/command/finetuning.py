"""The run's own recipe for what compression makes of its model: train on, measure, gradients."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice

import torch
from torch import Tensor, nn

from cvtrain.build import Builder, lay_out
from cvtrain.distillation import KnowledgeDistillation, Teacher
from cvtrain.engine.checkpoint import NoCheckpoints
from cvtrain.engine.loop import evaluate_model, fit
from cvtrain.engine.monitor import Monitor
from cvtrain.engine.parts import Distillation, Finetune, Silent
from cvtrain.engine.run import TrainRun
from cvtrain.engine.state import TERMS, TrainState
from cvtrain.errors import DivergedError
from cvtrain.finetune import Full
from cvtrain.finetune.base import original
from cvtrain.logger import NoLogger
from cvtrain.resizing import Constant
from cvtrain.scheduler import Cosine

log = logging.getLogger("cvtrain")

CPU = torch.device("cpu")


class Recipe:
    """What a compression step may ask of the run whose model it changes; models come and go on the CPU in eval mode.

    Args:
        builder: Of the run's config.
        run: Trained; its model, averages and checkpoints are left alone.
        class_names: K names.
    """

    def __init__(self, builder: Builder, run: TrainRun, class_names: Sequence[str]) -> None:
        self._builder = builder
        self._run = run
        self._class_names = list(class_names)
        self._finetuned = 0

    def finetune(self, model: nn.Module, epochs: int, lr: float, teacher: nn.Module | None) -> None:
        """Train `model` in place as the run trained, from a share of its learning rate along a cosine to zero.

        Data, augmentation, loss, regularizers, precision and optimizer are the run's, and so is the averaging: where
        it is on, the averaged weights are what is kept. What the run's last phase froze stays frozen. Buffers must
        have their final shapes.

        Args:
            model: On the CPU; may have other channels than the run's, masks or parametrized weights.
            epochs: 0 does nothing.
            lr: The share, above 0.
            teacher: Its answers are distilled, beside the labels; None: as the run itself did.

        Raises:
            DivergedError: The loss or a gradient is not finite.
            Interrupted: A signal asked to stop.
        """
        if epochs < 1:
            return
        self._finetuned += 1
        run, builder = self._run, self._builder
        lay_out(model, run.device, run.options.channels_last)
        strategy = strategy_for(model, run.finetune)
        strategy.apply(model, 0)  # the optimizer holds what trains, which may have been frozen until now
        averaging = builder.build("averaging")
        averaging.begin(model)
        distillation = self._distillation(teacher)
        options = dataclasses.replace(
            run.options,
            epochs=epochs,
            seed=run.options.seed + self._finetuned,  # other augmentations than in the epochs before, but for crops
            base_lr=run.clock(run.options.epochs * run.steps_per_epoch - 1)[0] * lr,
            save_every_steps=None,
            max_seconds=None,
        )
        inner = dataclasses.replace(
            run,
            options=options,
            model=model,
            finetune=strategy,
            optimizer=builder.optimizer(model, strategy),
            schedule=Cosine(),
            monitor=Monitor("val/acc", "max"),
            checkpoints=NoCheckpoints(),
            tracker=NoLogger(),
            display=_Lines(),
            state=TrainState.new(run.device, (*TERMS, *distillation.terms)),
            resizing=Constant(epochs, run.preprocess.img_size),
            averaging=averaging,
            distillation=distillation,
            wrapped=None,
        )
        try:
            fit(inner)
        except DivergedError as error:  # whose advice is that of a training
            raise DivergedError(
                f"fine-tuning of what was compressed: {str(error).partition(';')[0]}; the trained model stands.\n"
                "Compress less, set clip_grad_norm=1.0, or use precision=fp32."
            ) from error
        if inner.deployed is not model:
            model.load_state_dict(inner.deployed.state_dict())
        lay_out(model, CPU, channels_last=False).eval()

    def evaluate(self, model: nn.Module) -> float:
        """Return the share of right answers of `model` on the validation set, 0..1, in float32."""
        run = self._run
        lay_out(model, run.device, run.options.channels_last)
        metrics, _ = evaluate_model(run, model, "val", full_precision=True, keep=False)
        lay_out(model, CPU, channels_last=False)
        right, total = metrics.right()
        return right / total if total else 0.0

    def backward(self, model: nn.Module, batches: int) -> None:
        """Add the gradients of the run's loss, the mean over so many training batches, to the parameters' `.grad`.

        The pictures are not augmented, and the model computes as in evaluation: what counts is the model as it would
        be deployed. What the run froze gets gradients as well.
        """
        run = self._run
        lay_out(model, run.device, run.options.channels_last).eval()
        frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(True)
        with closing(run.loader.train_batches(0)) as epoch:
            for batch in islice(epoch, batches):
                losses = run.task.losses(model, run.eval_images(batch), run.task.encode(batch.targets))
                (losses["loss"] / batches).backward()  # type: ignore[no-untyped-call]
        for parameter in frozen:
            parameter.requires_grad_(False)
        lay_out(model, CPU, channels_last=False)

    def calibration(self) -> Iterator[Tensor]:
        """Yield training pictures, float32 normalised `(B, C, H, W)` on the CPU, not augmented."""
        with closing(self._run.loader.train_batches(0)) as batches:  # seeded order: a folder's own is class by class
            for batch in batches:
                yield self._run.preprocess(batch.images).cpu()

    def _distillation(self, teacher: nn.Module | None) -> Distillation:
        run = self._run
        if teacher is None:
            return run.distillation
        answers = lay_out(copy.deepcopy(teacher), run.device, run.options.channels_last)
        names, prepared = self._class_names, run.preprocess
        made = Teacher(answers, names, prepared, names, prepared, sha256="")
        if run.distillation.terms:  # with the run's own temperature and weight
            return self._builder.distillation(run.task, made)
        return KnowledgeDistillation(made, run.task.multilabel)


def strategy_for(model: nn.Module, trained: Finetune) -> Finetune:
    """Return what holds at the end of the run, or training of all parameters where its stages are not those of `model`.

    Args:
        model: Made of the run's, with masks, parametrizations or fewer channels.
        trained: The run's.
    """
    strategy = trained.last()
    names = {original(name) for name, _ in model.named_parameters()}
    staged = {name for stage in getattr(strategy, "stages", ()) for name in stage.parameters}
    if staged <= names:
        return strategy
    log.info("fine-tuning: the stages of the run are not those of the compressed model; all of it trains")
    return Full()


class _Lines(Silent):
    """A line for each epoch of a fine-tuning."""

    def end_epoch(self, run: TrainRun, row: dict[str, float], improved: bool) -> None:
        """Log the epoch."""
        log.info(
            "fine-tuning: epoch %d of %d, train loss %.4f, val acc %.4f",
            *(run.state.epoch, run.options.epochs, row["train/loss"], row["val/acc"]),
        )
