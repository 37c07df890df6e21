"""The proof on linear models of real digits; most run in this process, which costs milliseconds."""

import csv
import dataclasses
import functools
import gzip
import hashlib
import os
import signal
import threading
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from artifact_files import described, write_linear
from onnx import numpy_helper
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score

from cvtrain.command.worker import in_process, isolated
from cvtrain.core.types import Preprocess
from cvtrain.engine.signals import StopRequest
from cvtrain.errors import (
    CvtrainError,
    DataError,
    DivergedError,
    Interrupted,
    StorageError,
    WeightsError,
    WorkerError,
)
from cvtrain.evaluation import EvaluationSet, paired_bootstrap, read_artifacts_csv, write_artifacts_csv
from cvtrain.evaluation import prove as prove_slowly
from cvtrain.evaluation.table import weigh
from cvtrain.task import Multilabel

COLUMNS = (
    "artifact,file,runtime,accuracy,delta,delta_low,delta_high,agreement,max_logit_error,ece,params,macs,bytes,"
    "gzip_bytes,latency_ms_p50,latency_ms_p95,batch,latency_batch_ms_p50,latency_batch_ms_p95,memory_mb,sha256,exact,note"
)
NAMES = [f"digit {i}" for i in range(10)]
PREP = Preprocess(8, 8, 1, (0.3,), (0.38,))
METADATA = described(NAMES, PREP)
HERE = in_process(1)
prove = functools.partial(prove_slowly, batch=4, runs=3)


@dataclasses.dataclass
class Trained:
    weight: np.ndarray
    bias: np.ndarray
    images: torch.Tensor
    """uint8 test pictures."""
    labels: torch.Tensor

    def logits(self, weight=None):
        """Computed apart, in float64."""
        pixels = (self.images.numpy().reshape(-1, 64) / 255 - 0.3) / 0.38
        return pixels @ (self.weight if weight is None else weight).T + self.bias


@pytest.fixture(scope="module")
def trained():
    data = load_digits()
    images = np.clip(data.images * 16, 0, 255).astype(np.uint8)
    pixels = (images.reshape(-1, 64) / 255 - 0.3) / 0.38
    fitted = LogisticRegression(C=0.01, max_iter=300).fit(pixels[:1000], data.target[:1000])
    tensors = torch.from_numpy(images[1000:]).unsqueeze(1), torch.from_numpy(data.target[1000:])
    return Trained(fitted.coef_.astype(np.float32), fitted.intercept_.astype(np.float32), *tensors)


@pytest.fixture
def test_set(trained):
    def batches():
        return zip(trained.images.split(200), trained.labels.split(200), strict=True)

    return EvaluationSet(batches, NAMES, lambda logits: logits.argmax(1))


@pytest.fixture
def write(trained, tmp_path):
    """Write an artifact of the trained model, or of another one."""

    def write(name, weight=None, metadata=METADATA, exact=True, **options):
        weight = trained.weight if weight is None else weight
        return write_linear(tmp_path / f"{name}.onnx", weight, trained.bias, metadata, None, name, exact, **options)

    return write


@pytest.fixture
def coarse(trained):
    """Weights of two bits: what compression might leave."""
    return np.round(trained.weight * 8).astype(np.float32) / 8


def expected_error(probabilities, labels):
    """The expected calibration error, bin by bin."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    error = 0.0
    for low in range(15):
        inside = (sure >= low / 15) & (sure < (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(sure[inside].mean() - right[inside].mean())
    return error


def softmax(logits):
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_every_column_of_judgement_is_what_numpy_and_scikit_learn_compute(trained, test_set, write, coarse):
    metadata = {**METADATA, "temperature": "0.5"}
    lossy = write("lossy", coarse, metadata, exact=False)
    proof = prove(write("fp32", None, metadata), [write("onnx", None, metadata), lossy], test_set, HERE)
    labels, logits, other = trained.labels.numpy(), trained.logits(), trained.logits(coarse)
    first, same, row = proof.rows
    assert [each.artifact for each in proof.rows] == ["fp32", "onnx", "lossy"] and not proof.failures
    assert first.accuracy == same.accuracy == accuracy_score(labels, logits.argmax(1)) > 0.85
    assert (first.delta, first.delta_low, first.delta_high, first.max_logit_error) == (0, 0, 0, 0)
    assert (same.delta, same.agreement) == (0, 1) and same.delta_low < 0 < same.delta_high
    assert first.ece == same.ece == pytest.approx(expected_error(softmax(2 * logits), labels), abs=1e-6)
    assert row.ece == pytest.approx(expected_error(softmax(2 * other), labels), abs=1e-6)
    assert row.accuracy == accuracy_score(labels, other.argmax(1)) != first.accuracy
    assert row.agreement == accuracy_score(logits.argmax(1), other.argmax(1)) < 1
    assert row.max_logit_error == pytest.approx(np.abs(other - logits).max(), rel=1e-4)
    right, base_right = other.argmax(1) == labels, logits.argmax(1) == labels
    only, missed = int((right & ~base_right).sum()), int((base_right & ~right).sum())
    assert (row.delta, row.delta_low, row.delta_high) == paired_bootstrap(only, missed, len(labels))
    assert row.delta == pytest.approx(row.accuracy - first.accuracy)
    assert [each.exact for each in proof.rows] == [True, True, False]
    assert all(0 < each.latency_ms_p50 <= each.latency_ms_p95 for each in proof.rows)
    assert all(0 < each.latency_batch_ms_p50 <= each.latency_batch_ms_p95 and each.batch == 4 for each in proof.rows)
    assert all(each.memory_mb != each.memory_mb for each in proof.rows)


def change_one_weight(artifact):
    """Flip the sign of the largest weight inside the file."""
    model = onnx.load(artifact.path)
    (stored,) = (tensor for tensor in model.graph.initializer if tensor.name == "weight")
    values = numpy_helper.to_array(stored).copy()
    values.flat[np.abs(values).argmax()] *= -1
    stored.CopyFrom(numpy_helper.from_array(values, "weight"))
    onnx.save(model, artifact.path)


def sabotaged(write, name, what, exact=True):
    metadata = {
        "mean": described(NAMES, dataclasses.replace(PREP, mean=(0.0,))),
        "std": described(NAMES, dataclasses.replace(PREP, std=(0.5,))),
        "names": described([*NAMES[1:], NAMES[0]], PREP),
    }.get(what, METADATA)
    artifact = write(name, None, metadata, exact)
    if what == "weight":
        change_one_weight(artifact)
    return artifact


WORDS = {
    "mean": r"mean=\[0\.0\], that of 'fp32' mean=\[0\.3\]",
    "std": r"std=\[0\.5\], that of 'fp32' std=\[0\.38\]",
    "names": "class names are in another order: class 0 is 'digit 1', in 'fp32' 'digit 0'",
    "weight": "Class names and preprocessing are the same; its weights or its graph differ",
}


def test_each_sabotage_is_caught_in_a_process_of_its_own_and_named(test_set, write):
    artifacts = [sabotaged(write, what, what) for what in WORDS]
    proof = prove(write("fp32"), [*artifacts, write("good")], test_set, isolated(1))
    assert [row.artifact for row in proof.rows] == ["fp32", "good"]
    assert all(0 < row.memory_mb < 100 for row in proof.rows)
    assert [artifact.name for artifact, _ in proof.failures] == list(WORDS)
    for artifact, error in proof.failures:
        with pytest.raises(CvtrainError, match=WORDS[artifact.name]):
            raise error
        assert f"artifact '{artifact.name}' is not the model it was made from: {artifact.path}" in str(error)
        assert "of 797 samples" in str(error) and "logits off by up to" in str(error)
        assert len(str(error).splitlines()) == 3


@pytest.mark.parametrize("what", ["mean", "std", "names"])
def test_wrong_metadata_of_a_compressed_artifact_are_caught_though_its_answers_may_differ(test_set, write, what):
    ((_, error),) = prove(write("fp32"), [sabotaged(write, "int8", what, exact=False)], test_set, HERE).failures
    with pytest.raises(CvtrainError, match=f"(?s)'int8'.*int8.onnx would be used wrongly.*{WORDS[what]}"):
        raise error


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        (described(NAMES, dataclasses.replace(PREP, resize=10)), "resize=10"),
        (described(NAMES, dataclasses.replace(PREP, interpolation="bicubic")), "interpolation=bicubic"),
        ({**METADATA, "temperature": "2"}, "Its temperature is 2, that of 'fp32' None"),
        ({**METADATA, "task": "multilabel"}, "Its task is multilabel"),
    ],
    ids=["resize", "interpolation", "temperature", "task"],
)
def test_a_file_that_would_be_used_otherwise_is_caught_though_it_answers_the_same(test_set, write, metadata, words):
    ((_, error),) = prove(write("fp32"), [write("onnx", None, metadata)], test_set, HERE).failures
    assert words in str(error)


def test_classes_in_another_order_are_right_when_the_columns_are_too(trained, test_set, write, tmp_path):
    order = np.roll(np.arange(10), 3)
    metadata = described([NAMES[i] for i in order], PREP)
    turned = write_linear(tmp_path / "turned.onnx", trained.weight[order], trained.bias[order], metadata)
    proof = prove(write("fp32"), [turned], test_set, HERE)
    assert [row.agreement for row in proof.rows] == [1, 1]


def test_a_file_of_other_classes_is_refused_with_those_that_differ(test_set, write):
    metadata = described([*NAMES[:9], "cat"], PREP)
    ((_, error),) = prove(write("fp32"), [write("onnx", None, metadata)], test_set, HERE).failures
    assert all(word in str(error) for word in ("'onnx' is not of this run", "['cat']", "['digit 9']"))


def test_logits_that_are_off_condemn_an_exact_file_whose_answers_are_all_the_same(trained, test_set, write, tmp_path):
    largest = np.abs(trained.logits()).max()
    for factor, caught in ((0.9e-3, False), (1.1e-3, True)):
        moved = write_linear(tmp_path / "moved.onnx", trained.weight, trained.bias + factor * largest, METADATA)
        failures = prove(write("fp32"), [moved], test_set, HERE).failures
        assert bool(failures) == caught


def test_one_flip_in_two_thousand_is_allowed_and_three_are_not(tmp_path):
    prep = Preprocess(1, 1, 2, (0.0, 0.0), (1 / 255, 1 / 255))  # logits are the bytes
    metadata = described("ab", prep)
    reference = write_linear(tmp_path / "a.onnx", np.eye(2), np.array([0.1, 0.0]), metadata)
    # Answers otherwise where both bytes are the same; 0.2 is within the tolerance of logits up to 255.
    other = write_linear(tmp_path / "b.onnx", np.eye(2), np.array([-0.1, 0.0]), metadata)
    for equal, accepted in [(1, True), (2, True), (3, False)]:
        images = torch.tensor([[7, 7]] * equal + [[255, 0]] * (2000 - equal), dtype=torch.uint8).view(-1, 2, 1, 1)
        batches = functools.partial(lambda images: iter([(images, torch.zeros(2000, dtype=torch.int64))]), images)
        evaluation = EvaluationSet(batches, ["a", "b"], lambda logits: logits.argmax(1))
        proof = prove(reference, [other], evaluation, HERE)
        assert [row.agreement for row in proof.rows[1:]] == [pytest.approx(1 - equal / 2000)] * accepted


def test_answers_of_several_labels_are_right_and_the_same_only_as_a_whole(trained, test_set, write, coarse):
    logits, other = trained.logits(), trained.logits(coarse)
    labels = (logits >= 0) ^ (np.random.default_rng(0).random(logits.shape) < 0.02)
    parts = list(zip(trained.images.split(200), torch.from_numpy(labels).byte().split(200), strict=True))
    evaluation = EvaluationSet(lambda: iter(parts), NAMES, Multilabel(None, [], 10).decide)
    rows = prove(write("fp32"), [write("int8", coarse, exact=False)], evaluation, HERE).rows
    assert [row.accuracy for row in rows] == [accuracy_score(labels, given >= 0) for given in (logits, other)]
    assert rows[1].agreement == accuracy_score(logits >= 0, other >= 0)
    assert 0.1 < rows[1].accuracy < rows[1].agreement < 1
    sure, error = 1 / (1 + np.exp(-logits)), 0.0
    for low in range(15):
        inside = (sure >= low / 15) & (sure < (low + 1) / 15)
        error += abs((sure[inside] - labels[inside]).sum()) / sure.size
    assert rows[0].ece == pytest.approx(error, abs=1e-6)


def test_a_file_that_takes_bytes_and_gives_probabilities_is_compared_by_probabilities(
    trained, test_set, write, tmp_path
):
    scale, shift = 1 / (255 * 0.38), -0.3 / 0.38
    weight, bias = trained.weight * scale / 2, (trained.bias + shift * trained.weight.sum(1)) / 2
    metadata = {**METADATA, "temperature": "2.0"}
    path = tmp_path / "embedded.onnx"
    embedded = write_linear(path, weight, bias, metadata, name="embedded", embed=True)
    first, row = prove(write("fp32", None, metadata), [embedded], test_set, HERE).rows
    assert (row.agreement, row.accuracy) == (1, first.accuracy)
    assert row.ece == pytest.approx(first.ece, abs=1e-6)
    assert 0 < row.max_logit_error < 1e-5
    wrong = write_linear(
        tmp_path / "embedded.onnx", weight, bias + np.eye(10)[3], metadata, name="embedded", embed=True
    )
    ((_, error),) = prove(write("fp32", None, metadata), [wrong], test_set, HERE).failures
    assert "probabilities off by up to" in str(error) and "(at most 0.001)" in str(error)


def test_a_nan_logit_shows_in_the_error_and_condemns_an_exact_artifact(trained, test_set, write):
    broken = trained.weight.copy()
    broken[0, 0] = np.nan
    proof = prove(write("fp32"), [write("int8", broken, exact=False), write("onnx", broken)], test_set, HERE)
    assert proof.rows[1].max_logit_error != proof.rows[1].max_logit_error
    assert [artifact.name for artifact, _ in proof.failures] == ["onnx"]
    with pytest.raises(DivergedError, match="'fp32' gives logits that are not finite"):
        prove(write("fp32", broken), [], test_set, HERE)


def test_an_empty_evaluation_set_is_a_data_error(test_set, write):
    with pytest.raises(DataError, match="empty"):
        prove(write("fp32"), [], dataclasses.replace(test_set, batches=lambda: iter([])), HERE)


def test_a_damaged_file_leaves_the_others_their_proof_and_as_the_reference_ends_it(test_set, write):
    reference, damaged = write("fp32"), write("onnx")
    damaged.path.write_bytes(b"not onnx")
    proof = prove(reference, [damaged, write("good")], test_set, HERE)
    assert [row.artifact for row in proof.rows] == ["fp32", "good"]
    assert isinstance(proof.failures[0][1], WeightsError)
    with pytest.raises(WeightsError, match="cannot load"):
        prove(damaged, [reference], test_set, HERE)


@pytest.mark.parametrize("when", ["evaluation", "latency"])
def test_a_child_that_is_killed_leaves_the_others_their_proof(test_set, write, when):
    children = {}

    def start(artifact):
        children[artifact.name] = isolated(1)(artifact)
        return children[artifact.name]

    def batches():
        *first, last = test_set.batches()
        yield from first
        if when == "evaluation":
            os.kill(children["onnx"].pid, signal.SIGKILL)
        yield last
        if when == "latency":
            os.kill(children["onnx"].pid, signal.SIGKILL)

    proof = prove(write("fp32"), [write("onnx"), write("good")], dataclasses.replace(test_set, batches=batches), start)
    assert [row.artifact for row in proof.rows] == ["fp32", "good"]
    ((artifact, error),) = proof.failures
    assert artifact.name == "onnx" and isinstance(error, WorkerError) and "'onnx'" in str(error)
    assert all(not Path(f"/proc/{child.pid}").exists() for child in children.values())


def test_a_request_to_stop_ends_the_proof_and_its_children(test_set, write):
    children = []

    def start(artifact):
        children.append(isolated(1)(artifact))
        return children[-1]

    def batches():
        yield from test_set.batches()
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()

    with pytest.raises(Interrupted) as caught, StopRequest():
        prove(write("fp32"), [write("onnx")], dataclasses.replace(test_set, batches=batches), start, runs=10**7)
    assert caught.value.exit_code == 143
    assert all(not Path(f"/proc/{child.pid}").exists() for child in children)


@pytest.fixture
def table(test_set, write, tmp_path, coarse):
    artifacts = [dataclasses.replace(write("int8", coarse, exact=False), note='8 bits, "per channel"')]
    rows = prove(write("fp32"), artifacts, test_set, HERE, run_folder=tmp_path).rows
    write_artifacts_csv(rows, tmp_path / "artifacts.csv")
    return rows, [write("fp32"), *artifacts]


def test_the_table_has_exactly_the_columns_in_order_and_sizes_and_hashes_of_the_files(table, tmp_path):
    lines = (tmp_path / "artifacts.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    for entry, row in zip(csv.DictReader(lines), table[0], strict=True):
        content = (tmp_path / entry["file"]).read_bytes()
        assert int(entry["bytes"]) == row.bytes == len(content)
        assert int(entry["gzip_bytes"]) == len(gzip.compress(content, 6))
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert float(entry["delta_low"]) == pytest.approx(row.delta_low, rel=1e-5)
        assert entry["file"] == f"{row.artifact}.onnx"


def test_the_table_is_the_index_of_a_folder_that_may_move(table, tmp_path):
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "-moved"))
    expected = [dataclasses.replace(each, path=moved / each.path.name) for each in table[1]]
    assert read_artifacts_csv(moved / "artifacts.csv") == expected


def test_a_file_that_is_missing_or_has_changed_is_named(table, tmp_path):
    path = table[1][1].path
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(WeightsError, match=r"int8\.onnx has changed since it was proved"):
        read_artifacts_csv(tmp_path / "artifacts.csv")
    path.unlink()
    with pytest.raises(WeightsError, match=r"int8\.onnx is missing"):
        read_artifacts_csv(tmp_path / "artifacts.csv")


@pytest.mark.parametrize("text", [None, "artifact,file\nfp32,a\n", "a\0b", f"{COLUMNS}\nfp32,a,onnx\n"])
def test_a_table_that_is_missing_damaged_or_older_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "artifacts.csv").write_text(text)
    with pytest.raises(WeightsError, match="is no list of artifacts"):
        read_artifacts_csv(tmp_path / "artifacts.csv")


def test_a_folder_that_cannot_be_written_is_a_storage_error(table, tmp_path):
    with pytest.raises(StorageError):
        write_artifacts_csv(table[0], tmp_path / "missing" / "artifacts.csv")


@pytest.mark.parametrize(("name", "beside"), [("m.xml", "m.bin"), ("m.onnx", "m.onnx.data")])
def test_weights_beside_a_file_count_as_a_part_of_it(tmp_path, name, beside):
    (tmp_path / name).write_bytes(b"graph")
    alone = weigh(tmp_path / name)
    (tmp_path / beside).write_bytes(b"weights")
    both = weigh(tmp_path / name)
    assert (alone.size, alone.sha256) == (5, hashlib.sha256(b"graph").hexdigest())
    assert (both.size, both.sha256) == (12, hashlib.sha256(b"graphweights").hexdigest())
