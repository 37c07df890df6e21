"""Networks; the `model` group. `num_classes`, `in_channels` and `img_size` come from the data at build time."""

from cvtrain.model.lenet import LeNet5
from cvtrain.model.simple_cnn import SimpleCNN
from cvtrain.model.torchvision_model import torchvision_model

__all__ = ["LeNet5", "SimpleCNN", "torchvision_model"]
