import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from cvtrain.compression import PruneUnstructured, PtqDynamic, PtqStatic, Qat
from cvtrain.export import Onnx, Safetensors

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture
def composed(tmp_path):
    (tmp_path / "main.yaml").write_text(
        f"hydra: {{searchpath: ['file://{CONFIGS}']}}\ndefaults: [compression: none, export: none, _self_]\n"
    )
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        yield lambda *overrides: compose("main", list(overrides))


def test_none_gives_empty_groups(composed):
    config = composed()
    assert config.compression == {}
    assert config.export == {}


def test_several_options_keep_their_order_and_each_has_its_own_package(composed):
    config = composed("compression=[prune_unstructured,ptq_static]", "export=[onnx,safetensors]")
    assert list(config.compression) == ["prune_unstructured", "ptq_static"]
    assert list(config.export) == ["onnx", "safetensors"]
    turned = composed("compression=[ptq_static,prune_unstructured]")
    assert list(turned.compression) == ["ptq_static", "prune_unstructured"]


def test_options_can_be_set_from_the_command_line_and_build_the_classes(composed):
    config = composed(
        "compression=[prune_unstructured,ptq_static]",
        "export=[onnx,safetensors]",
        "compression.prune_unstructured.sparsity=0.25",
        "compression.ptq_static.method=entropy",
        "export.onnx.opset=18",
    )
    prune, quantize = (instantiate(option) for option in config.compression.values())
    assert isinstance(prune, PruneUnstructured)
    assert isinstance(quantize, PtqStatic)
    assert quantize.settings.method == "entropy"
    onnx, weights = (instantiate(option) for option in config.export.values())
    assert isinstance(onnx, Onnx)
    assert isinstance(weights, Safetensors)
    assert (onnx.opset, onnx.dynamic) == (18, True)


def test_the_shipped_values_are_the_defaults_of_the_classes(composed):
    config = composed("compression=[prune_unstructured,ptq_dynamic,ptq_static,qat]", "export=onnx")
    assert vars(instantiate(config.compression.prune_unstructured)) == vars(PruneUnstructured())
    assert vars(instantiate(config.compression.ptq_dynamic)) == vars(PtqDynamic())
    assert vars(instantiate(config.compression.ptq_static)) == vars(PtqStatic())
    assert vars(instantiate(config.compression.qat)) == vars(Qat())
    assert vars(instantiate(config.export.onnx)) == vars(Onnx())


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("compression/*.yaml")) + sorted(CONFIGS.glob("export/*.yaml")))
def test_every_option_describes_itself_in_a_comment_of_its_own(path):
    comments = [line for line in path.read_text().splitlines()[:2] if not line.startswith("# @")]
    assert len(comments) == 1
    assert comments[0].startswith("# ")


def test_importing_the_packages_loads_no_onnx_library():
    code = (
        "import sys, cvtrain.compression, cvtrain.export, cvtrain.evaluation;"
        "print([m for m in ('onnx', 'onnxruntime', 'onnxscript', 'onnx_ir') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
