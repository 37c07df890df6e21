"""Size of the training pictures as a pure function of the epoch; the `resizing` group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cvtrain.core.phases import Phase, phase_at
from cvtrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SizePhase(Phase):
    """Epochs of one size.

    Attributes:
        img_size: Side that the model sees while training, in pixels; evaluation stays at the run's.
    """

    img_size: int


class Constant:
    """All epochs at the run's size.

    Args:
        epochs: Epochs of the run.
        img_size: Side that the model sees, in pixels.
    """

    def __init__(self, epochs: int, img_size: int) -> None:
        self.phases: Sequence[SizePhase] = [SizePhase(name="all", first=0, epochs=epochs, img_size=img_size)]

    def phase(self, epoch: int) -> SizePhase:
        """Return the phase that `epoch` belongs to; the last one for epochs after the end."""
        return phase_at(self.phases, epoch)


class Progressive(Constant):
    """Small pictures first, each phase with its own learning-rate cycle (Howard 2018, fast.ai's DAWNBench entry).

    The run's schedule starts anew in each phase, over that phase's epochs and with its rate. Evaluation is at the
    run's size throughout: it is what will be deployed, and the best checkpoint of all phases is comparable.

    Args:
        phases: Name -> `img_size` (None: the run's), `epochs`, `lr` (None: the optimizer's); in order.
        epochs: Epochs of the run, the sum of the phases'.
        img_size: Side that the model sees in the end, in pixels.

    Raises:
        ConfigError: No phase, a size above the run's, or epochs that do not add up.
    """

    def __init__(self, phases: Mapping[str, Mapping[str, Any] | None], epochs: int, img_size: int) -> None:
        super().__init__(epochs, img_size)
        made: list[SizePhase] = []
        for name, phase in phases.items():
            if phase is None:
                continue
            size = int(phase["img_size"] or img_size)
            if size > img_size:
                raise ConfigError(
                    f"resizing.phases.{name}.img_size={size} is above the run's img_size={img_size}\n"
                    f"  raise img_size, or use phases up to {img_size}"
                )
            first, length = sum(p.epochs for p in made), int(phase["epochs"])
            made.append(SizePhase(name=str(name), first=first, epochs=length, lr=phase.get("lr"), img_size=size))
        total = sum(phase.epochs for phase in made)
        if not made or total != epochs:
            raise ConfigError(
                f"resizing: the phases take {' + '.join(str(p.epochs) for p in made) or 0} = {total} epochs, the run "
                f"has {epochs}\n  set epochs={max(1, total)}, or change resizing.phases.NAME.epochs"
            )
        self.phases = made


def shrunk(images: Tensor, side: int) -> Tensor:
    """Resize uint8 `(B, C, S, S)` to `(B, C, side, side)`, antialiased bilinear; the same tensor when S is `side`."""
    if images.shape[-1] == side:
        return images
    if images.device.type == "cpu":
        return F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    resized = F.interpolate(images.float(), size=(side, side), mode="bilinear", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
