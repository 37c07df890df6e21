"""Networks; the `model` group. `num_classes`, `in_channels` and `img_size` come from the data at build time."""

from cvtrain.model.alexnet import AlexNet
from cvtrain.model.lenet import LeNet5
from cvtrain.model.mobilenet_v1 import MobileNetV1
from cvtrain.model.simple_cnn import SimpleCNN
from cvtrain.model.timm_model import timm_model
from cvtrain.model.torchvision_model import torchvision_model

__all__ = ["AlexNet", "LeNet5", "MobileNetV1", "SimpleCNN", "timm_model", "torchvision_model"]
