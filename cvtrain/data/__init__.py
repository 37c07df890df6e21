"""Data: every data set as three disjoint splits of uint8 pictures, and the loader that turns them into batches."""

from cvtrain.data.digits import Digits
from cvtrain.data.folder import Folder
from cvtrain.data.hub import HuggingFace
from cvtrain.data.loader import Loader, LoaderConfig
from cvtrain.data.photographs import Flowers102, Food101, ImageNet, OxfordPet
from cvtrain.data.picture import printable, read_picture
from cvtrain.data.published import CIFAR10, CIFAR100, MNIST, STL10, SVHN, FashionMNIST
from cvtrain.data.shards import Shards
from cvtrain.data.source import ArraySource, EncodedSource
from cvtrain.data.table import CSV

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "CSV",
    "MNIST",
    "STL10",
    "SVHN",
    "ArraySource",
    "Digits",
    "EncodedSource",
    "FashionMNIST",
    "Flowers102",
    "Folder",
    "Food101",
    "HuggingFace",
    "ImageNet",
    "Loader",
    "LoaderConfig",
    "OxfordPet",
    "Shards",
    "printable",
    "read_picture",
]
