"""Losses; the `loss` group."""

from cvtrain.loss.cross_entropy import CrossEntropy

__all__ = ["CrossEntropy"]
