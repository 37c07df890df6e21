"""Which channels of a network hang together, and how to remove some of them."""

from __future__ import annotations

import copy
import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from cvtrain.core.anatomy import classifier
from cvtrain.core.channel_plan import fit_sizes, set_tensor
from cvtrain.core.dataflow import dataflow
from cvtrain.core.extras import import_extra
from cvtrain.core.modes import evaluating
from cvtrain.core.quiet import quiet
from cvtrain.core.time_limit import TimeLimitError, time_limit
from cvtrain.errors import ConfigError, Interrupted

log = logging.getLogger("cvtrain")

OPTION = "compression=prune_structured"
PATIENCE_S = 120.0
"""How long the analysis may take: a DenseNet-201 needs a quarter of it, a RexNet does not get to its end."""
_PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention")
_RESHAPES = ("view", "reshape", "unflatten")
_MAP = 4
"""Dimensions of a map: pictures, channels, height and width."""
_ATTENTION = ("multi_head_attention_forward", "_native_multi_head_attention")


@dataclass(frozen=True)
class Cut:
    """Where a group's channels lie in one tensor.

    Attributes:
        tensor: Name of the parameter or buffer.
        dim: Its dimension that counts channels.
        places: `(n,)` int64 positions in that dimension.
        channels: `(n,)` int64: to which of the group's channels each of them belongs.
    """

    tensor: str
    dim: int
    places: Tensor
    channels: Tensor


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that can only be removed together, from every layer that makes, carries or reads them.

    Attributes:
        layer: Path of a layer that makes them.
        channels: How many there are.
        blocks: Parts of equal size of which each must lose as many, as in grouped convolutions; 1: no parts.
        cuts: Where they lie.
    """

    layer: str
    channels: int
    blocks: int
    cuts: tuple[Cut, ...]


def channel_groups(model: nn.Module, example: Tensor) -> list[ChannelGroup]:
    """Find the groups of channels of a network that may lose some; the classifier's outputs are none of them.

    They are read off a dependency graph (Fang et al., "DepGraph: towards any structural pruning", CVPR 2023), which
    torch-pruning builds.

    Args:
        model: On the CPU, never changed.
        example: `(1, C, H, W)` float32 normalised input.

    Returns:
        One entry a group, from output to input; they name tensors, so they hold for every copy of `model`.

    Raises:
        ConfigError: torch-pruning is not installed, or the network is of a kind whose channels cannot be removed.
    """
    library = import_extra("torch_pruning", OPTION, "pruning")
    last = _refuse_mixed_channels(model, example)
    traced = copy.deepcopy(model).eval().requires_grad_(True)  # the graph is read off what autograd recorded
    try:
        with quiet(), torch.enable_grad(), time_limit(PATIENCE_S):
            graph = library.dependency.DependencyGraph().build_dependency(
                traced,
                example_inputs=example[:1],
                forward_fn=lambda network, images: network(images),  # its own guess would unpack a batch of one
                output_transform=None,
                unwrapped_parameters=None,
                customized_pruners=None,
                ignored_layers=None,
                ignored_params=None,
                verbose=False,
            )
            found = graph.get_all_groups(
                ignored_layers=[traced.get_submodule(last)], root_module_types=(_ConvNd, nn.Linear)
            )
            names = _Names(traced, graph)
            groups = [group for items in found if (group := _group(names, items)) is not None]
    except (Interrupted, ConfigError):
        raise
    except TimeLimitError as error:
        raise refused(model, f"the analysis of its channels did not end within {PATIENCE_S:.0f} s") from error
    except Exception as error:  # torch-pruning raises what it likes
        raise refused(model, f"the analysis of its channels failed: {_first_line(error)}") from error
    if not groups:
        raise refused(model, "it has no layer between input and logits whose channels could go")
    return groups


def remove_channels(model: nn.Module, groups: Sequence[ChannelGroup], doomed: Sequence[Tensor]) -> None:
    """Remove channels from `model`, in place.

    Args:
        model: The network of the groups or a copy of it, any device.
        groups: Of `channel_groups`.
        doomed: For each group the channels to remove, int64.
    """
    gone: dict[tuple[str, int], list[Tensor]] = defaultdict(list)
    for group, channels in zip(groups, doomed, strict=True):
        if len(channels):
            for cut in group.cuts:
                gone[cut.tensor, cut.dim].append(cut.places[torch.isin(cut.channels, channels)])
    for (name, dim), places in gone.items():
        path, _, own = name.rpartition(".")
        tensor: Tensor = getattr(model.get_submodule(path), own)
        stays = torch.ones(tensor.shape[dim], dtype=torch.bool)
        stays[torch.cat(places)] = False
        kept = stays.nonzero().flatten().to(tensor.device)
        set_tensor(model, name, tensor.detach().index_select(dim, kept))
    for path in {name.rpartition(".")[0] for name, _ in gone}:
        fit_sizes(model.get_submodule(path))


def check_removal(model: nn.Module, groups: Sequence[ChannelGroup], round_to: int, example: Tensor) -> None:
    """See on a copy that the network still runs when its groups lose channels.

    Every group loses another share, so that two tensors that belong together by an oversight of the graph cannot pass
    for right because they happen to be of the same size.

    Raises:
        ConfigError: It does not.
    """
    trial = copy.deepcopy(model).eval()
    doomed = []
    for number, group in enumerate(groups):
        width = group.channels // group.blocks
        least = min(width, fewest(group, round_to))
        doomed.append(in_blocks(group, torch.arange(least + (number % 7) * (width - least) // 7, width)))
    try:
        remove_channels(trial, groups, doomed)
        with torch.no_grad(), evaluating(model):
            after, before = trial(example[:1]), model(example[:1])
    except Interrupted:
        raise
    except Exception as error:  # a network raises what it likes
        raise refused(model, f"with fewer channels it does not run: {_first_line(error)}") from error
    if after.shape != before.shape:
        raise refused(model, f"with fewer channels its output is {list(after.shape)} instead of {list(before.shape)}")


def step_of(group: ChannelGroup, round_to: int) -> int:
    """Return the step in which a block's channels are counted so that the group's are multiples of `round_to`."""
    return round_to // math.gcd(round_to, group.blocks)


def fewest(group: ChannelGroup, round_to: int) -> int:
    """Return how many channels a block keeps at least; with one only, a grouped convolution would be another kind."""
    return max(2, step_of(group, round_to))


def in_blocks(group: ChannelGroup, within: Tensor) -> Tensor:
    """Return the group's channels that lie at the places `within` of each of its blocks."""
    width = group.channels // group.blocks
    return (torch.arange(group.blocks)[:, None] * width + within[None, :]).flatten()


def refused(model: nn.Module, reason: str) -> ConfigError:
    """Return the error of a network that cannot lose channels."""
    return ConfigError(
        f"{OPTION} cannot remove channels from this {type(model).__name__}: {reason}.\n"
        "Use a convolutional model without attention or channel shuffle, such as model=resnet18, mobilenet_v2, "
        "efficientnet_b0, convnext_tiny or vgg16;\n  or shrink this one by compression=[ptq_dynamic] or [ptq_static]."
    )


def _refuse_mixed_channels(model: nn.Module, example: Tensor) -> str:
    """Return the path of the classifier of a network that has neither attention nor channel shuffle."""
    shape = (int(example.shape[1]), int(example.shape[2]), int(example.shape[3]))
    try:
        last, flow = classifier(model, shape), dataflow(model, shape)
    except ConfigError as error:
        raise refused(model, str(error).rstrip(".")) from error
    for value in flow.values:
        mixed = value.op in _PRODUCTS and sum(number is not None for number, _ in value.operands) > 1
        if mixed or value.op in _ATTENTION:
            raise refused(model, f"it multiplies activations with each other ({value.op}), as attention does")
        if value.op in _RESHAPES and len(value.shape) > _MAP:
            raise refused(model, f"it divides its channels into parts ({value.op}), as channel shuffle does")
    return last


class _Names:
    """What a dependency graph calls the parts of a network."""

    def __init__(self, model: nn.Module, graph: Any) -> None:  # noqa: ANN401 - a type of a lazy import
        self.graph = graph
        self.paths = {module: path for path, module in model.named_modules()}
        self.parameters = {id(parameter): name for name, parameter in model.named_parameters()}

    def cuts(self, node: Any, makes: bool) -> Iterator[tuple[str, int]]:  # noqa: ANN401
        """Yield name and dimension of each tensor that has the channels which `node` makes, or reads."""
        module = node.module
        if isinstance(module, nn.Parameter):
            yield self.parameters[id(module)], node.pruning_dim % module.dim()
            return
        if module not in self.paths:  # a function
            return
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        for name, dim in _dims(module, makes).items():
            if name in own:
                yield f"{self.paths[module]}.{name}", dim


def _dims(module: nn.Module, makes: bool) -> Mapping[str, int]:
    """Return for each tensor of a layer the dimension of the channels that it makes, or reads."""
    if isinstance(module, _ConvTransposeNd):
        raise TypeError("it has a transposed convolution")
    if isinstance(module, _ConvNd) and module.groups > 1 and module.groups == module.out_channels:
        if module.groups != module.in_channels:
            raise TypeError("it has a convolution that adds up channels by groups of their own")
        return {"weight": 0, "bias": 0}
    if isinstance(module, (_ConvNd, nn.Linear)):
        return {"weight": 0, "bias": 0} if makes else {"weight": 1}
    if isinstance(module, (_NormBase, nn.GroupNorm)):
        return {"weight": 0, "bias": 0, "running_mean": 0, "running_var": 0}
    if isinstance(module, nn.LayerNorm):
        if len(module.normalized_shape) != 1:
            raise TypeError("it has a layer norm over places")
        return {"weight": 0, "bias": 0}
    if isinstance(module, nn.PReLU):
        return {"weight": 0} if module.num_parameters > 1 else {}
    if next(module.parameters(recurse=False), None) is not None:
        raise TypeError(f"it has a layer of type {type(module).__name__}")
    return {}


def _group(names: _Names, items: Any) -> ChannelGroup | None:  # noqa: ANN401 - a type of a lazy import
    """Return a group of the graph by names; None for one that cannot be followed, which stays whole."""
    layer = names.paths[items[0].dep.target.module]
    channels = len(items[0].idxs)
    cuts, blocks = [], 1
    for position in range(len(items)):
        item = items[position]
        node = item.dep.target
        if any(root is None for root in item.root_idxs):
            return None
        if isinstance(node.module, _ConvNd) and node.module.groups not in (1, node.module.out_channels):
            blocks = math.lcm(blocks, node.module.groups)
        elif isinstance(node.module, nn.GroupNorm):
            blocks = math.lcm(blocks, node.module.num_groups)
        places, roots = torch.tensor(item.idxs), torch.tensor(item.root_idxs)
        for tensor, dim in names.cuts(node, names.graph.is_out_channel_pruning_fn(item.dep.handler)):
            width = names.graph.model.get_parameter(tensor).shape[dim] if dim else 0
            # A grouped convolution's weight has the input channels of one block, which stand for those of all.
            cuts.append(Cut(tensor, dim, places % width if width else places, roots))
    return None if channels % blocks else ChannelGroup(layer, channels, blocks, tuple(cuts))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:150] if lines else type(error).__name__
