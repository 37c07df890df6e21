"""What becomes of training targets between mixing and the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from cvtrain.regularizer.base import Regularizer


def prepared(
    targets: Tensor, class_weights: Tensor | None, regularizers: Sequence[Regularizer]
) -> tuple[Tensor, Tensor | None]:
    """Weight the classes of mixed targets, then soften them.

    In this order, so that each picture's whole loss gets the weight of its own class: were softened targets weighted,
    the ε/K of label smoothing that a frequent class gives to a rare one would count a hundred times as much, and
    outweigh the class itself. A mixed picture is a share of one and a share of another, each with its own weight.

    Args:
        targets: `(..., M)` probabilities, mixed but not smoothed.
        class_weights: Above 0, shaped to multiply `targets`; None: all 1.
        regularizers: Soften rows `(N, M)`, in order.

    Returns:
        `(..., M)` probabilities, and the weight `(...)` of each loss, None where all weigh 1.
    """
    weight = None
    if class_weights is not None:
        targets = targets * class_weights
        weight = targets.sum(-1)
        targets = targets / weight[..., None]
    rows = targets.flatten(0, -2)
    for regularizer in regularizers:
        rows = regularizer.soften(rows)
    return rows.view_as(targets), weight
