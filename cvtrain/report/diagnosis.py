"""What `debug=profiler` and `debug=gradients` tell: tables, and what to do about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from cvtrain.report.console import WAITING, data_bound_notice

SHOWN_LAYERS = 30
"""Layers that the gradient table shows; of more, those with a mark, the first and the last."""
NAMES = {
    "data": "waiting for data",
    "augment": "augmentation",
    "forward": "forward pass and loss",
    "backward": "backward pass",
    "optimizer": "clipping, optimizer",
    "other": "everything else",
    "evaluate": "evaluation",
    "checkpoint": "checkpoint",
}


def time_table(times: Any, steps_per_epoch: int) -> Table:  # noqa: ANN401 - engine.timing.TimeTable, a sibling's type
    """Return where an epoch's time goes.

    Args:
        times: Means by phase.
        steps_per_epoch: Optimizer steps of a whole epoch; the shares are those of one.
    """
    table = Table(
        title=f"Where the time goes: means of {times.steps} steps; shares of an epoch of {steps_per_epoch}",
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    table.add_column("phase")
    for name in ("a step", "an epoch", "share"):
        table.add_column(name, justify="right")
    for name, share in times.shares(steps_per_epoch).items():
        each = times.step.get(name)
        epoch = times.epoch.get(name, (each or 0.0) * steps_per_epoch)
        table.add_row(
            NAMES[name], "" if each is None else f"{1000 * each:.3f} ms", f"{epoch:.3f} s", f"{100 * share:.1f} %"
        )
    return table


def bottleneck(shares: Mapping[str, float], loader: Any, options: Mapping[str, Any]) -> str:  # noqa: ANN401
    """Return in a sentence what limits the speed, and what to try.

    Args:
        shares: Each phase's share of an epoch, 0..1.
        loader: Tells its `mode` and `config`, where it has them.
        options: `device`, the type of the device; `precision`, the name of the format; `compile`; `channels_last`;
            `aug`, the chosen preset.
    """
    waiting = data_bound_notice(shares["data"], loader)
    if waiting:
        return waiting
    if shares["evaluate"] > WAITING:
        return (
            f"evaluation takes {100 * shares['evaluate']:.0f} % of the time: limit_eval_batches=N looks at less of val."
        )
    if shares["checkpoint"] > WAITING:
        return f"checkpoints take {100 * shares['checkpoint']:.0f} % of the time: save less often (save_every_steps)."
    if shares["augment"] > WAITING:
        return (
            f"augmentation takes {100 * shares['augment']:.0f} % of the time: try another preset than "
            f"aug={options['aug']} (cvtrain list aug), or a smaller img_size."
        )
    tries = []
    if options["precision"] == "float32":
        tries.append("precision=amp")
    if not options["channels_last"]:
        tries.append("channels_last=true")
    if not options["compile"]:
        tries.append("compile=true")
    if shares["other"] > WAITING or options["device"] != "cpu":
        tries.insert(0, "a larger batch_size")
    tries.append("a smaller img_size or model")
    share = 100 * sum(shares[name] for name in ("forward", "backward", "optimizer"))
    return f"compute-bound: {share:.0f} % of the time is spent in the model and optimizer; try {', '.join(tries)}."


def gradient_table(epoch: int, rows: Sequence[Any]) -> Table:
    """Return gradients beside weights after an epoch; `rows` are engine.gradients.LayerGradient."""
    layers = [row for row in rows if row.is_matrix or row.mark]
    hidden = len(layers) - SHOWN_LAYERS
    if hidden > 0:
        half = SHOWN_LAYERS // 2
        layers = [*layers[:half], *(row for row in layers[half:-half] if row.mark), *layers[-half:]]
    table = Table(
        title=f"Gradients in the last step of epoch {epoch} (a healthy update is about 0.001 of the weight)",
        title_justify="left",
        title_style="bold",
        header_style="bold",
    )
    table.add_column("layer")
    for name in ("shape", "|weight|", "|gradient|", "gradient/weight", "update/weight", "dead outputs"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in layers:
        table.add_row(
            *(escape(row.parameter), row.shape, f"{row.weight:.3g}", f"{row.gradient:.3g}"),
            *(f"{row.gradient_ratio:.2e}", f"{row.update_ratio:.2e}", f"{100 * row.dead:.0f} %" if row.dead else "–"),
            f"[red]{row.mark}[/red]" if row.mark else "",
        )
    if hidden > 0:
        table.caption = f"{len(rows)} parameters are in gradients.csv"
        table.caption_justify = "left"
    return table
