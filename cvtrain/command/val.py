"""`cvtrain val run=FOLDER`: measure a finished run again, from its deployed weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from cvtrain.audit import audit
from cvtrain.build import Builder
from cvtrain.command import deployed
from cvtrain.core.files import to_json_line
from cvtrain.errors import EXIT_OK, ConfigError, DataError
from cvtrain.evaluation.intervals import wilson
from cvtrain.report.console import attach_log, make_console
from cvtrain.schema import validate


@torch.inference_mode()
def run(config: dict[str, Any], trusted: list[str]) -> int:
    """Print the metrics of one split; return the exit code.

    Raises:
        DataError: The data's classes are not the ones that the model was trained on.
    """
    if config["run"] is None:
        raise ConfigError("give run=FOLDER, the folder that a run printed.")
    attach_log(make_console(json_output=True))
    shipped = deployed.load(config, trusted)
    folder = Path(str(config["run"]))
    trained = {**deployed.run_config(folder), "trusted": trusted, "device": config["device"], "class_weights": "none"}
    # What the weights were trained with stands; where they once came from does not matter any more.
    trained |= {"pretrained": None, "img_size": shipped.preprocess.img_size}
    if "interpolation" in trained["data"]:
        trained["data"] = {**trained["data"], "interpolation": shipped.preprocess.interpolation}
    audit(trained, trusted)
    validate(trained, trusted)
    builder = Builder(trained, trusted)
    sets, _ = builder.data()
    if sets.class_names != shipped.class_names:
        raise DataError(f"{sets.name} now has the classes {sets.class_names}, the model knows {shipped.class_names}.")
    metrics = builder.task(sets, [], shipped.device).metrics(shipped.device)
    for batch in builder.loader(sets, shipped.device).eval_batches(config["split"]):
        metrics.update(shipped.model(shipped.preprocess(batch.images)), batch.targets)
    values = {f"{config['split']}/{name}": value for name, value in metrics.compute().items()}
    right, total = metrics.right()
    low, high = wilson(right, total)
    if config["json"]:
        sys.stdout.write(to_json_line({"run": str(folder.absolute()), "metrics": values, "acc_95": [low, high]}) + "\n")
    else:
        lines = [f"{name:<18}{value:.4f}" for name, value in values.items()]
        lines.append(f"accuracy 95 % [{100 * low:.2f}, {100 * high:.2f}] on {total} pictures")
        sys.stdout.write("\n".join(lines) + "\n")
    return EXIT_OK
