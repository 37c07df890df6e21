import pytest

from cvtrain.compression import PruneUnstructured, PtqStatic, check_order, run_steps
from cvtrain.core.artifact import Artifact, Compressed
from cvtrain.errors import ConfigError


class Recorder:
    def __init__(self, label, model="same"):
        self.label = label
        self.model = model
        self.calls = []

    def apply(self, model, name, context):
        self.calls.append((model, name))
        artifact = Artifact(name, context.folder / name, "torch", 0, 0)
        return Compressed(model if self.model == "same" else self.model, artifact)


def test_steps_run_in_order_each_on_the_result_of_the_one_before(model, make_context):
    other = object()
    first, second = Recorder("a", model=other), Recorder("b")
    artifacts = run_steps({"one": first, "two": second}, model, make_context())
    assert [artifact.name for artifact in artifacts] == ["a", "a+b"]
    assert first.calls == [(model, "a")]
    assert second.calls == [(other, "a+b")]


def test_no_steps_give_no_artifacts(model, make_context):
    assert run_steps({}, model, make_context()) == []


def test_pruning_then_quantizing_gives_both_files(model, make_context, tmp_path):
    steps = {"prune_unstructured": PruneUnstructured(), "ptq_static": PtqStatic(calibration_samples=32)}
    artifacts = run_steps(steps, model, make_context())
    assert [artifact.name for artifact in artifacts] == ["pruned", "pruned+int8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.safetensors", "pruned_int8.onnx"]


def test_quantizing_before_pruning_is_refused_before_any_work(model, make_context, tmp_path):
    trained = []
    steps = {"ptq_static": PtqStatic(), "prune_unstructured": PruneUnstructured()}
    with pytest.raises(ConfigError) as caught:
        run_steps(steps, model, make_context(finetune=lambda *_: trained.append(1)))
    message = str(caught.value)
    assert "'prune_unstructured' cannot follow 'ptq_static'" in message
    assert "compression=[prune_unstructured,ptq_static]" in message
    assert trained == []
    assert list(tmp_path.iterdir()) == []


def test_a_plugin_step_that_ends_the_chain_is_found_when_it_does(model, make_context):
    last, follower = Recorder("last", model=None), Recorder("b")
    check_order({"mine": last, "other": follower})
    with pytest.raises(ConfigError, match="'other' cannot follow 'mine'"):
        run_steps({"mine": last, "other": follower}, model, make_context())
    assert follower.calls == []
