"""From compression and export to the table: what fails does not lose the rest, and what is replaced is not kept."""

import csv
import dataclasses
import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from artifact_files import described, write_linear
from matplotlib.text import Text
from PIL import Image
from rich.console import Console
from torch import nn

from cvtrain.command.artifacts import INDEX, Made, Subject, make, make_and_prove
from cvtrain.command.untrained import Untrained
from cvtrain.core.artifact import ONNXRUNTIME, TORCH, Artifact, Compressed
from cvtrain.core.types import Preprocess
from cvtrain.errors import CvtrainError, GateError, Interrupted, StorageError
from cvtrain.evaluation import EvaluationSet, ProofRow, read_artifacts_csv
from cvtrain.report import plots
from cvtrain.report.console import artifacts_table, latency_table

PREP = Preprocess(2, 2, 1, (0.5,), (0.25,))
NAMES = ["a", "b", "c"]
WEIGHT = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
BIAS = np.zeros(3, np.float32)
METADATA = described(NAMES, PREP)
NO_LIMITS = {"max_drop": None, "latency_ms": None, "size_mb": None}


class Exporting:
    """Writes the linear network, or another weight than it was given."""

    def __init__(self, name, wrong=0.0, other=None, fails=None):
        self.name, self.wrong, self.other, self.fails = name, wrong, other, fails

    def export(self, model, example, folder, metadata, name="model"):
        if self.fails:
            raise self.fails
        weight = model[1].weight.detach().numpy().copy()
        weight[0, 0] += self.wrong
        path = folder / f"{name}_{self.name}.onnx"
        return write_linear(path, weight, BIAS, {**METADATA, **metadata}, name=self.name)

    def retry(self, *given):
        return None if self.other is None else self.other.export(*given)


class Step:
    def __init__(self, label, smaller=False, fails=None):
        self.label, self.smaller, self.fails = label, smaller, fails

    def apply(self, model, name, context):
        if self.fails:
            raise self.fails
        path = context.folder / f"{name.replace('+', '_')}.onnx"
        artifact = write_linear(path, 2 * WEIGHT, BIAS, METADATA, name=name, exact=False)
        layers = ({"layer": "1", "kind": "Linear"},)
        return Compressed((artifact,), model if self.smaller else None, self.smaller, layers=layers)


def subject(folder):
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.from_numpy(WEIGHT))
        model[1].bias.zero_()
    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (40, 1, 2, 2), dtype=np.uint8))
    labels = model(PREP(images)).argmax(1)
    evaluation = EvaluationSet(lambda: iter([(images, labels)]), NAMES, lambda logits: logits.argmax(1))
    example = torch.zeros(1, 1, 2, 2)
    return Subject(model, example, folder, METADATA, Untrained((1, 2, 2), 3), evaluation, "40 pictures")


def builder(export=None, compression=None, budget=NO_LIMITS):
    config = {"export": export or {}, "compression": compression or {}, "budget": budget}
    return SimpleNamespace(config=config, trusted=(), build_each=lambda group: config[group])


def reference(folder):
    return write_linear(folder / "reference.onnx", WEIGHT, BIAS, METADATA, name="fp32")


def test_one_that_fails_does_not_lose_the_others(tmp_path):
    exporters = {"bad": Exporting("bad", fails=CvtrainError("cannot")), "good": Exporting("good")}
    steps = {"broken": Step("broken", fails=CvtrainError("neither")), "quantize": Step("int8")}
    made = Made(tmp_path / INDEX, reference(tmp_path))
    make(builder(exporters, steps), subject(tmp_path), made)
    assert [artifact.name for artifact in made.artifacts] == ["good", "int8"]
    assert [str(error) for error in made.failures] == ["cannot", "neither"]
    assert (tmp_path / "compressed" / "int8_layers.csv").read_text().startswith("layer,kind\n")


def test_one_that_runs_out_of_memory_does_not_lose_the_others(tmp_path):
    steps = {"large": Step("large", fails=torch.OutOfMemoryError("CUDA out of memory")), "quantize": Step("int8")}
    made = Made(tmp_path / INDEX, reference(tmp_path))
    make(builder({}, steps), subject(tmp_path), made)
    assert [artifact.name for artifact in made.artifacts] == ["int8"]
    assert [error.exit_code for error in made.failures] == [7]


def test_a_request_to_stop_that_a_library_swallowed_ends_it_all(tmp_path):
    def stop():
        raise Interrupted("stopped", 143)

    exporters = {"bad": Exporting("bad", fails=CvtrainError("cannot, it says")), "good": Exporting("good")}
    made = Made(tmp_path / INDEX, reference(tmp_path))
    with pytest.raises(Interrupted):
        make(builder(exporters), dataclasses.replace(subject(tmp_path), check_stop=stop), made)
    assert not made.artifacts


def test_a_full_disk_ends_it_all(tmp_path):
    exporters = {"bad": Exporting("bad", fails=StorageError("full")), "good": Exporting("good")}
    with pytest.raises(StorageError):
        make(builder(exporters), subject(tmp_path), Made(tmp_path / INDEX, reference(tmp_path)))


def test_a_smaller_network_is_exported_too_under_its_own_name(tmp_path):
    made = Made(tmp_path / INDEX, reference(tmp_path))
    steps = {"prune": Step("pruned", smaller=True), "quantize": Step("int8")}
    make(builder({"onnx": Exporting("onnx")}, steps), subject(tmp_path), made)
    assert [artifact.name for artifact in made.artifacts] == ["onnx", "pruned", "pruned+int8", "pruned+onnx"]
    last = made.artifacts[-1]
    assert last.path == tmp_path / "export" / "pruned_onnx.onnx"
    assert not last.exact


def test_the_same_weights_to_be_given_away_are_no_row_of_their_own(tmp_path):
    class Giving:
        def export(self, model, example, folder, metadata, name="model"):
            return Artifact("safetensors", folder / f"{name}.safetensors", TORCH, 0, 0)

    made = Made(tmp_path / INDEX, reference(tmp_path))
    make(builder({"safetensors": Giving()}, {"prune": Step("pruned", smaller=True)}), subject(tmp_path), made)
    assert [artifact.name for artifact in made.artifacts] == ["pruned"]
    assert made.reference.path == tmp_path / "export" / "model.safetensors"
    assert made.artifacts[0].path == tmp_path / "export" / "pruned.safetensors"


def test_an_export_that_fails_its_proof_is_written_once_more_in_the_other_way(tmp_path):
    exporters = {"onnx": Exporting("onnx", wrong=1.0, other=Exporting("onnx"))}
    proved = make_and_prove(builder(exporters), subject(tmp_path), [reference(tmp_path)])
    assert [row.artifact for row in proved.rows] == ["fp32", "onnx"]
    assert proved.rows[1].agreement == 1.0
    assert not proved.failures
    assert [artifact.name for artifact in read_artifacts_csv(tmp_path / INDEX)] == ["fp32", "onnx"]
    with Image.open(tmp_path / "artifacts.png") as image:
        assert min(image.size) > 300


def test_one_that_fails_in_both_ways_has_no_row_and_its_failure_is_raised_at_the_end(tmp_path):
    wrong = Exporting("onnx", wrong=1.0, other=Exporting("onnx", wrong=2.0))
    proved = make_and_prove(
        builder({"onnx": wrong, "fine": Exporting("fine")}), subject(tmp_path), [reference(tmp_path)]
    )
    assert [row.artifact for row in proved.rows] == ["fp32", "fine"]
    with pytest.raises(CvtrainError, match="onnx"):
        proved.settle({"max_size_mb": 0.0001})  # a gate is judged only where nothing failed
    with pytest.raises(GateError):
        dataclasses.replace(proved, failures=[]).settle({"max_size_mb": 0.0001})


def test_what_is_replaced_leaves_the_table_at_once(tmp_path):
    proved = make_and_prove(builder({"onnx": Exporting("onnx")}), subject(tmp_path), [reference(tmp_path)])
    assert len(proved.rows) == 2
    index = read_artifacts_csv(tmp_path / INDEX)
    made = Made(tmp_path / INDEX, index[0], index[1:])
    made.add(dataclasses.replace(index[1], note="new"))
    assert [artifact.note for artifact in made.artifacts] == ["new"]
    assert [row["artifact"] for row in csv.DictReader((tmp_path / INDEX).open())] == ["fp32"]
    made.add(dataclasses.replace(index[1], name="another"))
    assert [artifact.name for artifact in made.artifacts] == ["onnx", "another"]


def test_a_step_that_fails_leaves_only_what_it_has_not_touched(tmp_path):
    class Breaking(Step):
        """Writes its first stage and fails at the second."""

        def apply(self, model, name, context):
            write_linear(context.folder / "pruned10.onnx", 3 * WEIGHT, BIAS, METADATA, name="pruned10", exact=False)
            raise CvtrainError("diverged")

    class Staged(Step):
        def apply(self, model, name, context):
            done = super().apply(model, name, context)
            first = write_linear(context.folder / "pruned10.onnx", WEIGHT, BIAS, METADATA, name="pruned10", exact=False)
            return dataclasses.replace(done, artifacts=(first, *done.artifacts))

    make_and_prove(builder({}, {"prune": Staged("pruned", smaller=True)}), subject(tmp_path), [reference(tmp_path)])
    index = read_artifacts_csv(tmp_path / INDEX)
    assert [artifact.name for artifact in index] == ["fp32", "pruned10", "pruned"]
    proved = make_and_prove(builder({}, {"prune": Breaking("pruned")}), subject(tmp_path), index)
    assert [row.artifact for row in proved.rows] == ["fp32", "pruned"]
    assert [str(error) for error in proved.failures] == ["diverged"]


def test_what_was_made_of_a_replaced_artifact_leaves_the_table_with_it(tmp_path):
    steps = {"prune": Step("pruned", smaller=True), "quantize": Step("int8")}
    make_and_prove(builder({}, steps), subject(tmp_path), [reference(tmp_path)])
    index = read_artifacts_csv(tmp_path / INDEX)
    assert [artifact.name for artifact in index] == ["fp32", "pruned", "pruned+int8"]
    proved = make_and_prove(builder({}, {"prune": steps["prune"]}), subject(tmp_path), index)
    assert [row.artifact for row in proved.rows] == ["fp32", "pruned"]


def test_a_file_of_fewer_channels_says_which_it_has_left(tmp_path):
    one = subject(tmp_path)
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    assert json.loads(one.carried(narrow, {"more": "1"})["channel_plan"]) == {"1.bias": [2], "1.weight": [2, 4]}
    assert "channel_plan" not in one.carried(one.model)


def rows():
    shared = {"ece": 0.01, "params": 1, "macs": 1, "gzip_bytes": 1, "latency_ms_p95": 1.0, "batch": 32}
    shared |= {"latency_batch_ms_p95": 1.0, "sha256": "0"}
    names = ("fp32", "onnx", "pruned", "pruned+onnx", "int8", "pruned+int8")
    return [
        ProofRow(
            artifact=name, file=name, runtime=TORCH if name in ("fp32", "pruned") else ONNXRUNTIME,
            accuracy=0.9712 - 0.003 * i, delta=-0.003 * i, delta_low=-0.003 * i - 0.0125, delta_high=0.0125 - 0.003 * i,
            agreement=1 - 0.004 * i, max_logit_error=0.1, bytes=44_700_000 // (i + 1), latency_ms_p50=123.4 / (i + 1),
            latency_batch_ms_p50=1234.5 / (i + 1), memory_mb=1234.5, exact=i < 2,
            note="half of the channels are gone" if name == "pruned" else "", **shared,
        )
        for i, name in enumerate(names)
    ]  # fmt: skip


def printed(table, width):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_the_table_fits_a_hundred_columns_and_marks_the_winner():
    text = printed(artifacts_table(rows(), "10,000 test pictures", 2, "pruned+int8"), 100)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    body = [line.split() for line in lines]
    assert sum(words[:2] == ["★", "pruned+int8"] for words in body) == 1
    assert any(words[:3] == ["fp32", "torch", "97.12"] for words in body), text
    assert "-0.60 [-1.85, +0.65]" in text
    assert "44.70 MB" in text
    assert "pruned: half of the channels are gone" in text
    assert "…" not in text


def test_the_picture_has_every_artifact_once_and_no_two_labels_on_each_other(tmp_path, monkeypatch):
    drawn, save = [], plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
    crowded = [dataclasses.replace(row, accuracy=0.97, latency_ms_p50=1.0 + 0.001 * i) for i, row in enumerate(rows())]
    plots.artifacts(crowded, tmp_path / "artifacts.png", "int8")
    (figure,) = drawn
    texts = figure.axes[0].texts
    assert [text.get_text().split(":")[0] for text in texts] == [
        "fp32", "onnx", "pruned", "pruned+onnx", "★ int8", "pruned+int8",
    ]  # fmt: skip
    boxes = [Text.get_window_extent(text) for text in texts]  # without the lines to the marks
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_benchmark_is_shown_by_batch():
    measured = [
        {
            "artifact": name, "runtime": "torch", "batch": batch, "latency_ms_p50": 1.0, "latency_ms_p95": 1.2,
            "latency_ms_iqr": 0.05, "images_per_s": 1000.0 * batch, "memory_mb": 20.0, "bytes": 1000, "speed": 1.0,
        }
        for batch in (1, 8) for name in ("fp32", "onnx")
    ]  # fmt: skip
    text = printed(latency_table(measured, "Latency"), 100)
    assert max(map(len, text.splitlines())) <= 100
    assert "8,000" in text
    assert text.count("0.050") == 4
