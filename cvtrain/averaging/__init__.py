"""Averages of the weights over training steps; the `averaging` group."""

from cvtrain.averaging.base import NoAveraging, WeightAverage
from cvtrain.averaging.ema import Ema
from cvtrain.averaging.swa import Swa

__all__ = ["Ema", "NoAveraging", "Swa", "WeightAverage"]
