"""LeNet-5."""

from __future__ import annotations

from torch import Tensor, nn

from cvtrain.errors import ConfigError

SMALLEST = 16


class LeNet5(nn.Module):
    """LeNet-5 with ReLU and max-pooling: two 5×5 convolutions without padding, then 120, 84 and K units.

    44,426 parameters at 1×28×28 and 10 classes. Source: LeCun, Bottou, Bengio & Haffner, "Gradient-based learning
    applied to document recognition", Proc. IEEE 1998.

    Args:
        num_classes: K.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels, 16 or more.

    Raises:
        ConfigError: The input is too small for two 5×5 convolutions and two poolings.
    """

    def __init__(self, num_classes: int, in_channels: int, img_size: int) -> None:
        super().__init__()
        if img_size < SMALLEST:
            raise ConfigError(
                f"model=lenet5 needs at least {SMALLEST} px, not img_size={img_size}. Set img_size=28 (its default)."
            )
        side = ((img_size - 4) // 2 - 4) // 2
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * side * side, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, K)`."""
        logits: Tensor = self.head(self.features(images))
        return logits
