"""Regularizers; the `regularizer` group, several at once."""

from cvtrain.regularizer.base import Regularizer
from cvtrain.regularizer.label_smoothing import LabelSmoothing
from cvtrain.regularizer.stochastic_depth import StochasticDepth

__all__ = ["LabelSmoothing", "Regularizer", "StochasticDepth"]
