"""AlexNet."""

from __future__ import annotations

from torch import Tensor, nn

from cvtrain.model.fitting import fit_stem


class AlexNet(nn.Module):
    """The network of 2012 in one tower, with its 96 filters, local response norm and overlapping pools.

    62,378,344 parameters at 1000 classes and 224 or 227 px; at other sizes the last map is pooled to the same 6×6.
    Weights start as He et al. 2015 have it, not normal with 0.01, which needs the paper's own schedule to begin to
    learn. Source: Krizhevsky, Sutskever & Hinton, "ImageNet classification with deep convolutional neural networks",
    NeurIPS 2012; one tower as in Krizhevsky, arXiv:1404.5997.

    Args:
        num_classes: K.
        in_channels: Channels of the input.
        img_size: Side of the input in pixels.
        small_stem: Whether the first convolution is 3×3 of stride 1 without a pool; `auto`: at 64 px and below.
    """

    def __init__(self, num_classes: int, in_channels: int, img_size: int, small_stem: bool | str = "auto") -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(in_channels, 96, 11, stride=4, padding=2), nn.ReLU(), _norm(), nn.MaxPool2d(3, 2),
            nn.Conv2d(96, 256, 5, padding=2), nn.ReLU(), _norm(), nn.MaxPool2d(3, 2),
            nn.Conv2d(256, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2),
            nn.AdaptiveAvgPool2d(6), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(
            nn.Dropout(0.5), nn.Linear(256 * 6 * 6, 4096), nn.ReLU(),
            nn.Dropout(0.5), nn.Linear(4096, 4096), nn.ReLU(),
            nn.Linear(4096, num_classes),
        )  # fmt: skip
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]  # each has one
        fit_stem(self, in_channels, img_size, small_stem)

    def forward(self, images: Tensor) -> Tensor:
        """Map `(B, C, H, W)` to logits `(B, K)`."""
        logits: Tensor = self.head(self.features(images))
        return logits


def _norm() -> nn.LocalResponseNorm:
    # The paper's alpha of 1e-4 is of a sum over 5 channels, PyTorch's of their mean.
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)
