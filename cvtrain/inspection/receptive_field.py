"""Which part of the picture a value in a network can see, found by following the picture's way through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from cvtrain.core.dataflow import Dataflow
from cvtrain.inspection.spans import Axes, Call, Field, Rule, Span, resampled
from cvtrain.inspection.view_rules import NONE, VIEWS


class ReceptiveFields(Dataflow):
    """Follows what each value sees of the picture, along all ways at once.

    Behind a window of size k, stride s and dilation d a field of r pixels, moving by j, is one of r + (k - 1)·d·j,
    moving by j·s (Araujo, Norris & Sim, "Computing receptive fields of convolutional neural networks", Distill 2019).
    Where ways meet, the field is the smallest rectangle around those of all. What mixes all places (attention, also
    in windows; a mean over the map; norms that are no batch norm; a linear layer over places) sees the whole picture.

    Attributes:
        fields: What each of `values` sees; None for one that stands for several tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.fields: list[Field | None] = []

    def begin(self, images: Tensor) -> None:
        """Take `images`, `(B, C, H, W)`, for the pictures."""
        super().begin(images)
        spans = tuple(Span(0, 0, 1, side) for side in images.shape[2:])
        self.fields.append(Field(spans, (NONE, NONE, *(Axes({i}) for i in range(len(spans))))))

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever `func` returns
        """Call `func`, and work out what the result sees."""
        before = len(self.values)
        result = super().__torch_function__(func, types, args, kwargs)
        made = self.values[before:]
        for value in made:
            operands = [(None if number is None else self.fields[number], shape) for number, shape in made[0].operands]
            call = Call(func, made[0].op, args, kwargs or {}, operands, value.shape)
            self.fields.append(None if value.several else _field(call))
        return result

    def of(self, tensor: Tensor) -> Field | None:
        """Return what a value sees; None for one that was not made of the pictures."""
        number = self._numbers.get(id(tensor))
        return None if number is None else self.fields[number]


def _field(call: Call) -> Field:
    rule = None if call.op.startswith("fft") else RULES.get(call.op, _pointwise)
    return (rule and rule(call)) or _anything(call)


def _pointwise(call: Call) -> Field | None:
    """Unite what the operands see, broadcast to the result's shape."""
    aligned: list[Field] = []
    for field, shape in call.seeing:
        axes = [NONE] * len(call.out)
        if len(shape) > len(call.out):
            return None
        for d in range(1, len(shape) + 1):
            if shape[-d] == call.out[-d]:
                axes[-d] = field.axes[-d]
            elif shape[-d] != 1:
                return None
        aligned.append(replace(field, axes=tuple(axes)))
    return _united(aligned)


def _united(fields: Sequence[Field]) -> Field:
    """Return the field around `fields`, whose tensors have equal ranks."""
    axes = tuple(NONE.union(*each) for each in zip(*(field.axes for field in fields), strict=True))
    spans = []
    for axis in range(len(fields[0].spans)):
        parts = [field.spans[axis] for field in fields]
        there = [field.spans[axis] for field in fields if axis in NONE.union(*field.axes)]
        step = max(there or parts, key=lambda span: span.jump)
        first, last = min(part.first for part in parts), max(part.last for part in parts)
        # One value for all places, met by a map: each place then sees whatever that value sees.
        beyond = there and len(there) < len(parts)
        spans.append(step.whole() if beyond else replace(step, first=first, last=last))
    return Field(tuple(spans), axes)


def _anything(call: Call) -> Field:
    """Return a field for a result that may depend on everything, its places guessed by the shape."""
    spans = max((field.spans for field, _ in call.seeing), key=lambda spans: sum(span.jump for span in spans))
    axes = [NONE] * len(call.out)
    n, counts = len(spans), tuple(span.count for span in spans)
    starts = [d for d in range(len(call.out) - n, 0, -1) if call.out[d : d + n] == counts]
    if starts and math.prod(counts) > 1:
        axes[starts[0] : starts[0] + n] = [Axes({i}) for i in range(n)]
    return Field(tuple(span.whole() for span in spans), tuple(axes))


def _repeated(value: Any, times: int) -> list[Any]:  # noqa: ANN401 - a number or a sequence of them
    several = isinstance(value, (list, tuple))
    return list(value) if several and len(value) == times else [value[0] if several else value] * times


def _dimensions(call: Call) -> int:
    return next(int(sign) for sign in call.op if sign.isdigit())


def _convolution(call: Call) -> Field | None:
    (field, shape), (dynamic, weight) = call.operands[:2]
    if field is None or dynamic is not None:
        return None
    n = _dimensions(call)
    stride, dilation = (_repeated(call.argument(i, name, 1), n) for i, name in ((3, "stride"), (5, "dilation")))
    reach = [(k - 1) * d for k, d in zip(weight[-n:], dilation, strict=True)]
    padding = call.argument(4, "padding", 0)
    named = {"same": [r // 2 for r in reach], "valid": [0] * n}
    before = named[padding] if isinstance(padding, str) else _repeated(padding, n)
    windows = [(s, -p, r - p) for s, p, r in zip(stride, before, reach, strict=True)]
    return field.mixed([len(shape) - n - 1], shape).slid(windows, call.out)


def _pool(call: Call) -> Field | None:
    field, n = call.seeing[0][0], _dimensions(call)
    kernel = _repeated(call.argument(1, "kernel_size"), n)
    stride = _repeated(call.argument(2, "stride") or kernel, n)
    padding = _repeated(call.argument(3, "padding", 0), n)
    dilation = _repeated(call.argument(4, "dilation", 1) if call.op.startswith("max") else 1, n)
    return field.slid(
        [(s, -p, (k - 1) * d - p) for s, p, k, d in zip(stride, padding, kernel, dilation, strict=True)], call.out
    )


def _adaptive_pool(call: Call) -> Field | None:
    (field, shape), n = call.seeing[0], _dimensions(call)
    pooled = [len(shape) - d for d in range(n, 0, -1) if call.out[-d] == 1]
    windows = [resampled(size, count) for size, count in zip(shape[-n:], call.out[-n:], strict=True)]
    return field.mixed(pooled, shape).slid(windows, call.out)


def _interpolate(call: Call) -> Field | None:
    field, shape = call.seeing[0]
    taps = {"nearest": (0, 0), "bilinear": (0, 1), "bicubic": (-1, 2)}.get(call.argument(3, "mode", "nearest"))
    if taps is None or call.argument(6, "antialias", False):
        return None
    return field.slid([resampled(*pair, taps) for pair in zip(shape[2:], call.out[2:], strict=True)], call.out)


def _linear(call: Call) -> Field | None:
    (field, shape), (dynamic, _) = call.operands[:2]
    if field is None or dynamic is not None:
        return None
    mixed = field.mixed([len(shape) - 1], shape)
    return replace(mixed, axes=(*mixed.axes[:-1], NONE))


def _product(call: Call) -> Field | None:
    """Matrix products; two factors that both see the picture are taken for attention."""
    (left, left_shape), (right, right_shape) = call.operands[:2]
    if len(left_shape) != len(right_shape) or len(left_shape) < 2:
        return None
    if right is None:
        return _linear(call)
    if left is None:
        mixed = right.mixed([len(right_shape) - 2], right_shape)
        return replace(mixed, axes=(*mixed.axes[:-2], NONE, mixed.axes[-1]))
    return Field(tuple(span.whole() for span in left.spans), (*left.axes[:-1], right.axes[-1]))


def _attention(call: Call) -> Field | None:
    query, shape = call.operands[0]
    if query is None or shape[:-1] != call.out[:-1]:
        return None
    return replace(query, spans=tuple(span.whole() for span in query.spans))


def _reduction(call: Call) -> Field | None:
    if len(call.operands) > 1:  # the larger of two tensors
        return _pointwise(call)
    field, shape = call.seeing[0]
    if len(shape) == len(call.out):
        return field.mixed([d for d in range(len(shape)) if shape[d] != call.out[d]], shape)
    dims = call.argument(1, "dim")
    reduced = _dims(dims, shape)
    if len(shape) - len(reduced) != len(call.out):
        return None
    mixed = field.mixed(reduced, shape)
    return replace(mixed, axes=tuple(mixed.axes[d] for d in range(len(shape)) if d not in reduced))


def _dims(given: Any, shape: Sequence[int]) -> list[int]:  # noqa: ANN401 - a number, some, or None for all
    every = range(len(shape)) if given is None else given if isinstance(given, (list, tuple)) else [given]
    return [d % len(shape) for d in every]


def _along(position: int, default: int | None = None) -> Rule:
    """Return the rule of a function that mixes along the dimensions it is given, such as a softmax."""

    def rule(call: Call) -> Field | None:
        field, shape = call.seeing[0]
        given = call.argument(position, "dim", call.kwargs.get("dims", default))
        return field.mixed(_dims(given, shape), shape, places_stay=True) if shape == call.out else None

    return rule


def _norm(call: Call) -> Field | None:
    field, shape = call.seeing[0]
    # Of a group, or of a picture: over its channels and all places.
    count = len(call.argument(1, "normalized_shape")) if "group" not in call.op else len(shape) - 1
    return field.mixed(range(len(shape) - count, len(shape)), shape, places_stay=True)


def _joined(call: Call) -> Field | None:
    return _united([field for field, _ in call.seeing])


def _stacked(call: Call) -> Field | None:
    field, dim = _united([field for field, _ in call.seeing]), call.argument(1, "dim", 0) % len(call.out)
    return replace(field, axes=(*field.axes[:dim], NONE, *field.axes[dim:]))


RULES: dict[str, Rule] = {
    **VIEWS,
    **{f"conv{n}d": _convolution for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _pool for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _adaptive_pool for kind in ("max", "avg") for n in (1, 2, 3)},
    "interpolate": _interpolate,
    "linear": _linear,
    **dict.fromkeys(("matmul", "__matmul__", "bmm", "mm"), _product),
    **dict.fromkeys(("scaled_dot_product_attention", "multi_head_attention_forward"), _attention),
    **dict.fromkeys(("baddbmm", "addmm", "einsum", "grid_sample", "unfold", "fold"), _anything),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "std", "var", "var_mean", "prod"), _reduction),
    **dict.fromkeys(("softmax", "log_softmax", "cumsum", "flip", "index_select"), _along(1)),
    **{"normalize": _along(2, default=1), "sort": _along(1, default=-1), "roll": _along(2)},
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm"), _norm),
    "instance_norm": lambda call: call.seeing[0][0].mixed(range(2, len(call.out)), call.out, places_stay=True),
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "stack": _stacked,
}
"""How each function that does not work on every place by itself changes what is seen; the others are pointwise."""
