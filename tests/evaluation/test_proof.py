import csv
import dataclasses
import gc

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score
from torch import nn

from cvtrain.compression import PruneUnstructured, PtqStatic, run_steps
from cvtrain.core.artifact import Artifact, CompressionContext
from cvtrain.core.weights import save_weights
from cvtrain.errors import ConfigError, CvtrainError, DataError, DivergedError, StorageError, WeightsError
from cvtrain.evaluation import ProofRow, paired_difference, prove, write_artifacts_csv
from cvtrain.evaluation.proof import measure_latency
from cvtrain.evaluation.runners import load_runner
from cvtrain.export import Onnx, Safetensors, export_onnx
from cvtrain.task import Multilabel

EXAMPLE = torch.zeros(1, 1, 8, 8)
COLUMNS = (
    "artifact,file,runtime,accuracy,delta,delta_low,delta_high,agreement,max_logit_error,params,macs,bytes,"
    "latency_ms_p50,latency_ms_p95"
)


def train(model, images, labels, epochs):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=generator).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    images = (torch.from_numpy(data.images).float().unsqueeze(1) / 16 - 0.3) / 0.38
    labels = torch.from_numpy(data.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], labels[order]


@pytest.fixture(scope="module")
def run_folder(digits, tmp_path_factory):
    """A trained network and every file made from it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "artifacts").mkdir()
    images, labels = digits
    torch.manual_seed(0)
    convolution = (nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2))
    model = nn.Sequential(*convolution, nn.Conv2d(16, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    train(model, images[:1437], labels[:1437], 3)
    model.eval()
    context = CompressionContext(
        folder=folder / "artifacts",
        example=EXAMPLE,
        calibration=lambda: iter(images[:1437].split(100)),
        finetune=lambda net, epochs: train(net, images[:1437], labels[:1437], epochs),
        save_weights=lambda net, path: save_weights(net, path, {}),
        export_onnx=lambda net, path: export_onnx(net, EXAMPLE, path, {}),
    )
    weights = Safetensors().export(model, EXAMPLE, folder / "artifacts", {})
    reference = dataclasses.replace(weights, name="fp32")
    steps = {"prune_unstructured": PruneUnstructured(0.5), "ptq_static": PtqStatic()}
    onnx = Onnx().export(model, EXAMPLE, folder / "artifacts", {})
    return folder, reference, [onnx, *run_steps(steps, model, context)]


@pytest.fixture
def batches(digits):
    images, labels = digits
    return lambda: zip(images[1437:].split(100), labels[1437:].split(100), strict=True)


@pytest.fixture(scope="module")
def rows(run_folder, digits):
    folder, reference, artifacts = run_folder
    images, labels = digits

    def evaluation():
        return zip(images[1437:].split(100), labels[1437:].split(100), strict=True)

    return prove(reference, artifacts, evaluation, EXAMPLE, threads=1, latency_runs=20, run_folder=folder)


def saved(model, path, name="fp32"):
    save_weights(model, path, {})
    return Artifact(name, path, "torch", 0, 0, model=model)


def test_a_trained_network_and_its_artifacts_are_proved_with_their_real_accuracies(rows, run_folder, digits):
    images, labels = digits[0][1437:], digits[1][1437:]
    assert [row.artifact for row in rows] == ["fp32", "onnx", "pruned", "pruned+int8"]
    assert [row.runtime for row in rows] == ["torch", "onnxruntime", "torch", "onnxruntime"]
    with torch.no_grad():
        expected = (run_folder[1].model(images).argmax(1) == labels).float().mean()
    assert rows[0].accuracy == pytest.approx(float(expected))
    assert all(row.accuracy > 0.9 for row in rows)


def test_deltas_agreement_and_errors_are_those_of_answers_computed_apart(rows, run_folder, digits):
    images, labels = digits[0][1437:], digits[1][1437:]
    _, reference, artifacts = run_folder
    base = load_runner(reference, 1)(images)
    for row, artifact in zip(rows[1:], artifacts, strict=True):
        logits = load_runner(artifact, 1)(images)
        right, base_right = logits.argmax(1) == labels, base.argmax(1) == labels
        only, other = int((right & ~base_right).sum()), int((~right & base_right).sum())
        assert (row.delta, row.delta_low, row.delta_high) == pytest.approx(paired_difference(only, other, len(labels)))
        assert row.delta == pytest.approx(row.accuracy - rows[0].accuracy)
        assert row.agreement == pytest.approx(float((logits.argmax(1) == base.argmax(1)).float().mean()))
        assert row.max_logit_error == pytest.approx(float((logits - base).abs().max()), abs=1e-5)
    assert rows[1].max_logit_error < 1e-4 < 1e-2 < rows[2].max_logit_error
    assert rows[3].max_logit_error != rows[2].max_logit_error


def test_the_reference_agrees_with_itself_exactly(rows):
    first = rows[0]
    assert (first.delta, first.delta_low, first.delta_high, first.agreement, first.max_logit_error) == (0, 0, 0, 1, 0)


def test_sizes_and_paths_are_those_of_the_files(rows, run_folder):
    folder, reference, artifacts = run_folder
    for row, artifact in zip(rows, [reference, *artifacts], strict=True):
        assert folder / row.file == artifact.path
        assert row.bytes == artifact.path.stat().st_size
        assert (row.params, row.macs, row.note) == (artifact.params, artifact.macs, artifact.note)
    assert rows[3].file == "artifacts/pruned_int8.onnx"
    assert "50.0 % of the weights are zero" in rows[2].note


def test_latencies_are_positive_and_ordered(rows):
    assert all(0 < row.latency_ms_p50 <= row.latency_ms_p95 for row in rows)


def test_the_csv_has_exactly_the_columns_in_order(rows, tmp_path):
    path = tmp_path / "artifacts.csv"
    write_artifacts_csv(rows, path)
    lines = path.read_text().splitlines()
    assert lines[0] == COLUMNS
    table = list(csv.DictReader(lines))
    assert [entry["artifact"] for entry in table] == [row.artifact for row in rows]
    assert float(table[3]["delta_low"]) == pytest.approx(rows[3].delta_low, rel=1e-5)
    assert int(table[0]["bytes"]) == rows[0].bytes
    assert [entry.name for entry in tmp_path.iterdir()] == ["artifacts.csv"]
    assert [entry.name for entry in dataclasses.fields(ProofRow)] == [*COLUMNS.split(","), "note"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(rows, tmp_path):
    with pytest.raises(StorageError):
        write_artifacts_csv(rows, tmp_path / "missing" / "artifacts.csv")


def linear(classes=4, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes)).eval()


def samples(count=40):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn((count, 1, 8, 8), generator=generator)
    return lambda: iter([(images, torch.zeros(count, dtype=torch.int64))])


def test_the_file_is_judged_and_not_the_model_in_memory(tmp_path):
    reference = saved(linear(), tmp_path / "a.safetensors")
    other = saved(linear(), tmp_path / "pruned.safetensors", "pruned")
    weights = load_file(other.path)
    save_file({key: -value for key, value in weights.items()}, other.path)
    before = other.model[1].weight.clone()
    row = prove(reference, [other], samples(), EXAMPLE, threads=1, latency_runs=1)[1]
    assert row.agreement < 0.5
    assert torch.equal(other.model[1].weight, before)


def test_a_float_artifact_with_other_answers_is_refused_by_name_and_a_lossy_one_is_not(tmp_path):
    reference = saved(linear(), tmp_path / "a.safetensors")
    wrong = linear()
    with torch.no_grad():
        wrong[1].weight.neg_()
    artifact = saved(wrong, tmp_path / "b.safetensors", "onnx")
    with pytest.raises(CvtrainError) as caught:
        prove(reference, [artifact], samples(), EXAMPLE, threads=1, latency_runs=1)
    assert all(word in str(caught.value) for word in ["'onnx'", "b.safetensors", "of 40 samples", "99.9 %"])
    for name in ("int8", "pruned", "pruned+int8"):
        lossy = dataclasses.replace(artifact, name=name)
        assert prove(reference, [lossy], samples(), EXAMPLE, threads=1, latency_runs=1)[1].agreement < 0.999


def test_one_flip_in_two_thousand_is_allowed_and_three_are_not(tmp_path):
    flips = torch.eye(2).repeat(1000, 1).view(2000, 1, 1, 2)

    class Lookup(nn.Module):
        """Answers as the picture says, except on pictures scaled above a threshold."""

        def __init__(self, threshold):
            super().__init__()
            self.threshold = nn.Parameter(torch.tensor(threshold))

        def forward(self, images):
            logits = images[:, 0, 0]
            return torch.where(logits.sum(1, keepdim=True) > self.threshold, logits.flip(1), logits)

    for flipped, accepted in [(1, True), (2, True), (3, False)]:
        images = flips.clone()
        images[:flipped] *= 2

        def evaluation(images=images):
            return iter([(images, torch.zeros(2000, dtype=torch.int64))])

        reference = saved(Lookup(9.0), tmp_path / "a.safetensors")
        other = saved(Lookup(1.5), tmp_path / "b.safetensors", "other")
        if accepted:
            rows = prove(reference, [other], evaluation, flips[:1], threads=1, latency_runs=1)
            assert rows[1].agreement == pytest.approx(1 - flipped / 2000)
        else:
            with pytest.raises(CvtrainError, match="not the model"):
                prove(reference, [other], evaluation, flips[:1], threads=1, latency_runs=1)


def test_answers_of_several_labels_are_right_and_the_same_only_as_a_whole(tmp_path):
    reference, other = linear(), linear(seed=1)
    with torch.no_grad():
        for ours, theirs in zip(reference.parameters(), other.parameters(), strict=True):
            theirs.copy_(ours + 0.1 * theirs)
    images, _ = next(samples(300)())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        given, expected = ((model(images) >= 0).numpy() for model in (other, reference))
    labels = torch.from_numpy(expected ^ (torch.rand(expected.shape, generator=generator) < 0.05).numpy()).byte()
    parts = list(zip(images.split(100), labels.split(100), strict=True))
    artifacts = [saved(other, tmp_path / "b.safetensors", "pruned")]
    rows = prove(
        saved(reference, tmp_path / "a.safetensors"),
        artifacts,
        lambda: iter(parts),
        EXAMPLE,
        threads=1,
        latency_runs=1,
        decide=Multilabel(None, [], 4).decide,
    )
    assert [row.accuracy for row in rows] == [accuracy_score(labels, expected), accuracy_score(labels, given)]
    assert rows[1].agreement == accuracy_score(expected, given)
    assert 0.1 < rows[1].accuracy < rows[1].agreement < 0.95


def test_a_nan_logit_shows_in_the_error_and_condemns_a_float_artifact(tmp_path):
    reference = saved(linear(), tmp_path / "a.safetensors")
    broken = linear()
    with torch.no_grad():
        broken[1].bias[0] = float("nan")
    artifact = saved(broken, tmp_path / "b.safetensors", "pruned")
    row = prove(reference, [artifact], samples(), EXAMPLE, threads=1, latency_runs=1)[1]
    assert row.max_logit_error != row.max_logit_error
    with pytest.raises(CvtrainError, match="not the model"):
        float_artifact = dataclasses.replace(artifact, name="onnx")
        prove(reference, [float_artifact], samples(), EXAMPLE, threads=1, latency_runs=1)


def test_a_reference_that_diverged_is_named_as_such(tmp_path):
    broken = linear()
    with torch.no_grad():
        broken[1].bias[0] = float("inf")
    with pytest.raises(DivergedError, match="'fp32' gives logits that are not finite"):
        prove(saved(broken, tmp_path / "a.safetensors"), [], samples(), EXAMPLE, threads=1)


def test_an_empty_evaluation_set_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match="empty"):
        prove(saved(linear(), tmp_path / "a.safetensors"), [], lambda: iter([]), EXAMPLE, threads=1)


def test_weights_of_another_model_are_refused(tmp_path):
    reference = saved(linear(), tmp_path / "a.safetensors")
    other = dataclasses.replace(reference, name="pruned", model=linear(classes=5))
    with pytest.raises(WeightsError, match="does not fit"):
        prove(reference, [other], samples(), EXAMPLE, threads=1)


@pytest.mark.parametrize("content", [None, b"not onnx"])
def test_a_missing_or_damaged_onnx_file_is_a_weights_error(tmp_path, content):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot load .*a\.onnx"):
        load_runner(Artifact("onnx", path, "onnxruntime", 0, 0), 1)


def test_an_unknown_runtime_and_a_missing_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="unknown runtime 'tflite'"):
        load_runner(Artifact("lite", tmp_path / "a", "tflite", 0, 0), 1)
    with pytest.raises(ConfigError, match="needs a model"):
        load_runner(Artifact("fp32", tmp_path / "a", "torch", 0, 0), 1)


def test_a_file_with_a_fixed_batch_of_one_is_proved_on_whole_batches(tmp_path):
    model = linear()
    artifact = Onnx(dynamic=False).export(model, EXAMPLE, tmp_path, {})
    images, _ = next(samples(7)())
    with torch.no_grad():
        assert torch.allclose(load_runner(artifact, 1)(images), model(images), atol=1e-5)


def test_the_thread_count_is_used_and_put_back(tmp_path):
    before, seen = torch.get_num_threads(), []

    class Watching(nn.Linear):
        def forward(self, images):
            seen.append(torch.get_num_threads())
            return super().forward(images.flatten(1))

    chosen = 2 if before == 1 else 1
    prove(saved(Watching(64, 4), tmp_path / "a.safetensors"), [], samples(), EXAMPLE, threads=chosen, latency_runs=1)
    assert set(seen) == {chosen}
    assert torch.get_num_threads() == before


def test_latency_is_measured_in_turn_after_a_warm_up_and_without_garbage_collection():
    calls = []

    def runner(name):
        def run(images):
            calls.append((name, gc.isenabled()))
            return images

        return run

    times = measure_latency([runner("a"), runner("b")], EXAMPLE, runs=3)
    assert [len(measured) for measured in times] == [3, 3]
    timed = calls[-12:]
    assert [name for name, _ in timed] == ["a", "a", "b", "b"] * 3
    assert len(calls) > 12
    assert not any(collecting for _, collecting in timed)
    assert gc.isenabled()
