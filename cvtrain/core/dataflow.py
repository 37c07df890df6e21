"""Follow a picture's way through a network by running it once on tensors that have shapes, but no content."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from cvtrain.core.modes import evaluating
from cvtrain.core.quiet import quiet
from cvtrain.errors import ConfigError, Interrupted

BATCH = 3
"""Pictures in the batch: a first dimension that hardly anything else in a network has."""
SIDES = (224, 32, 28, 64, 8, 16, 48, 96, 128, 160, 192, 240, 256, 288, 299, 320, 384, 448, 512)
"""Sides to try, in pixels, where nobody says what the network takes."""


@dataclass
class Value:
    """One tensor on the way from the pictures to the logits.

    Attributes:
        op: Name of the function that made it.
        inputs: Numbers of the values it was made of, without weights and constants.
        operands: For each tensor argument: the value's number, None for weights and constants; and its shape.
        ancestors: Bit i is set if it depends on value i, itself included.
        depth: The most operations with weights on a way from the pictures.
        shape: Its shape.
        several: Whether it stands for the several tensors that one call returned.
        modules: Paths of the modules that returned it, in the order in which they returned.
        uses: How many values were made of it.
    """

    op: str
    inputs: list[int]
    operands: list[tuple[int | None, tuple[int, ...]]]
    ancestors: int
    depth: int
    shape: tuple[int, ...]
    several: bool = False
    modules: list[str] = field(default_factory=list)
    uses: int = 0


class Dataflow(TorchFunctionMode):
    """Records every function of torch that works on what came from the pictures.

    Attributes:
        values: In the order in which they were made, so inputs stand before what is made of them.
        calls: Paths of the modules in the order in which they returned, one entry a call.
        spans: For each module's first call, how many values there were when it began and when it returned.
        first_use: For each parameter's `id`, the number of the value that was the first to be made with it.
        output: Number of the value that is the logits; with several outputs the first.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values: list[Value] = []
        self.calls: list[str] = []
        self.spans: dict[str, tuple[int, int]] = {}
        self.first_use: dict[int, int] = {}
        self.output = 0
        self._numbers: dict[int, int] = {}
        self._weights: set[int] = set()
        self._alive: list[Tensor] = []  # a tensor's id is its own only while it lives

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - whatever `func` returns
        """Call `func` and record what it made."""
        given = list(tensors_in([args, kwargs]))
        operands = [(self._numbers.get(id(t)), tuple(t.shape)) for t in given]
        weighted = any(isinstance(t, nn.Parameter) or id(t) in self._weights for t in given)
        # In evaluation it changes no shape; its fake takes a third of the time of a whole network.
        result = torch.empty_like(given[0]) if func is batch_norm else func(*args, **(kwargs or {}))
        made = list(tensors_in(result))
        if made:  # not `weight.shape` and the like
            for parameter in given:
                if isinstance(parameter, nn.Parameter):
                    self.first_use.setdefault(id(parameter), len(self.values))
        if not any(number is not None for number, _ in operands):
            if weighted:  # such as standardised weights
                self._weights.update(id(t) for t in made)
                self._alive += made
        elif isinstance(result, Tensor):
            self._add(result, getattr(func, "__name__", ""), operands, weighted)
        elif made:
            whole = self._add(None, getattr(func, "__name__", ""), operands, weighted)
            for tensor in made:
                self._add(tensor, "item", [(whole, ())], False)
        return result

    def begin(self, images: Tensor) -> None:
        """Take `images` for the pictures."""
        self._add(images, "input", [], False)

    def end(self, output: object) -> None:
        """Take the first tensor in `output` for the logits.

        Raises:
            ValueError: It was not made of the pictures.
        """
        numbers = [self._numbers[id(t)] for t in tensors_in(output) if id(t) in self._numbers]
        if not numbers:
            raise ValueError("its output was not made of the pictures by functions of torch")
        self.output = numbers[0]

    def watch(self, path: str, module: nn.Module) -> list[RemovableHandle]:
        """Note when `module` is called and what it returns."""
        begun: list[int] = []

        def enter(_module: nn.Module, _inputs: object) -> None:
            begun.append(len(self.values))

        def leave(_module: nn.Module, _inputs: object, output: object) -> None:
            self.calls.append(path)
            self.spans.setdefault(path, (begun.pop(), len(self.values)))
            number = self._numbers.get(id(output))
            if number is not None:
                self.values[number].modules.append(path)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _add(
        self, tensor: Tensor | None, op: str, operands: list[tuple[int | None, tuple[int, ...]]], weighted: bool
    ) -> int:
        number = len(self.values)
        inputs = sorted({i for i, _ in operands if i is not None})
        ancestors, depth = 1 << number, 0
        for i in inputs:
            ancestors |= self.values[i].ancestors
            depth = max(depth, self.values[i].depth)
            self.values[i].uses += 1
        shape = () if tensor is None else tuple(tensor.shape)
        self.values.append(Value(op, inputs, operands, ancestors, depth + weighted, shape, several=tensor is None))
        if tensor is not None:
            self._numbers[id(tensor)] = number
            self._alive.append(tensor)
        return number


def dataflow(model: nn.Module, shape: tuple[int, int, int] | None = None) -> Dataflow:
    """Run `model` in evaluation on a batch of empty pictures and return what happened; the model stays as it was.

    Args:
        model: A classifier.
        shape: Channels, height and width that it takes; None: those of its first convolution, and common sides.

    Raises:
        ConfigError: The model refuses such a batch, or its way depends on the content.
    """
    if shape is not None:
        sides: Sequence[tuple[int, int]] = [shape[1:]]
        channels = shape[0]
    else:
        sides = [(side, side) for side in SIDES]
        channels = next((m.in_channels for m in model.modules() if isinstance(m, nn.Conv2d)), 3)
    failure: Exception | None = None
    for height, width in sides:
        try:
            return _run(model, (BATCH, channels, height, width))
        except Interrupted:
            raise
        except Exception as error:  # a model raises what it likes
            failure = failure or error
    reason = str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
    raise ConfigError(f"{type(model).__name__} cannot be followed from pictures to logits ({reason}).") from failure


def _run(model: nn.Module, shape: tuple[int, ...]) -> Dataflow:
    flow = Dataflow()
    first = next(model.parameters(), None)
    handles = [handle for path, module in model.named_modules() if path for handle in flow.watch(path, module)]
    try:
        # Quiet, as torch logs what it refuses.
        with evaluating(model), quiet(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), flow:
            images = torch.empty(shape, device=None if first is None else first.device)
            flow.begin(images)
            flow.end(model(images))
    finally:
        for handle in handles:
            handle.remove()
    return flow


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and dictionaries, such as what a module returns."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
