"""Whether probabilities mean what they say: temperature, and the expected calibration error."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

BINS = 15
LIMITS = (0.05, 20.0)
"""Between which temperatures is looked for the best one."""


def to_probabilities(logits: Tensor, temperature: float, multilabel: bool) -> Tensor:
    """Turn logits `(B, K)` into probabilities 0..1 of the same shape.

    Args:
        logits: As the model gives them.
        temperature: What they are divided by, above 0.
        multilabel: Whether each class is decided by itself (sigmoid); otherwise the classes share 1 (softmax).
    """
    scaled = logits / temperature
    return torch.sigmoid(scaled) if multilabel else torch.softmax(scaled, dim=1)


def to_logits(probabilities: Tensor, temperature: float, multilabel: bool) -> Tensor:
    """Turn probabilities `(B, K)` back into finite logits that give them, those of a softmax up to a constant a row."""
    tiny = torch.finfo(probabilities.dtype).tiny
    logits = probabilities.clamp_min(tiny).log()
    return temperature * (logits - (1 - probabilities).clamp_min(tiny).log() if multilabel else logits)


def fit_temperature(logits: Tensor, labels: Tensor, multilabel: bool) -> float:
    """Return the temperature that makes a model's probabilities likeliest on samples it was not trained on.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017: one number for all classes, which changes no
    answer, found by minimising the negative log-likelihood.

    Args:
        logits: `(N, K)` float of the validation set.
        labels: `(N,)` class numbers, or `(N, K)` of 0 and 1.
        multilabel: Whether each class is decided by itself.

    Returns:
        Above 0; above 1 for a model that is too sure of itself. 1 where none can be fitted: no samples, logits that
        are not finite, or answers that are all right (or all worthless), which any still smaller (larger) temperature
        would suit better.
    """
    from scipy.optimize import minimize_scalar  # half a second that predict need not wait for

    scores, targets = logits.detach().double().cpu(), labels.detach().cpu()
    if not scores.numel() or not bool(torch.isfinite(scores).all()):
        return 1.0

    def loss(log_temperature: float) -> float:
        scaled = scores / math.exp(log_temperature)
        if multilabel:
            return float(functional.binary_cross_entropy_with_logits(scaled, targets.double()))
        return float(functional.cross_entropy(scaled, targets.long()))

    # In its logarithm there is one minimum, since the loss is convex in 1 / temperature.
    low, high = (math.log(limit) for limit in LIMITS)
    found = float(minimize_scalar(loss, bounds=(low, high), method="bounded", options={"xatol": 1e-5}).x)
    return 1.0 if loss(found) >= min(loss(low), loss(high), loss(0.0)) else math.exp(found)


class CalibrationError:
    """Accumulates the expected calibration error (Naeini et al., AAAI 2015) over batches, in 15 bins of equal width.

    The mean distance between how sure the answers are and how often they are right, each bin by its share of the
    answers. An answer is the likeliest class and its probability; of several labels each is one, and its probability.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros((3, BINS), dtype=torch.float64)

    def add(self, probabilities: Tensor, labels: Tensor) -> None:
        """Add a batch of probabilities `(B, K)` with labels `(B,)` of class numbers, or `(B, K)` of 0 and 1."""
        if labels.ndim == 2:
            confidence, right = probabilities.flatten().double(), labels.flatten().double()
        else:
            top = probabilities.max(dim=1)
            confidence, right = top.values.double(), (top.indices == labels).double()
        bins = (confidence * BINS).long().clamp(0, BINS - 1)
        for total, values in zip(self._sums, (torch.ones_like(right), confidence, right), strict=True):
            total.index_add_(0, bins, values)

    def compute(self) -> float:
        """Return the error, 0..1; NaN where a probability was, or without samples."""
        counts, confidence, right = self._sums
        return float((confidence - right).abs().sum() / counts.sum())
