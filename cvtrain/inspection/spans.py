"""What a place of a feature map sees of the picture, along each axis of the picture."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

Number = int | float | Fraction
Window = tuple[Number, Number, Number]
"""Places from one window to the next, and the first and the last place seen, relative to that."""
Axes = frozenset[int]


@dataclass(frozen=True)
class Span:
    """Pixels along one axis of the picture: place i of a map sees those from first + i·jump to last + i·jump.

    Attributes:
        first: In pixels, below 0 where the padding is seen; -inf for the whole picture.
        last: In pixels, included; inf for the whole picture.
        jump: Pixels from one place to the next.
        count: Places.
    """

    first: Number
    last: Number
    jump: Number
    count: int

    @property
    def size(self) -> int | None:
        """Return how many pixels a place sees, padding included; None for the whole picture."""
        size = self.last - self.first + 1
        return None if size == math.inf else math.ceil(size)

    def whole(self) -> Span:
        """Return the same places, seeing the whole picture."""
        return replace(self, first=-math.inf, last=math.inf)

    def slid(self, window: Window, count: int) -> Span:
        """Return what the `count` places of a window sliding over these see."""
        step, low, high = window
        return Span(self.first + low * self.jump, self.last + high * self.jump, self.jump * step, count)


@dataclass(frozen=True)
class Field:
    """What each value of a tensor sees of the picture.

    Attributes:
        spans: One for each axis of the picture, rows and columns.
        axes: For each dimension of the tensor, the axes of the picture whose places it runs over; empty for channels.
    """

    spans: tuple[Span, ...]
    axes: tuple[Axes, ...]

    @property
    def size(self) -> tuple[int | None, ...]:
        """Return height and width in pixels, padding included; None for the whole picture."""
        return tuple(span.size for span in self.spans)

    @property
    def stride(self) -> tuple[float, ...] | None:
        """Return the pixels from one place to the next, down and across; None where the tensor has no places."""
        if Axes().union(*self.axes) != Axes(range(len(self.spans))):
            return None
        return tuple(float(span.jump) for span in self.spans)

    def mixed(self, dims: Iterable[int], shape: Sequence[int], places_stay: bool = False) -> Field:
        """Return the field after something that takes in all places along `dims` of a tensor of `shape`.

        Args:
            dims: From 0.
            shape: The tensor's.
            places_stay: Whether there is still one value for each place, as behind a softmax.
        """
        dims = [d for d in dims if self.axes[d] and shape[d] > 1]
        hit = Axes().union(*(self.axes[d] for d in dims))
        spans = tuple(span.whole() if axis in hit else span for axis, span in enumerate(self.spans))
        if places_stay:
            return Field(spans, self.axes)
        rest = tuple(Axes() if d in dims else axes for d, axes in enumerate(self.axes))
        # Places that had been divided, such as squares of pixels made channels: the rest of them lie further apart.
        for axis in hit:
            left = [shape[d] for d, axes in enumerate(rest) if axes == {axis}]
            if len(left) == 1 and left[0] != spans[axis].count:
                jump = spans[axis].jump * Fraction(spans[axis].count, left[0])
                spans = tuple(replace(s, jump=jump, count=left[0]) if i == axis else s for i, s in enumerate(spans))
        return Field(spans, rest)

    def slid(self, windows: Sequence[Window], out: Sequence[int]) -> Field:
        """Return the field behind windows over the last dimensions.

        Args:
            windows: One for each of the last dimensions.
            out: Shape of the result.
        """
        spans = list(self.spans)
        for back, window in enumerate(reversed(windows), start=1):
            axes = self.axes[-back]
            for axis in axes:
                if len(axes) == 1:
                    spans[axis] = spans[axis].slid(window, out[-back])
                elif window != (1, 0, 0):  # over places in a row, which are no neighbours
                    spans[axis] = spans[axis].whole()
        return replace(self, spans=tuple(spans))


def resampled(size: int, count: int, taps: tuple[int, int] | None = None) -> Window:
    """Return the window around all that are seen when `size` places become `count`.

    Args:
        size: Places before.
        count: Places after.
        taps: The places seen around the nearest one on the left, for interpolation; None: bins, for adaptive pooling.
    """
    step = Fraction(size, count)
    lows: list[Fraction] = []
    highs: list[Fraction] = []
    for i in range(count):
        if taps is None:
            low, high = math.floor(i * step), math.ceil((i + 1) * step) - 1
        else:
            centre = i * step if taps == (0, 0) else (i + Fraction(1, 2)) * step - Fraction(1, 2)
            low, high = math.floor(centre) + taps[0], math.floor(centre) + taps[1]
        lows.append(low - i * step)
        highs.append(high - i * step)
    return (1, 0, 0) if size == count else (step, min(lows), max(highs))


@dataclass(frozen=True)
class Call:
    """A function of torch that was called on something made of the pictures.

    Attributes:
        func: The function.
        op: Its name.
        args: Positional arguments, tensors among them.
        kwargs: The others.
        operands: What each tensor among them sees, None for weights and constants; and its shape.
        out: Shape of the result.
    """

    func: Callable[..., Any]
    op: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    operands: Sequence[tuple[Field | None, tuple[int, ...]]]
    out: tuple[int, ...]

    def argument(self, position: int, name: str, default: Any = None) -> Any:  # noqa: ANN401 - any argument
        """Return an argument, however it was given."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    @property
    def seeing(self) -> list[tuple[Field, tuple[int, ...]]]:
        """Return the operands that see the picture."""
        return [(field, shape) for field, shape in self.operands if field is not None]


Rule = Callable[[Call], Field | None]
"""Returns what the result of a call sees; None where it cannot tell."""
