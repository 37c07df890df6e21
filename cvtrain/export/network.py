"""A network as it is written to a file: alone, or with its preprocessing around it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvtrain.core.types import Preprocess


class Embedded(nn.Module):
    """A network that takes pictures as they are read and gives probabilities."""

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, preprocess: Preprocess, temperature: float, multilabel: bool) -> None:
        """Put what stands before and behind the logits around `model`.

        Args:
            model: Maps normalised float32 `(B, C, img_size, img_size)` to logits `(B, K)`.
            preprocess: How a picture becomes its input.
            temperature: What the logits are divided by, above 0.
            multilabel: Whether each class has a probability of its own (sigmoid) instead of a share of one (softmax).
        """
        super().__init__()
        self.model = model
        self.size = preprocess.img_size
        self.margin = (preprocess.resize - preprocess.img_size) // 2
        self.temperature = temperature
        self.multilabel = multilabel
        deviation = 255 * torch.tensor(preprocess.std, dtype=torch.float64)
        mean = 255 * torch.tensor(preprocess.mean, dtype=torch.float64)
        self.register_buffer("scale", (1 / deviation).float().view(1, -1, 1, 1))
        self.register_buffer("shift", (-mean / deviation).float().view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 `(B, C, resize, resize)` to float32 probabilities `(B, K)`."""
        end = self.margin + self.size
        centre = images[:, :, self.margin : end, self.margin : end]
        logits: Tensor = self.model(centre.float() * self.scale + self.shift) / self.temperature
        return logits.sigmoid() if self.multilabel else logits.softmax(dim=1)


@dataclass(frozen=True)
class Prepared:
    """A network to be written to a file.

    Attributes:
        network: A copy, on the CPU, in eval mode, with contiguous weights that need no gradients.
        images: `(1, C, H, W)` of what it takes: float32 normalised, or uint8 as read where it is `Embedded`.
        metadata: Text for the file.
    """

    network: nn.Module
    images: Tensor
    metadata: dict[str, str]

    @property
    def answer(self) -> str:
        """Return what the network gives: `logits` or `probabilities`."""
        return "logits" if self.images.is_floating_point() else "probabilities"

    @property
    def pair(self) -> Tensor:
        """Return a batch of two: PyTorch's tracers take a size of 1 for a constant."""
        return torch.cat([self.images, self.images])

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        """Return `size` random pictures: constant ones would hide differences."""
        shape = (size, *self.images.shape[1:])
        if self.images.is_floating_point():
            return self.images + torch.randn(shape, generator=generator)
        return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def prepare(
    model: nn.Module, example: Tensor, metadata: Mapping[str, str], embed_preprocessing: bool = False
) -> Prepared:
    """Make a copy of `model` that can be written to a file.

    Args:
        model: Any device and mode; never changed.
        example: `(1, C, H, W)` float32 normalised input.
        metadata: Text for the file; `preprocess`, `temperature` (1 without it) and `task` say what is embedded.
        embed_preprocessing: Put the preprocessing and the probabilities around it; `embedded` joins the metadata.
    """
    network = copy.deepcopy(model).cpu().eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    images, text = example[:1].detach().cpu().float(), dict(metadata)
    if embed_preprocessing:
        prep = Preprocess.from_dict(json.loads(text["preprocess"]))
        network = Embedded(
            network, prep, float(text.get("temperature", "1.0")), multilabel=text.get("task") == "multilabel"
        ).eval()
        images = torch.zeros((1, prep.channels, prep.resize, prep.resize), dtype=torch.uint8)
        text["embedded"] = "true"
    return Prepared(network, images, text)
