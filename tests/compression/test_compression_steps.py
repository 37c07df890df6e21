import pytest

from cvtrain.compression import Chain, PruneUnstructured, PtqStatic, artifact_file
from cvtrain.core.artifact import Artifact, Compressed
from cvtrain.errors import CvtrainError


class Recorder:
    """A step that gives `model`, or fails."""

    def __init__(self, label, model=None, smaller=False, fails=False):
        self.label, self.model, self.smaller, self.fails = label, model, smaller, fails
        self.calls = []

    def apply(self, model, name, context):
        self.calls.append((model, name))
        if self.fails:
            raise CvtrainError("no")
        artifact = Artifact(name, context.folder / artifact_file(name, ".bin"), "torch", 0, 0)
        return Compressed((artifact,), self.model, self.smaller)


def test_each_step_works_on_what_the_last_one_that_changed_the_model_made(model, make_context):
    pruned, again = object(), object()
    steps = [Recorder("int8"), Recorder("pruned", pruned), Recorder("int8d"), Recorder("half", again), Recorder("qat")]
    chain = Chain(model, make_context())
    names = [chain.apply(step).artifacts[-1].name for step in steps]
    assert names == ["int8", "pruned", "pruned+int8d", "pruned+half", "pruned+half+qat"]
    assert [step.calls[0][0] for step in steps] == [model, model, pruned, pruned, again]
    assert (chain.model, chain.name) == (again, "pruned+half")


def test_the_last_smaller_network_is_kept_with_its_name(model, make_context):
    first, second, masked = object(), object(), object()
    chain = Chain(model, make_context())
    assert chain.smaller is None
    for step in (Recorder("a", first, smaller=True), Recorder("b", second, smaller=True), Recorder("c", masked)):
        chain.apply(step)
    chain.apply(Recorder("int8"))
    assert chain.smaller == ("a+b", second)


def test_a_step_that_fails_leaves_the_chain_as_it_was(model, make_context):
    chain, behind = Chain(model, make_context()), Recorder("int8")
    with pytest.raises(CvtrainError):
        chain.apply(Recorder("pruned", object(), smaller=True, fails=True))
    chain.apply(behind)
    assert behind.calls == [(model, "int8")]
    assert (chain.model, chain.name, chain.smaller) == (model, "", None)


def test_pruning_then_quantizing_gives_both_files(model, make_context, tmp_path):
    chain = Chain(model, make_context())
    steps = (PruneUnstructured(), PtqStatic(calibration_samples=32))
    assert [chain.apply(step).artifacts[-1].name for step in steps] == ["pruned", "pruned+int8"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned.safetensors", "pruned_int8.onnx"]
