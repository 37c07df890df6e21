import gc
import os
import subprocess
import sys

import numpy as np
import pytest
from artifact_files import described, write_linear

from cvtrain import runtime
from cvtrain.core.types import Preprocess
from cvtrain.errors import ConfigError, WeightsError
from cvtrain.runtime.session import clocked

PREP = Preprocess(4, 4, 1, (0.0,), (1.0,))
RNG = np.random.default_rng(0)
WEIGHT, BIAS = RNG.normal(size=(3, 16)).astype(np.float32), RNG.normal(size=3).astype(np.float32)


@pytest.mark.parametrize("batch", [None, 1, 3], ids=["any_batch", "batch_of_one", "batch_of_three"])
def test_a_file_gives_the_logits_of_its_weights_at_every_batch_it_takes(tmp_path, batch):
    metadata = described("abc", PREP, git="0123")
    artifact = write_linear(tmp_path / "a.onnx", WEIGHT, BIAS, metadata, batch)
    loaded = runtime.load(artifact.runtime, artifact.path, 1)
    images = RNG.normal(size=(6, 1, 4, 4)).astype(np.float32)
    assert np.allclose(loaded.forward(images), images.reshape(6, 16) @ WEIGHT.T + BIAS, atol=1e-5)
    assert (loaded.metadata, loaded.embedded) == (metadata, False)


def test_what_is_embedded_is_told(tmp_path):
    artifact = write_linear(tmp_path / "a.onnx", WEIGHT, BIAS, described("abc", PREP), embed=True)
    loaded = runtime.load(artifact.runtime, artifact.path, 1)
    assert loaded.embedded
    assert loaded.forward(np.zeros((2, 1, 4, 4), dtype=np.uint8)).sum(1) == pytest.approx([1, 1])


@pytest.mark.parametrize("content", [None, b"not onnx"], ids=["missing", "damaged"])
def test_a_file_that_cannot_be_loaded_is_a_weights_error_and_prints_nothing(tmp_path, content, capfd):
    path = tmp_path / "a.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WeightsError, match=r"cannot load .*a\.onnx"):
        runtime.load("onnxruntime", path, 1)
    assert capfd.readouterr() == ("", "")


def test_an_unknown_runtime_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown runtime 'onnx'; did you mean 'onnxruntime'.*openvino"):
        runtime.load("onnx", tmp_path / "a", 1)


def test_a_clock_leaves_the_first_call_out_and_the_garbage_collector_alone():
    collecting = []
    assert len(clocked(lambda: collecting.append(gc.isenabled()), 4)) == 4
    assert collecting == [False] * 5
    assert gc.isenabled()


def test_onnx_runtime_keeps_no_identifier_of_the_machine(tmp_path):
    artifact = write_linear(tmp_path / "a.onnx", WEIGHT, BIAS, described("abc", PREP))
    home = tmp_path / "home"
    home.mkdir()
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("ORT_", "PYTEST", "CI"))}
    load = f"runtime.load('onnxruntime', Path({str(artifact.path)!r}), 1)"
    code = f"from pathlib import Path; from cvtrain import runtime; {load}"
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={**kept, "HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    )
    assert not list(home.rglob("*"))
