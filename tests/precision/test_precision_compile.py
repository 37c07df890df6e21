"""compile=true: the same training, the same weights' names, exact resume, and a clear error without a compiler."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
import torch._inductor.config  # reads CXX once
from engine_parts import CPU, Watching, make_run, snapshot

from cvtrain.averaging import Ema
from cvtrain.engine.loop import evaluate, fit
from cvtrain.errors import ConfigError, Interrupted
from cvtrain.precision import Amp, Bf16, Fp32, Tf32
from cvtrain.precision.compiling import compiled

pytestmark = pytest.mark.usefixtures("one_thread")


class Counting:
    """A backend that runs what it is given as it is, and counts how often it is asked."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


def test_without_a_compiler_compile_is_refused_with_the_fix(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match=r"compile=true: .* absent: install it .*or use compile=false") as caught:
        compiled(nn.Linear(1, 1), CPU)
    assert len(str(caught.value).splitlines()) <= 3
    monkeypatch.setenv("CXX", "/nowhere/clang++ -O2")
    with pytest.raises(ConfigError, match="compiled by /nowhere/clang"):
        compiled(nn.Linear(1, 1), CPU)


def test_without_triton_compile_is_refused_on_a_gpu(monkeypatch):
    monkeypatch.setattr("cvtrain.precision.compiling.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton, or use compile=false"):
        compiled(nn.Linear(1, 1), torch.device("cuda"))


def test_a_run_without_a_compiler_ends_before_its_first_epoch(cvtrain, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    answer = cvtrain("compile=true", "debug=fdr", "compression=none", "export=none", "logger=none")
    assert answer.code == 2
    assert "compile=true: kernels are compiled by no-such-compiler, which is absent" in answer.err
    assert "Traceback" not in answer.err
    assert "epoch" not in answer.out


def test_only_the_training_step_is_compiled_and_names_stay(tmp_path):
    backend = Counting()
    run = make_run(tmp_path, mix=False, epochs=1)
    names = list(run.model.state_dict())
    run.wrapped = torch.compile(run.model, backend=backend, dynamic=False)
    evaluate(run, "val")
    assert backend.graphs == 0
    fit(run)
    assert backend.graphs == 2  # 22 pictures: batches of 4, and a last one of 2
    assert list(run.model.state_dict()) == names
    tensors, _ = run.checkpoints.read("last.safetensors")
    assert {key.removeprefix("model/") for key in tensors if key.startswith("model/")} == set(names)


PARTS = {
    "fp32": lambda: {"precision": Fp32()},
    "tf32": lambda: {"precision": Tf32()},
    "bf16": lambda: {"precision": Bf16()},
    "amp": lambda: {"precision": Amp(probe=False)},
    "contiguous": lambda: {"channels_last": False},
    "ema and accumulation": lambda: {"averaging": Ema(), "grad_accum_steps": 2},
}


def compiled_run(folder, parts, **changes):
    options = {"grad_accum_steps": 1, "epochs": 2, **PARTS[parts](), **changes}
    run = make_run(folder, **options)
    run.precision.setup(CPU, run.model, lambda trial: trial(torch.zeros(2, 1, 6, 6)).sum())
    run.averaging.begin(run.model)
    run.wrapped = compiled(run.model, CPU)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("parts", PARTS)
def test_a_compiled_run_that_is_resumed_equals_one_that_was_not_and_follows_the_plain_one(tmp_path, parts):
    whole = compiled_run(tmp_path / "whole", parts)
    fit(whole)

    def stop_after_five(run):
        if run.state.step == 5:
            run.stop._signal = 15

    broken = compiled_run(tmp_path / "broken", parts, display=Watching(stop_after_five))
    with pytest.raises(Interrupted):
        fit(broken)
    torch._dynamo.reset()
    resumed = compiled_run(tmp_path / "broken", parts, weights_seed=7)
    assert resumed.checkpoints.restore(resumed) is not None
    assert resumed.state.step == 5
    fit(resumed)
    assert snapshot(resumed) == snapshot(whole)

    plain = compiled_run(tmp_path / "plain", parts, weights_seed=0)
    plain.wrapped = None
    fit(plain)
    for row, expected in zip(whole.state.history, plain.state.history, strict=True):
        assert row["train/loss"] == pytest.approx(expected["train/loss"], rel=0.15)
