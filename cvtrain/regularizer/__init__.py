"""Regularizers; the `regularizer` group, several at once."""

from cvtrain.regularizer.base import Regularizer
from cvtrain.regularizer.dropout import Dropout
from cvtrain.regularizer.label_smoothing import LabelSmoothing
from cvtrain.regularizer.stochastic_depth import StochasticDepth, drop_rates

__all__ = ["Dropout", "LabelSmoothing", "Regularizer", "StochasticDepth", "drop_rates"]
