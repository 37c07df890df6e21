"""How large gradients and updates are beside the weights, layer by layer; `debug=gradients`."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cvtrain.core.files import write_atomic
from cvtrain.engine.run import TrainRun

FILE = "gradients.csv"
FAST = 0.1
"""Share of its own norm by which a weight moves in one step, above which it is marked as exploding."""
APART = 100.0
"""Times the median gradient/weight ratio above which a layer is exploding, and below whose inverse it vanishes."""
DEAD = 0.5
"""Share of a layer's outputs without any gradient above which it is marked as dead."""


@dataclass(frozen=True)
class LayerGradient:
    """One parameter in one step, as the optimizer got it: unscaled, clipped.

    Attributes:
        parameter: Its name in the state dict.
        shape: Its shape, as 64×3×3×3.
        weight: L2 norm before the step.
        gradient: L2 norm.
        update: L2 norm of what the step changed.
        dead: Share of the outputs (first axis) whose gradient is zero throughout, 0..1.
        mark: What is wrong: `not finite`, `dead`, `exploding` or `vanishing`; empty when nothing is.
    """

    parameter: str
    shape: str
    weight: float
    gradient: float
    update: float
    dead: float
    mark: str = ""

    @property
    def gradient_ratio(self) -> float:
        """Return |gradient| / |weight|; 0 for a weight of 0."""
        return self.gradient / self.weight if self.weight else 0.0

    @property
    def update_ratio(self) -> float:
        """Return |update| / |weight|, about 0.001 in a healthy layer; 0 for a weight of 0."""
        return self.update / self.weight if self.weight else 0.0

    @property
    def is_matrix(self) -> bool:
        """Return whether this is a layer's weight rather than a bias or a norm's factor."""
        return "×" in self.shape


class GradientTable:
    """Measures the last step of each epoch and keeps `gradients.csv`; the steps between are not touched.

    Args:
        run: The run; its optimizer gets two hooks, which only look.
        folder: The run folder.
        show: Called with an epoch's number, from 1, and its rows.
    """

    def __init__(self, run: TrainRun, folder: Path, show: Callable[[int, list[LayerGradient]], None]) -> None:
        self._run = run
        self._path = folder / FILE
        self._show = show
        self._rows: list[dict[str, Any]] = []
        self._before: dict[str, Tensor] = {}
        self._named = [(name, p) for name, p in run.model.named_parameters()]
        self._kept_from_before()
        run.optimizer.register_step_pre_hook(self._remember)
        run.optimizer.register_step_post_hook(self._measure)

    def _kept_from_before(self) -> None:
        """Take over the rows of an interrupted part of the run, as far as it is resumed."""
        if self._run.state.step and self._path.exists():
            with self._path.open(newline="") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["step"] or 0) <= self._run.state.step]

    def _remember(self, *_: object) -> None:
        run = self._run
        if (run.state.step + 1) % run.steps_per_epoch == 0:
            self._before = {name: p.detach().clone() for name, p in self._named if p.grad is not None}

    @torch.no_grad()
    def _measure(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if not self._before:
            return
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer gets gradients as fp16 scaled them
        rows = measure(self._named, self._before, 1.0 if scale is None else float(scale))
        self._before = {}
        step, epoch = self._run.state.step + 1, self._run.state.epoch + 1
        self._rows += [_csv_row(epoch, step, row) for row in rows]
        write_atomic(self._path, _csv(self._rows))
        self._show(epoch, rows)


def measure(
    named: Sequence[tuple[str, nn.Parameter]], before: dict[str, Tensor], scale: float = 1.0
) -> list[LayerGradient]:
    """Return a row for each parameter that has a gradient; the device is waited for once.

    Args:
        named: Parameters behind the step, with `.grad` as it was in it.
        before: Their values before it, by name.
        scale: What the gradients are multiplied by.
    """
    chosen = [(name, p, p.grad) for name, p in named if name in before and p.grad is not None]
    if not chosen:
        return []
    found = [
        torch.stack(
            [
                before[name].float().norm(),
                grad.float().norm() / scale,
                (p - before[name]).float().norm(),
                (grad.flatten(1) if grad.ndim > 1 else grad[:, None] if grad.ndim else grad.view(1, 1))
                .eq(0).all(1).float().mean(),
            ]
        )
        for name, p, grad in chosen
    ]  # fmt: skip
    values = torch.stack(found).tolist()
    shapes = ["×".join(map(str, p.shape)) for _, p, _ in chosen]
    plain = [LayerGradient(name, shape, *row) for (name, _, _), shape, row in zip(chosen, shapes, values, strict=True)]
    ratios = [row.gradient_ratio for row in plain if row.is_matrix and row.gradient_ratio > 0]
    usual = statistics.median(ratios) if ratios else 0.0
    return [dataclasses.replace(row, mark=_mark(row, usual)) for row in plain]


def _mark(row: LayerGradient, usual: float) -> str:
    """Return what is wrong; ratios to a weight that begins at zero, as biases do, say nothing."""
    if not math.isfinite(row.gradient):
        return "not finite"
    if row.dead > DEAD and row.is_matrix:
        return "dead"
    if not row.is_matrix or not row.weight:
        return ""
    if row.update_ratio > FAST or row.gradient_ratio > APART * usual:
        return "exploding"
    return "vanishing" if row.gradient_ratio < usual / APART else ""


def _csv_row(epoch: int, step: int, row: LayerGradient) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": step,
        "parameter": row.parameter,
        "shape": row.shape,
        "weight_norm": f"{row.weight:.6g}",
        "grad_norm": f"{row.gradient:.6g}",
        "grad_weight_ratio": f"{row.gradient_ratio:.6g}",
        "update_ratio": f"{row.update_ratio:.6g}",
        "dead_outputs": f"{row.dead:.4f}",
        "mark": row.mark,
    }


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
