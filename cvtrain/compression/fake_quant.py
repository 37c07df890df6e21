"""Rounding to 8 bits inside a network of PyTorch, with gradients as if nothing had been rounded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# What comes before them is rounded as well; what comes before a ReLU is not, which is part of the layer before it.
_ACTIVATIONS = (nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Mish, nn.Sigmoid, nn.SiLU)
_RANGE = "input_range"
_SHRINKING = 0.01


class RoundedWeight(nn.Module):
    """A weight as it is after rounding to signed 8 bits, symmetric, one scale for each channel.

    The gradient passes through as if it had not been rounded (straight-through estimator: Bengio et al., "Estimating
    or propagating gradients through stochastic neurons for conditional computation", 2013).

    Args:
        axis: Axis of the channels.
        largest: Largest number, 127; 64 with 7 bits.
    """

    def __init__(self, axis: int, largest: int) -> None:
        super().__init__()
        self.axis = axis
        self.largest = largest

    def forward(self, weight: Tensor) -> Tensor:
        """Return what stays of `weight`, of its shape and dtype."""
        values = weight.float()
        with torch.no_grad():
            dims = [dim for dim in range(values.ndim) if dim != self.axis]
            scale = values.abs().amax(dims) / self.largest
            # The same number that ONNX Runtime takes for a channel of zeros.
            scale = torch.where(scale < torch.finfo(torch.float32).tiny, torch.ones_like(scale), scale)
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(
            values, scale, zero_point, self.axis, -self.largest, self.largest
        )
        return rounded.to(weight.dtype)


class RoundedInput(nn.Module):
    """An activation as it is after rounding to unsigned 8 bits, with one scale and zero point.

    In training the range grows to hold every value at once and shrinks slowly towards that of the batch: as wide as a
    calibration that covers every value will find it. In evaluation values outside are cut off.
    """

    low: Tensor
    high: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))

    def forward(self, values: Tensor) -> Tensor:
        """Return what stays of `values`, of their shape and dtype."""
        exact = values.float()
        with torch.no_grad():
            if self.training:
                least, most = exact.detach().aminmax()
                # `fmin` and `fmax` take the other one of a NaN, which the range is before the first batch.
                self.low.copy_(torch.fmin(self.low.lerp(least, _SHRINKING), least))
                self.high.copy_(torch.fmax(self.high.lerp(most, _SHRINKING), most))
            scale, zero_point = self.scale_and_zero_point()
        return torch.fake_quantize_per_tensor_affine(exact, scale, zero_point, 0, 255).to(values.dtype)

    def scale_and_zero_point(self) -> tuple[Tensor, Tensor]:
        """Return the scale, float32, and the number that stands for 0, int32; the range always holds 0."""
        low, high = self.low.clamp(max=0), self.high.clamp(min=0)
        scale = (high - low) / 255
        empty = scale < torch.finfo(torch.float32).tiny
        scale = torch.where(empty, torch.ones_like(scale), scale)
        return scale, torch.where(empty, 0, (-low / scale).round()).to(torch.int32)


def attach(model: nn.Module, largest: int = 127) -> None:
    """Let convolutions, linear layers and attention's projections of `model` compute with rounded weights and inputs.

    Parameters keep their values, under the names that `torch.nn.utils.parametrize` gives them. Copies of the model are
    as independent as those of any other.

    Args:
        model: Changed in place.
        largest: Largest number of a weight.
    """
    for module in list(model.modules()):
        if isinstance(module, _WEIGHTED):
            _round_weight(module, "weight", 1 if isinstance(module, _TRANSPOSED) else 0, largest)
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            _round_weight(module, "in_proj_weight", 0, largest)
        if isinstance(module, _WEIGHTED + _ACTIVATIONS):
            module.add_module(_RANGE, RoundedInput())
            module.register_forward_pre_hook(_round_input)


def _round_weight(module: nn.Module, name: str, axis: int, largest: int) -> None:
    # Unsafe only says that it is not tried out first.
    parametrize.register_parametrization(module, name, RoundedWeight(axis, largest), unsafe=True)


def _round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # The range is asked of the module, so that a copy of it has its own.
    return (module.get_submodule(_RANGE)(args[0]), *args[1:])


def plain_state(model: nn.Module) -> Mapping[str, Tensor]:
    """Return the state dict of a model as it was before `attach`, with the weights as they are now, not rounded."""
    plain: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        path = name.split(".")
        if _RANGE in path:
            continue
        if len(path) > 2 and path[-3] == "parametrizations":
            name = ".".join([*path[:-3], path[-2]])  # noqa: PLW2901
        plain[name] = value
    return plain
