"""Small data sets in the true file formats of the real ones."""

import gzip
import io
import json
import pickle
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
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


def write_svhn(root, train=60, test=20):
    from scipy.io import savemat

    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written = {}
    for part, count in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        # The digit 0 is stored as 10.
        labels = np.array([[i % 10 or 10] for i in range(count)], np.uint8)
        savemat(root / f"{part}_32x32.mat", {"X": pixels, "y": labels}, do_compression=True)
        written[part] = pixels
    return written


def write_stl10(root, train=60, test=20):
    root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    written = {}
    for part, count in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (count, 96, 96, 3), dtype=np.uint8)
        # Plane by plane, each column by column.
        (root / f"{part}_X.bin").write_bytes(np.ascontiguousarray(pixels.transpose(0, 3, 2, 1)).tobytes())
        (root / f"{part}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(count)))
        written[part] = pixels
    return written


def picture(number, seed, size=(40, 32)):
    """A noisy picture that says by its colours which class it is of: 0 to 124 as digits of base 5."""
    levels = [20 + 50 * (number // base % 5) for base in (1, 5, 25)]
    noise = np.random.default_rng([number, *str(seed).encode()]).integers(-8, 9, (size[1], size[0], 1))
    return Image.fromarray((np.array(levels) + noise).astype(np.uint8))


def photograph(path, number, size=(40, 32), format="JPEG"):
    """A `picture` in a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(number, path.name, size).save(path, format, quality=95)
    return path


def class_of(pixels):
    """The number that `picture` hid in uint8 `(C, H, W)`."""
    digits = np.round((pixels.reshape(3, -1).mean(axis=1) - 20) / 50).astype(int)
    return int(digits @ [1, 5, 25])


def write_flowers102(root, train=1, val=1, test=1):
    """`train`, `val` and `test` pictures of each of the 102 flowers, their numbers shuffled."""
    from scipy.io import savemat

    numbers = np.random.default_rng(0).permutation(102 * (train + val + test)) + 1
    labels = np.zeros((1, len(numbers)), np.uint8)
    ids = dict(zip(("trnid", "valid", "tstid"), np.split(numbers, np.cumsum([102 * train, 102 * val])), strict=True))
    for chosen in ids.values():
        for position, number in enumerate(chosen):
            labels[0, number - 1] = position % 102 + 1
            photograph(root / "jpg" / f"image_{number:05d}.jpg", position % 102)
    savemat(root / "imagelabels.mat", {"labels": labels})
    savemat(root / "setid.mat", {name: chosen[None].astype(np.uint16) for name, chosen in ids.items()})


def write_oxford_pet(root, breeds=("Abyssinian", "american_bulldog", "Egyptian_Mau"), train=14, test=4):
    (root / "annotations").mkdir(parents=True)
    for part, first, count in (("trainval", 1, train), ("test", 1 + train, test)):
        lines = []
        for number, breed in enumerate(breeds):
            for i in range(first, first + count):
                photograph(root / "images" / f"{breed}_{i}.jpg", number)
                lines.append(f"{breed}_{i} {number + 1} {1 + breed[0].islower()} 1\n")
        (root / "annotations" / f"{part}.txt").write_text("".join(lines))
    (root / "images" / "Abyssinian_100.mat").write_bytes(b"left over in the real set")


def write_food101(root, dishes=("apple_pie", "baby_back_ribs", "zuppa"), train=14, test=4):
    (root / "meta").mkdir(parents=True)
    listed = {"train": {}, "test": {}}
    for number, dish in enumerate(dishes):
        names = [f"{dish}/{1000 * number + i}" for i in range(train + test)]
        listed["train"][dish], listed["test"][dish] = names[:train], names[train:]
        for name in names:
            photograph(root / "images" / f"{name}.jpg", number)
    for part, content in listed.items():
        (root / "meta" / f"{part}.json").write_text(json.dumps(content))


def write_imagenet(root, wnids=("n01440764", "n02012849", "n03126707"), train=14, val=4):
    for split, count in (("train", train), ("val", val)):
        for number, wnid in enumerate(wnids):
            for i in range(count):
                name = f"{wnid}_{i}" if split == "train" else f"ILSVRC2012_val_{number * count + i:08d}"
                photograph(root / split / wnid / f"{name}.JPEG", number)


def write_csv(root, classes=("blue", "green", "red"), count=14):
    lines = ["path,label\n"]
    for number, name in enumerate(classes):
        for i in range(count):
            path = photograph(root / "pictures" / f"{number}_{i}.jpg", number)
            lines.append(f"{path.relative_to(root)},{name}\n")
    (root / "labels.csv").write_text("".join(lines))
    return root / "labels.csv"


def encoded(number, seed=0, size=(40, 32), format="JPEG"):
    """The bytes of a `picture`."""
    stream = io.BytesIO()
    picture(number, seed, size).save(stream, format, quality=95)
    return stream.getvalue()


def add(archive, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def write_shards(root, shards=3, count=20, classes=3, prefix="shard"):
    """Shards of `count` samples each, the class of the i-th sample of all being i % classes."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        with tarfile.open(root / f"{prefix}-{number:06d}.tar", "w") as archive:
            for i in range(number * count, (number + 1) * count):
                add(archive, f"{i:06d}.jpg", encoded(i % classes, i))
                add(archive, f"{i:06d}.cls", str(i % classes).encode())
    return root


def write_hf(root, count=42, classes=("blue", "green", "red")):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))})
    rows = {
        "image": [{"bytes": encoded(i % len(classes), i), "path": None} for i in range(count)],
        "label": [i % len(classes) for i in range(count)],
    }
    datasets.Dataset.from_dict(rows, features).save_to_disk(root)
    return root


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
    elif option in ("folder", "flowers102", "oxford_pet", "food101", "imagenet", "csv", "shards", "hf"):
        return [*_write_pictures(option, root), "img_size=32", f"data.cache_dir={root.parent / 'cache'}"]
    elif option in ("svhn", "stl10"):
        globals()[f"write_{option}"](root)
    else:
        return []
    return [f"data.root={root}"]


def _write_pictures(option, root):
    made = globals()[f"write_{option}"](root)
    if option == "hf":
        return [f"data.name={root}"]
    return [f"data.root={made if option == 'csv' else root}"]
