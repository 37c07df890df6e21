"""A network so small that a step is mostly what surrounds it; a user's own model, as `trusted=[tiny]` takes one."""

from torch import nn


def mlp(num_classes: int, in_channels: int, img_size: int, width: int = 256) -> nn.Module:
    """Return a perceptron with one hidden layer; maps `(B, C, H, W)` to `(B, K)`."""
    inputs = in_channels * img_size**2
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, num_classes))
