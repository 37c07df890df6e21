"""Real ImageNet weights, from a package on PyPI: they know what is on real photographs, and they start a run."""

import subprocess
from pathlib import Path

import pytest
import sklearn.datasets

SCRIPT = Path(__file__).parents[2] / "scripts" / "efficientnet-lite0"
PHOTOGRAPHS = Path(sklearn.datasets.__file__).parent / "images"

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    path = tmp_path_factory.mktemp("imagenet") / "lite0.safetensors"
    done = subprocess.run([SCRIPT, path], capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        pytest.skip(f"the weights cannot be had: {done.stderr.strip()}")
    return path


def test_photographs_of_a_palace_and_a_daisy_are_recognised(cvtrain, imagenet):
    answer = cvtrain("predict", f"weights={imagenet}", f"source={PHOTOGRAPHS}", "topk=3", "json=true", "device=cpu")
    assert answer.code == 0, answer.err
    top = {Path(row["file"]).name: [row["label"], row["label_2"], row["label_3"]] for row in answer.json}
    assert any("palace" in label for label in top["china.jpg"]), top
    assert top["flower.jpg"][0].startswith("daisy"), top


def test_a_run_on_other_classes_begins_with_all_but_the_classifier(cvtrain, imagenet):
    answer = cvtrain(
        *("model=timm", "model.name=tf_efficientnet_lite0", f"pretrained={imagenet}", "img_size=32", "epochs=1"),
        *("limit_train_batches=1", "limit_eval_batches=1", "batch_size=8", "compression=none", "export=none"),
        *("logger=none", "device=cpu", "workers=0", "json=true"),
    )
    assert answer.code == 0, answer.err
    assert "conv_stem.weight folded from 3 channels to 1 (summed)" in answer.err
    assert "the classifier classifier starts afresh: 1000 classes in the weights, 10 here" in answer.err
    assert "mean [0.5], std [0.5] of the weights (of 3 channels)" in answer.err
    assert "bicubic" in answer.err
