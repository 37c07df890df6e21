#!/usr/bin/env python3
"""Samples a second and memory of the input pipeline: textbook, torchvision v2, timm-style, and cvtrain's loaders.

Every variant delivers normalised float32 batches on the CPU. torch runs on one thread in every process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Row, arguments, interleaved, peak_memory, rates, report, timed
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from cvtrain import aug
from cvtrain.core.types import DataSets, Preprocess
from cvtrain.data import ArraySource, Folder, Loader, LoaderConfig

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
JITTER = {"weak": None, "standard": (0.2, 0.2, 0.2, 0.1), "strong": (0.4, 0.4, 0.4, 0.2), "rand_augment": None}
SIDES = {500: tuple(JITTER), 256: ("weak",), 1500: ("weak",)}
Batches = Callable[[int], Iterator[int]]


@dataclass(frozen=True)
class Recipe:
    """One preset on one kind of data.

    Attributes:
        preset: A key of `JITTER`.
        size: Side of the result, in pixels.
        crop: `shift` pads by 4 and crops, `resized` is RandomResizedCrop.
    """

    preset: str
    size: int
    crop: str

    def textbook(self) -> list[Any]:
        """Return the transforms of PIL pictures, up to but without ToTensor."""
        cropping = (
            transforms.RandomCrop(self.size, padding=4)
            if self.crop == "shift"
            else transforms.RandomResizedCrop(self.size)
        )
        ops: list[Any] = [cropping, transforms.RandomHorizontalFlip()]
        if JITTER[self.preset]:
            ops.append(transforms.ColorJitter(*JITTER[self.preset]))
        if self.preset == "strong":
            ops.append(transforms.RandomRotation(15, transforms.InterpolationMode.BILINEAR))
        if self.preset == "rand_augment":
            ops.append(transforms.RandAugment())
        return ops

    def erasing(self) -> list[Any]:
        """Return the transforms of normalised tensors."""
        return [transforms.RandomErasing(0.5)] if self.preset in ("standard", "strong") else []

    def modern(self) -> v2.Compose:
        """Return torchvision's v2 transforms of uint8 tensors."""
        cropping = (
            v2.RandomCrop(self.size, padding=4)
            if self.crop == "shift"
            else v2.RandomResizedCrop(self.size, antialias=True)
        )
        ops: list[Any] = [cropping, v2.RandomHorizontalFlip()]
        if JITTER[self.preset]:
            ops.append(v2.ColorJitter(*JITTER[self.preset]))
        if self.preset == "strong":
            ops.append(v2.RandomRotation(15, v2.InterpolationMode.BILINEAR))
        if self.preset == "rand_augment":
            ops.append(v2.RandAugment())
        ops += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        return v2.Compose(ops + ([v2.RandomErasing(0.5)] if self.erasing() else []))

    def ours(self) -> aug.Augmentation:
        """Return cvtrain's augmentation of the same distribution."""
        sample: dict[str, Any] = (
            {"random_crop": aug.RandomCrop(4)} if self.crop == "shift" else {"crop": aug.RandomResizedCrop()}
        )
        sample["horizontal_flip"] = aug.HorizontalFlip()
        if JITTER[self.preset]:
            sample["color_jitter"] = aug.ColorJitter(*JITTER[self.preset])
        if self.preset == "strong":
            sample["rotation"] = aug.Rotation(15)
        if self.preset == "rand_augment":
            sample["rand_augment"] = aug.RandAugment()
        if self.erasing():
            sample["random_erasing"] = aug.RandomErasing(0.5)
        return aug.Augmentation(sample, eval_resize=1.0 if self.crop == "shift" else 1.14)


class Pictures(Dataset[Any]):
    """Textbook data set: `open_one(i)` gives a PIL picture or a tensor, then the transform."""

    def __init__(self, count: int, open_one: Callable[[int], Any], transform: Callable[[Any], Any]) -> None:
        self.count, self.open_one, self.transform = count, open_one, transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(self.open_one(index)), 0


def loading(
    dataset: Dataset[Any],
    batch: int,
    workers: int,
    collate: Callable[[list[Any]], Any] | None = None,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Batches:
    """Return passes over a shuffled DataLoader whose workers stay."""
    made = DataLoader(
        dataset, batch, shuffle=True, num_workers=workers, collate_fn=collate,
        persistent_workers=workers > 0, worker_init_fn=lambda _: torch.set_num_threads(1),
    )  # fmt: skip

    def passing(count: int) -> Iterator[int]:
        for images, _ in islice(made, count):
            yield len(images if finish is None else finish(images))

    return passing


def timm_style(recipe: Recipe, count: int, open_one: Callable[[int], Any], batch: int, workers: int) -> Batches:
    """Return the way of timm's loader: PIL to uint8 arrays in the workers, a whole batch normalised afterwards."""
    to_array = transforms.Compose([*recipe.textbook(), np.array])
    mean = torch.tensor([m * 255 for m in MEAN]).view(1, 3, 1, 1)
    std = torch.tensor([s * 255 for s in STD]).view(1, 3, 1, 1)
    erase = transforms.Compose(recipe.erasing())

    def collate(items: list[Any]) -> tuple[torch.Tensor, int]:
        return torch.from_numpy(np.stack([item[0] for item in items])).permute(0, 3, 1, 2), 0

    def finish(images: torch.Tensor) -> torch.Tensor:
        images = images.float().sub_(mean).div_(std)
        return torch.stack([erase(image) for image in images]) if recipe.erasing() else images

    return loading(Pictures(count, open_one, to_array), batch, workers, collate, finish)


def cvtrain_loader(sets: DataSets, recipe: Recipe, batch: int, mode: str, workers: int) -> Batches:
    """Return passes over cvtrain's own loader and augmentation, as the training loop uses them."""
    augmentation = recipe.ours()
    augmentation.adapt(sets.preprocess)
    config = LoaderConfig(batch_size=batch, seed=0, device=CPU, mode=mode, workers=workers)
    loader = Loader(sets, config, augmentation.crop)
    epochs = iter(range(10**9))

    def passing(count: int) -> Iterator[int]:
        epoch = next(epochs)
        for item in islice(loader.train_batches(epoch, img_size=recipe.size), count):
            images = augmentation.samples(item.images, item.indices, 0, epoch, recipe.size, item.cropped)
            images = sets.preprocess.normalize(images)
            yield len(images.contiguous(memory_format=torch.channels_last))

    return passing


def array_case(recipe: Recipe, count: int, batch: int) -> dict[str, Batches]:
    """Return the variants on 32 × 32 RGB arrays: crops of two photographs."""
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    pixels = np.empty((count, 32, 32, 3), np.uint8)
    for i in range(count):
        photo = photos[i % 2]
        y, x = rng.integers(0, photo.shape[0] - 64), rng.integers(0, photo.shape[1] - 64)
        pixels[i] = photo[y : y + 64 : 2, x : x + 64 : 2]
    to_float = [*recipe.textbook(), transforms.ToTensor(), transforms.Normalize(MEAN, STD), *recipe.erasing()]
    textbook = Pictures(count, lambda i: Image.fromarray(pixels[i]), transforms.Compose(to_float))
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    source = ArraySource(torch.from_numpy(pixels).permute(0, 3, 1, 2), np.arange(count) % 2, [""] * count)
    sets = DataSets("arrays", ["a", "b"], Preprocess(32, 32, 3, MEAN, STD), source, source, source)
    return {
        "textbook, 0 workers": loading(textbook, batch, 0),
        "textbook, 2 workers": loading(textbook, batch, 2),
        "torchvision v2 on tensors": loading(Pictures(count, lambda i: tensors[i], recipe.modern()), batch, 0),
        "timm-style, 2 workers": timm_style(recipe, count, lambda i: Image.fromarray(pixels[i]), batch, 2),
        "cvtrain device": cvtrain_loader(sets, recipe, batch, "device", 0),
        "cvtrain host, 2 workers": cvtrain_loader(sets, recipe, batch, "host", 2),
    }


def write_photos(folder: Path, side: int, count: int) -> None:
    """Write JPEGs (quality 90) of `side` pixels: crops of two photographs, resized, with a little sensor noise."""
    rng = np.random.default_rng(side)
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    for i in range(count):
        photo, width = photos[i % 2], int(rng.integers(256, 400))
        x, y = int(rng.integers(0, photo.width - width)), int(rng.integers(0, photo.height - width))
        picture = photo.resize((side, side), Image.Resampling.LANCZOS, box=(x, y, x + width, y + width))
        noisy = np.clip(np.asarray(picture) + rng.normal(0, 4, (side, side, 3)), 0, 255).astype(np.uint8)
        path = folder / "ab"[i // 2 % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noisy).save(path, quality=90)


def folder_case(recipe: Recipe, folder: Path, batch: int) -> dict[str, Batches]:
    """Return the variants on a folder of JPEGs."""
    paths = sorted(folder.rglob("*.jpg"))
    to_float = [*recipe.textbook(), transforms.ToTensor(), transforms.Normalize(MEAN, STD), *recipe.erasing()]

    def open_one(i: int) -> Image.Image:
        return Image.open(paths[i]).convert("RGB")

    def as_tensor(i: int) -> torch.Tensor:
        return v2.functional.pil_to_tensor(open_one(i))

    def sets(cache: str) -> DataSets:
        data = Folder(root=str(folder), cache=cache, cache_dir=str(folder.parent / "cache"), val_fraction=0.02,
                      test_fraction=0.02)  # fmt: skip
        return data.load(recipe.size, 1.14, 2)

    textbook = Pictures(len(paths), open_one, transforms.Compose(to_float))
    read, cached = sets("none"), sets("disk")
    return {
        "textbook, 0 workers": loading(textbook, batch, 0),
        "textbook, 2 workers": loading(textbook, batch, 2),
        "torchvision v2 on tensors": loading(Pictures(len(paths), as_tensor, recipe.modern()), batch, 0),
        "timm-style, 2 workers": timm_style(recipe, len(paths), open_one, batch, 2),
        "cvtrain host, 0 workers": cvtrain_loader(read, recipe, batch, "host", 0),
        "cvtrain host, 2 workers": cvtrain_loader(read, recipe, batch, "host", 2),
        "cvtrain cached, device": cvtrain_loader(cached, recipe, batch, "device", 0),
        "cvtrain cached, 2 workers": cvtrain_loader(cached, recipe, batch, "host", 2),
    }


def measure(
    case: str, fresh: Callable[[], dict[str, Batches]], batches: Callable[[str], int], rounds: int
) -> list[Row]:
    """Time all variants in turn, then their memory one after the other; both baselines are the textbook's.

    Args:
        case: For the rows.
        fresh: Makes the variants.
        batches: How many batches a pass of a variant has.
        rounds: Passes of each variant.
    """
    variants = fresh()

    def seconds(name: str) -> Callable[[], float]:
        return lambda: timed(variants[name](batches(name) + 1))

    found = interleaved({name: seconds(name) for name in variants}, rounds)
    textbook = [name for name in found if name.startswith("textbook")]
    better = max(textbook, key=lambda name: sorted(found[name])[len(found[name]) // 2])
    rows = rates(case, found, "samples/s", better)
    memory = {name: peak_memory(lambda run=run: list(run(8))) for name, run in fresh().items()}
    base = max(memory[better], 1e-3)
    return rows + [Row(case, name, value, "MiB added", better, value / base) for name, value in memory.items()]


def main() -> None:
    """Measure all cases."""
    args = arguments(str(__doc__).splitlines()[0])
    torch.set_num_threads(1)
    rounds = 2 if args.quick else 7
    rows: list[Row] = []
    for preset in JITTER:
        case = f"32x32 arrays, {preset}"
        if args.only in case:
            slow, fast = (2, 20) if args.quick else (8, 80)
            recipe = Recipe(preset, 32, "shift")
            rows += measure(
                case,
                lambda recipe=recipe: array_case(recipe, 12_800, 128),
                lambda name, slow=slow, fast=fast: fast if "device" in name else slow,
                rounds,
            )
    for side in SIDES:
        presets = [preset for preset in SIDES[side] if args.only in f"{side}-px JPEG, RRC 224, {preset}"]
        if not presets or (args.quick and side > 1000):
            continue
        batches = 2 if args.quick else 24 if side < 1000 else 10
        with tempfile.TemporaryDirectory(prefix="bench-input-") as temporary:
            folder = Path(temporary) / "photos"
            # A few more than are read: val and test have their pictures too.
            write_photos(folder, side, 18 * (batches + 2))
            for preset in presets:
                rows += measure(
                    f"{side}-px JPEG, RRC 224, {preset}",
                    lambda preset=preset, folder=folder: folder_case(Recipe(preset, 224, "resized"), folder, 16),
                    lambda name, batches=batches: batches,
                    1 if args.quick else 3,
                )
    report(
        rows,
        args,
        [
            "weak on JPEGs is RandomResizedCrop and flip; the others add to it as their preset does.",
            "JPEGs: crops of two photographs, resized to the named side, noise of 4 levels, quality 90.",
            "ratio: to the better of the textbook's 0 and 2 workers; memory: what 8 batches add to a forked process, "
            "its workers included (proportional set size).",
        ],
    )


if __name__ == "__main__":
    main()
