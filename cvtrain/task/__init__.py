"""What the model is for: targets, losses and metrics; the `task` group."""

from cvtrain.task.classification import Classification

__all__ = ["Classification"]
