"""MobileNet v1."""

from __future__ import annotations

from torch import Tensor, nn

from cvtrain.model.fitting import fit_stem

_BLOCKS = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels and stride of each depthwise separable block, table 1 of the paper."""


class MobileNetV1(nn.Module):
    """Depthwise 3×3 and pointwise 1×1 convolutions in turn, each with batch norm and ReLU.

    4,231,976 parameters at 1000 classes. Source: Howard et al., "MobileNets: efficient convolutional neural networks
    for mobile vision applications", arXiv:1704.04861.

    Args:
        num_classes: K.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels.
        small_stem: Whether the first convolution has stride 1; `auto`: at 64 px and below.
    """

    def __init__(self, num_classes: int, in_channels: int, img_size: int, small_stem: bool | str = "auto") -> None:
        super().__init__()
        blocks: list[nn.Module] = [_convolution(in_channels, 32, 3, 2)]
        below = 32
        for width, stride in _BLOCKS:
            depthwise, pointwise = _convolution(below, below, 3, stride, groups=below), _convolution(below, width, 1, 1)
            blocks.append(nn.Sequential(depthwise, pointwise))
            below = width
        self.features = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(below, num_classes)
        fit_stem(self, in_channels, img_size, small_stem)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, K)`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _convolution(below: int, width: int, side: int, stride: int, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(below, width, side, stride, padding=side // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True))
