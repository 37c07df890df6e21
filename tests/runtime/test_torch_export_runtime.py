"""Files that are missing or damaged, and what loading must not do, for the runtimes that read archives."""

import sys
import warnings

import pytest
import torch
from torch import nn

from cvtrain import runtime as runtimes
from cvtrain.core.runtimes import OPENVINO, TORCH_EXPORT, TORCHSCRIPT
from cvtrain.errors import WeightsError
from cvtrain.export import OpenVINO, TorchExport, TorchScript

KINDS = {TORCH_EXPORT: TorchExport, TORCHSCRIPT: TorchScript, OPENVINO: OpenVINO}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runtimes")
    model = nn.Sequential(nn.Conv2d(3, 4, 8), nn.Flatten()).eval()
    return {
        name: exporter().export(model, torch.zeros(1, 3, 8, 8), folder, {"git": "x"}).path
        for name, exporter in KINDS.items()
    }


@pytest.mark.parametrize("runtime", KINDS)
def test_a_missing_file_and_a_torn_one_are_weights_errors_that_name_it(runtime, files, tmp_path):
    with pytest.raises(WeightsError, match=r"no file at .*gone"):
        runtimes.load(runtime, tmp_path / "gone", 1)
    torn = tmp_path / files[runtime].name
    torn.write_bytes(files[runtime].read_bytes()[: files[runtime].stat().st_size // 2])
    with pytest.raises(WeightsError, match=f"{runtime} cannot load .*{torn.name}"):
        runtimes.load(runtime, torn, 1)


def test_an_openvino_graph_without_its_weights_is_a_weights_error(files, tmp_path):
    alone = tmp_path / "model.xml"
    alone.write_bytes(files[OPENVINO].read_bytes())
    with pytest.raises(WeightsError, match=r"openvino cannot load .*model\.xml"):
        runtimes.load(OPENVINO, alone, 1)


def test_openvino_is_imported_without_its_telemetry(files):
    runtimes.load(OPENVINO, files[OPENVINO], 1)
    assert sys.modules["openvino_telemetry"] is None


@pytest.mark.parametrize("runtime", KINDS)
def test_loading_warns_of_nothing(runtime, files, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = runtimes.load(runtime, files[runtime], 1)
        loaded.forward(torch.ones(2, 3, 8, 8).numpy())
    assert loaded.metadata == {"git": "x"}
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("runtime", [TORCH_EXPORT, TORCHSCRIPT])
def test_threads_are_set_as_asked(runtime, files):
    runtimes.load(runtime, files[runtime], 2)
    assert torch.get_num_threads() == 2
