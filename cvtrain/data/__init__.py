"""Data: every data set as three disjoint splits of uint8 pictures, and the loader that turns them into batches."""

from cvtrain.data.digits import Digits
from cvtrain.data.folder import Folder
from cvtrain.data.loader import Loader, LoaderConfig
from cvtrain.data.picture import printable, read_picture
from cvtrain.data.published import CIFAR10, CIFAR100, MNIST, FashionMNIST
from cvtrain.data.source import ArraySource, EncodedSource

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "ArraySource",
    "Digits",
    "EncodedSource",
    "FashionMNIST",
    "Folder",
    "Loader",
    "LoaderConfig",
    "printable",
    "read_picture",
]
