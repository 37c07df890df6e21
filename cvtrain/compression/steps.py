"""What the steps of the `compression` group share."""

from __future__ import annotations

from torch import nn

from cvtrain.core.artifact import Compressed, CompressionContext, CompressionStep
from cvtrain.errors import ConfigError


def artifact_file(name: str, suffix: str) -> str:
    """Return the file name of artifact `name`: `pruned+int8` and `.onnx` give `pruned_int8.onnx`."""
    return name.replace("+", "_") + suffix


def check_finetuning(where: str, epochs: int, lr: float) -> None:
    """Check what a step says of the training behind it.

    Args:
        where: The option, for the error.
        epochs: 0 for none.
        lr: Share of the run's learning rate that it begins at.

    Raises:
        ConfigError: A value out of range.
    """
    if epochs < 0:
        raise ConfigError(f"{where}.finetune_epochs={epochs}: must be 0 or more")
    if lr <= 0.0:
        raise ConfigError(f"{where}.finetune_lr={lr}: must be above 0, such as 0.1, a share of optimizer.lr")


class Chain:
    """Compression steps in the order they were asked for, each on what the last one that changed the model made.

    A step that raises leaves the chain as it was, so the ones behind it work on the model they would have got without
    it.

    Args:
        model: The trained model, on the CPU, in eval mode; never changed.
        context: What the steps may use.
    """

    def __init__(self, model: nn.Module, context: CompressionContext) -> None:
        self.model = model
        """What the next step works on."""
        self.name = ""
        """Its name: the labels of the steps that made it, joined with `+`."""
        self.smaller: tuple[str, nn.Module] | None = None
        """Name and network of the last step that made another network, worth an export of its own."""
        self._context = context

    def name_of(self, step: CompressionStep) -> str:
        """Return what the artifact of `step` will be called."""
        return f"{self.name}+{step.label}" if self.name else step.label

    def apply(self, step: CompressionStep) -> Compressed:
        """Apply `step` and return what it gave; its artifact is called `pruned`, behind a pruning `pruned+int8`.

        Raises:
            CvtrainError: What the step raises.
        """
        name = self.name_of(step)
        done = step.apply(self.model, name, self._context)
        if done.model is not None:
            self.model, self.name = done.model, name
            if done.smaller:
                self.smaller = (name, done.model)
        return done
