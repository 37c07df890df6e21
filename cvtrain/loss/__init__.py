"""Losses; the `loss` group."""

from cvtrain.loss.binary_cross_entropy import BinaryCrossEntropy
from cvtrain.loss.cross_entropy import CrossEntropy
from cvtrain.loss.focal import Focal, FocalBinaryCrossEntropy
from cvtrain.loss.weights import class_weights

__all__ = ["BinaryCrossEntropy", "CrossEntropy", "Focal", "FocalBinaryCrossEntropy", "class_weights"]
