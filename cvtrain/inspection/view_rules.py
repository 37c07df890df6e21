"""How functions that only move values about change which dimension runs over the places of the picture."""

from __future__ import annotations

from dataclasses import replace

import torch

from cvtrain.inspection.spans import Axes, Call, Field, Rule

NONE = Axes()


def _reshaped(call: Call) -> Field | None:
    """Reshape by the shapes alone: a run of old dimensions becomes a run of new ones with the same product."""
    (field, old), new = call.seeing[0], call.out
    axes = [NONE] * len(new)
    i = j = 0
    while i < len(old) and j < len(new):
        i_from, j_from, before, after = i, j, old[i], new[j]
        i, j = i + 1, j + 1
        while before != after:
            if before < after:
                before, i = before * old[i], i + 1
            else:
                after, j = after * new[j], j + 1
        if i - i_from == j - j_from == 1:
            axes[j_from] = field.axes[i_from]
            continue
        found = NONE.union(*(field.axes[d] for d in range(i_from, i) if old[d] > 1))
        axes[j_from:j] = [found if new[d] > 1 else NONE for d in range(j_from, j)]
    # Places in a row, or in windows, that are spread out into rows and columns again.
    merged = [d for d in range(len(new)) if len(axes[d]) > 1]
    if [new[d] for d in merged] == [span.count for span in field.spans]:
        for axis, d in enumerate(merged):
            axes[d] = Axes({axis})
    return replace(field, axes=tuple(axes))


def _permuted(call: Call) -> Field | None:
    """Permute as the function itself does it to a tensor whose sides are all different."""
    field, shape = call.seeing[0]
    probe = call.func(torch.empty(tuple(range(2, 2 + len(shape))), device="meta"), *call.args[1:], **call.kwargs)
    return replace(field, axes=tuple(field.axes[side - 2] for side in probe.shape))


def _attribute(call: Call) -> Field | None:
    """`x.T`, `x.mT`, `x.data` and the like."""
    return _permuted(replace(call, args=call.args[:1])) if len(call.seeing[0][1]) == len(call.out) else None


def _cut(call: Call) -> Field | None:
    """Parts along one dimension."""
    field, shape = call.seeing[0]
    if len(shape) != len(call.out):
        return None
    return field.mixed([d for d in range(len(shape)) if shape[d] != call.out[d]], shape, places_stay=True)


def _taken(call: Call) -> Field | None:
    """One index of a dimension, which disappears."""
    field, shape = call.seeing[0]
    dim = call.argument(1, "dim", 0) % len(shape)
    mixed = field.mixed([dim], shape)
    return replace(mixed, axes=mixed.axes[:dim] + mixed.axes[dim + 1 :])


def _padded(call: Call) -> Field | None:
    before = list(call.argument(1, "pad"))[::2]
    return call.seeing[0][0].slid([(1, -p, -p) for p in reversed(before)], call.out)


def _indexed(call: Call) -> Field | None:
    """`x[…]` with slices, whole numbers, None and an ellipsis."""
    field, shape = call.seeing[0]
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if not all(item is None or item is ... or type(item) in (int, slice) for item in index):
        return None
    named = sum(item is not None and item is not ... for item in index)
    at = index.index(...) if ... in index else len(index)
    axes: list[Axes] = []
    d = 0
    for item in (*index[:at], *[slice(None)] * (len(shape) - named), *index[at + 1 :]):
        if item is None:
            axes.append(NONE)
            continue
        if isinstance(item, int):
            field = field.mixed([d], shape)
        else:
            axes.append(field.axes[d])
            start, stop, step = item.indices(shape[d])
            if len(field.axes[d]) == 1:
                (axis,) = field.axes[d]
                spans = list(field.spans)
                spans[axis] = spans[axis].slid((step, start, start), len(range(start, stop, step)))
                field = replace(field, spans=tuple(spans))
        d += 1
    return Field(field.spans, tuple(axes))


def _unshuffled(call: Call) -> Field | None:
    """Squares of pixels that become channels."""
    factor = call.argument(1, "downscale_factor")
    return call.seeing[0][0].slid([(factor, 0, factor - 1)] * 2, call.out)


VIEWS: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"), _reshaped),
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t"), _permuted),
    "__get__": _attribute,
    **dict.fromkeys(("chunk", "split", "tensor_split", "narrow"), _cut),
    **dict.fromkeys(("unbind", "select"), _taken),
    "pad": _padded,
    "__getitem__": _indexed,
    "pixel_unshuffle": _unshuffled,
}
"""Rules of functions of one tensor that move its values about."""
