"""What the model is for: targets, losses and metrics; the `task` group."""

from cvtrain.task.classification import Classification
from cvtrain.task.multilabel import Multilabel

__all__ = ["Classification", "Multilabel"]
