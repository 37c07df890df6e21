"""Distinct real photographs, and the copies of them that people have."""

import io

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images


def photographs(count=150, seed=0):
    """Crops of scikit-learn's two photographs, 64 to 180 px, that overlap by a quarter at most and show something."""
    rng = np.random.default_rng(seed)
    whole = [Image.fromarray(image) for image in load_sample_images().images]
    boxes = [[] for _ in whole]
    found = []
    for _ in range(20_000):
        if len(found) == count:
            return found
        which = int(rng.integers(len(whole)))
        width = int(rng.integers(64, 180))
        height = int(width * rng.uniform(0.75, 1.33))
        left = int(rng.integers(0, whole[which].width - width))
        top = int(rng.integers(0, max(1, whole[which].height - height)))
        box = (left, top, left + width, top + height)
        if box[3] > whole[which].height or any(overlap(box, other) > 0.25 for other in boxes[which]):
            continue
        crop = whole[which].crop(box)
        if np.asarray(crop.convert("L")).std() < 15:
            continue
        boxes[which].append(box)
        found.append(crop)
    return found
    return found


def overlap(a, b):
    """Intersection over union."""
    across = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return across / (sum(areas) - across)


def jpeg(image, quality):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue())).convert(image.mode)


def resized(image, factor):
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC)


def cropped(image, share, rng):
    """Leave out `share` of each side, at a random place."""
    x, y = max(1, round(image.width * share)), max(1, round(image.height * share))
    left, top = int(rng.integers(0, x + 1)), int(rng.integers(0, y + 1))
    return image.crop((left, top, image.width - x + left, image.height - y + top))


COPIES = {
    "jpeg30": lambda image, rng: jpeg(image, 30),
    "jpeg60": lambda image, rng: jpeg(image, 60),
    "jpeg95": lambda image, rng: jpeg(image, 95),
    "half": lambda image, rng: resized(image, 0.5),
    "three_quarters": lambda image, rng: resized(image, 0.75),
    "double": lambda image, rng: resized(image, 2.0),
    "crop3": lambda image, rng: cropped(image, 0.03, rng),
    "crop5": lambda image, rng: cropped(image, 0.05, rng),
    "crop5_jpeg60_smaller": lambda image, rng: jpeg(resized(cropped(image, 0.05, rng), 0.6), 60),
}
