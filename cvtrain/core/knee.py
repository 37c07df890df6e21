"""Where a trade-off curve begins to fall."""

from __future__ import annotations

from collections.abc import Sequence

from cvtrain.core.artifact import TradeOff

MAX_DROP = 0.01
"""Accuracy that a stage may lose, 0..1: one point."""


def knee(points: Sequence[TradeOff]) -> int:
    """Return the position of the last stage that is at most one point less accurate than the model before.

    The point farthest from the chord between the curve's ends (Satopää et al., "Finding a 'kneedle' in a haystack",
    ICDCSW 2011) would also be found on a curve that nowhere falls, out of its noise, and on one that falls late it lies
    behind the loss; this one answers what one asks the curve: how far may I go?

    Args:
        points: From the model before to the last stage, one or more.

    Returns:
        Position in `points`; 0 where every stage costs more than a point.
    """
    least = points[0].accuracy - MAX_DROP - 1e-9  # what is one point on paper may be a little more in binary
    return max(i for i, point in enumerate(points) if point.accuracy >= least)
