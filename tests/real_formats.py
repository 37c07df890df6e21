"""Small data sets in the true file formats of the real ones."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
from PIL import Image


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder, train=60, test=20, packed=True):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8) % 10
    for name, array in arrays.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / name).write_bytes(idx(array))
    return arrays


def write_cifar10(folder, protocol=2):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        written[name] = data
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [i % 10 for i in range(20)]}, protocol))
    names = [f"class{i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}, protocol))
    return written


def write_cifar100(folder):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for name, count in (("train", 400), ("test", 100)):
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content = {"data": data, "fine_labels": [i % 100 for i in range(count)], "coarse_labels": [0] * count}
        (folder / name).write_bytes(pickle.dumps(content, 4))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": [f"f{i}" for i in range(100)]}, 4))


def write_folder(root, classes=("blue", "green", "red"), count=12, size=(40, 32)):
    """Pictures that a few steps of training can tell apart, one folder a class."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 90, (size[1], size[0], 3), dtype=np.uint8)
            pixels[..., number % 3] += 150
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def write_for(option: str, root: Path) -> list[str]:
    """Write what `data=option` reads and return the overrides that point there."""
    if option in ("mnist", "fashion_mnist"):
        write_mnist(root, train=120, test=30)
    elif option == "cifar10":
        write_cifar10(root, protocol=4)
    elif option == "cifar100":
        write_cifar100(root)
    elif option == "folder":
        write_folder(root)
    else:
        return []
    return [f"data.root={root}"]
