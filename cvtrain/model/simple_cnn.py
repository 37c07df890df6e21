"""A small convolutional network for small pictures."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

_FINAL_SIDE = 4


class SimpleCNN(nn.Module):
    """3×3 convolutions with batch norm and ReLU, max-pooled until the map is about 4×4, then one linear layer.

    Args:
        num_classes: K.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels; decides how many of the last stages are pooled.
        widths: Channels of each stage.
    """

    def __init__(self, num_classes: int, in_channels: int, img_size: int, widths: Sequence[int] = (32, 64, 64)) -> None:
        super().__init__()
        side = img_size
        pools = min(len(widths), max(0, (img_size // _FINAL_SIDE).bit_length() - 1))
        first_pooled = max(0, len(widths) - 1 - pools)
        stages: list[nn.Module] = []
        for i, (below, width) in enumerate(zip([in_channels, *widths], widths, strict=False)):
            stages += [nn.Conv2d(below, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
            if first_pooled <= i < first_pooled + pools:
                stages.append(nn.MaxPool2d(2))
                side //= 2
        if side >= 2 * _FINAL_SIDE:  # a large picture: keep the linear layer small
            stages.append(nn.AvgPool2d(side // _FINAL_SIDE))
            side //= side // _FINAL_SIDE
        self.features = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1] * side * side, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, K)`."""
        logits: Tensor = self.head(self.features(images).flatten(1))
        return logits
