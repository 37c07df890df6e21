"""A network on paper: what each layer returns, weighs, computes and sees, and what training it takes of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from cvtrain.core.complexity import counting
from cvtrain.core.dataflow import tensors_in
from cvtrain.core.modes import modes_kept
from cvtrain.core.stages import Stage
from cvtrain.errors import ConfigError
from cvtrain.inspection.receptive_field import ReceptiveFields
from cvtrain.inspection.spans import Field

Shape = tuple[int, int, int]
Found = TypeVar("Found")
NOT_RUN = "not run"
"""Kind of a layer whose parameters the evaluation does not use, such as those of an auxiliary head."""


@dataclass(frozen=True)
class Layer:
    """One call of a module that computes something itself.

    Attributes:
        path: The module's; empty for the network itself.
        kind: Its class.
        shape: Of what it returns for one picture.
        params: Its parameters; 0 when it is called again.
        frozen: Those of them that do not train.
        macs: Multiply-accumulates for one picture, in convolutions, matrix products and attention.
        activation_bytes: Memory that its result takes for one picture; 0 where it lies in an earlier one's.
        field: What its result sees of the picture; None for what was not made of it.
        stage: Name of its stage; empty where there are none.
    """

    path: str
    kind: str
    shape: tuple[int, ...]
    params: int
    frozen: int
    macs: int
    activation_bytes: int
    field: Field | None
    stage: str = ""

    @property
    def stride(self) -> tuple[float, ...] | None:
        """Return the pixels between two neighbouring places, down and across; None where there are no places."""
        return None if self.field is None else self.field.stride


@dataclass(frozen=True)
class Memory:
    """Bytes that a training step keeps; temporary memory inside of operations comes on top.

    Attributes:
        batch_size: Pictures.
        weights: Parameters and buffers.
        gradients: Of what trains.
        optimizer: Its state.
        activations: What the forward pass keeps for the backward one, the pictures included.
    """

    batch_size: int
    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Return the sum."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Summary:
    """A network on paper.

    Attributes:
        name: What it is called.
        input: Channels, height and width of a picture.
        layers: In the order in which they run, those that do not run last.
        memory: Of a training step.
    """

    name: str
    input: Shape
    layers: Sequence[Layer]
    memory: Memory

    @property
    def params(self) -> int:
        """Return the number of parameters."""
        return sum(layer.params for layer in self.layers)

    @property
    def trainable(self) -> int:
        """Return the number of those that train."""
        return self.params - sum(layer.frozen for layer in self.layers)

    @property
    def macs(self) -> int:
        """Return the multiply-accumulates for one picture."""
        return sum(layer.macs for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Return the memory that all layers' results take for one picture."""
        return sum(layer.activation_bytes for layer in self.layers)

    @property
    def maps(self) -> list[Layer]:
        """Return the layers that tell places of the picture apart; where none has several places, those with one."""
        maps = [layer for layer in self.layers if layer.stride is not None]
        return [layer for layer in maps if layer.field and any(span.count > 1 for span in layer.field.spans)] or maps

    @property
    def receptive_field(self) -> tuple[int | None, ...] | None:
        """Return height and width of what the last feature map sees at a place: the most that any map sees.

        In pixels, None for the whole picture; None altogether for a network without maps.
        """
        sizes = [layer.field.size for layer in self.maps if layer.field]
        sides = [[side for side in axis if side is not None] for axis in zip(*sizes, strict=True)]
        return tuple(max(side) if len(side) == len(sizes) else None for side in sides) or None


def trace(model: nn.Module, shape: Shape) -> list[Layer]:
    """Run `model` once on an empty picture and return its layers; the model stays as it was.

    The picture has a shape but no content, so that this takes no arithmetic; a model that does not go without content
    is run on zeros.

    Args:
        model: On any device.
        shape: Channels, height and width.

    Raises:
        ConfigError: The model does not take such a picture.
    """
    return _followed(model, shape, lambda empty: _trace(model, shape, empty))


def kept_bytes(
    model: nn.Module,
    shape: Shape,
    batch_size: int,
    autocast: torch.dtype | None = None,
    train: Callable[[nn.Module], object] = nn.Module.train,
) -> int:
    """Return how many bytes the forward pass of a training step keeps for the backward pass.

    Counted is all that autograd saves, shared memory once, without the model's own parameters and buffers.

    Args:
        model: On any device; stays as it was.
        shape: Channels, height and width of a picture.
        batch_size: Pictures, 2 or more.
        autocast: Type that the forward pass computes in where it may; None: that of the weights.
        train: Puts the model into training mode, or the part of it that trains.

    Raises:
        ConfigError: The model does not take such pictures.
    """

    def kept(count: int) -> int:
        return _followed(model, shape, lambda empty: _kept(model, (count, *shape), autocast, train, empty))

    # Two small batches tell what each picture adds: a model that needs content is not run on a large one.
    two, four = kept(2), kept(4)
    return two + (batch_size - 2) * (four - two) // 2


def in_stages(layers: Sequence[Layer], stages: Sequence[Stage]) -> list[Layer]:
    """Return the layers with the names of their stages, stage by stage; one between two belongs to the former."""
    owners = {name.rpartition(".")[0]: stage.name for stage in reversed(stages) for name in stage.parameters}
    owners |= {path: stage.name for stage in stages for path in stage.modules}
    named: list[Layer] = []
    current = stages[0].name
    for layer in layers:
        parts = layer.path.split(".")
        above = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        current = next((owners[path] for path in above if path in owners), current)
        named.append(replace(layer, stage=current))
    order = [stage.name for stage in stages]
    return sorted(named, key=lambda layer: order.index(layer.stage))


def _followed(model: nn.Module, shape: Shape, run: Callable[[bool], Found]) -> Found:
    """Run on tensors without content, or where that fails on real ones."""
    try:
        return run(True)
    except Exception:  # a model raises what it likes
        try:
            return run(False)
        except Exception as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"{type(model).__name__} does not take pictures of {'×'.join(map(str, shape))} ({reason}).\n"
                "Set another img_size or in_channels, or choose another model."
            ) from error


def _trace(model: nn.Module, shape: Shape, empty: bool) -> list[Layer]:
    flow, counter = ReceptiveFields(), FlopCounterMode(display=False)
    watch = _Watch(model, flow, counter.get_total_flops)
    with counting(model), watch.on(model), _contents(empty), counter, flow:
        images = _pictures(model, (1, *shape))
        flow.begin(images)
        watch.is_new(images)
        model(images)
    return watch.finished(model)


def _contents(empty: bool) -> FakeTensorMode | nullcontext[None]:
    return FakeTensorMode(allow_non_fake_inputs=True) if empty else nullcontext()


def _pictures(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    first = next(model.parameters(), torch.empty(0))
    return torch.zeros(shape, dtype=first.dtype, device=first.device)


@dataclass
class _Call:
    """A module that has not returned yet: operations counted before it began, and in modules inside it."""

    began: int
    inside: int = 0


class _Watch:
    """Notes a layer whenever a module returns that computes something itself."""

    def __init__(self, model: nn.Module, flow: ReceptiveFields, flops: Callable[[], int]) -> None:
        self.layers: list[Layer] = []
        self._frozen = {id(parameter) for parameter in model.parameters() if not parameter.requires_grad}
        self._flow = flow
        self._flops = flops
        self._open: list[_Call] = []
        self._storages: dict[int, Tensor] = {}  # a storage's address is its own only while it lives
        self._counted: set[int] = set()

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Watch all modules of `model` for a while."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(lambda *_: self._open.append(_Call(self._flops()))))
            handles.append(module.register_forward_hook(lambda m, _, output, path=path: self._leave(path, m, output)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def is_new(self, tensor: Tensor) -> bool:
        """Return whether no earlier result lies in the same memory, and remember it."""
        key = tensor.untyped_storage()._cdata
        known = key in self._storages
        self._storages.setdefault(key, tensor)
        return not known

    def finished(self, model: nn.Module) -> list[Layer]:
        """Return the layers, and behind them those that have parameters but did not run."""
        rows = {layer.path: i for i, layer in reversed(list(enumerate(self.layers)))}
        for path, module in model.named_modules():
            params, frozen = self._params(module)
            above = rows.get(path.rpartition(".")[0])
            if params and above is not None and self.layers[above].path:  # used by the module that it belongs to
                layer = self.layers[above]
                self.layers[above] = replace(layer, params=layer.params + params, frozen=layer.frozen + frozen)
            elif params:
                self.layers.append(Layer(path, f"{type(module).__name__}, {NOT_RUN}", (), params, frozen, 0, 0, None))
        return self.layers

    def _leave(self, path: str, module: nn.Module, output: object) -> None:
        call = self._open.pop()
        flops = self._flops() - call.began
        if self._open:
            self._open[-1].inside += flops
        own = flops - call.inside
        leaf = next(module.children(), None) is None and not isinstance(module, nn.Identity)
        owns = next(module.parameters(recurse=False), None) is not None
        results = list(tensors_in(output))
        if not results or not (leaf or own or owns):
            return
        new = sum(result.numel() * result.element_size() for result in results if self.is_new(result))
        shape, field = tuple(results[0].shape[1:]), self._flow.of(results[0])
        self.layers.append(Layer(path, type(module).__name__, shape, *self._params(module), own // 2, new, field))

    def _params(self, module: nn.Module) -> tuple[int, int]:
        """Return how many parameters of the module's own there are that were not counted before, and are frozen."""
        own = [p for p in module.parameters(recurse=False) if id(p) not in self._counted]
        self._counted.update(map(id, own))
        return sum(p.numel() for p in own), sum(p.numel() for p in own if id(p) in self._frozen)


def _kept(
    model: nn.Module,
    shape: tuple[int, ...],
    autocast: torch.dtype | None,
    train: Callable[[nn.Module], object],
    empty: bool,
) -> int:
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> None:
        saved.setdefault(tensor.untyped_storage()._cdata, tensor)

    def unpack(_: None) -> Tensor:
        raise RuntimeError("there is no backward pass here")

    try:
        with modes_kept(model), torch.random.fork_rng(devices=[]), _contents(empty) as mode:
            train(model)
            own = [*model.parameters(), *model.buffers()]
            if isinstance(mode, FakeTensorMode):  # a transposed weight is a view of its stand-in
                own += [mode.from_tensor(tensor) for tensor in own]
            lower = torch.autocast(_pictures(model, (0,)).device.type, dtype=autocast) if autocast else nullcontext()
            with torch.enable_grad(), lower, saved_tensors_hooks(pack, unpack):
                model(_pictures(model, shape))
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
    theirs = {tensor.untyped_storage()._cdata for tensor in own}
    return sum(tensor.untyped_storage().nbytes() for key, tensor in saved.items() if key not in theirs)
