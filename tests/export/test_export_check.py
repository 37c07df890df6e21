"""How far a file's answers may be from the network's."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from cvtrain.export import check
from cvtrain.export.network import Prepared
from cvtrain.export.writing import ExportError
from cvtrain.runtime.base import Loaded


class Cancelling(nn.Module):
    """Adds what it subtracts again: its last digits are rounding."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    def forward(self, images):
        large = images.flatten(1)[:, :4] * self.times
        return (large + torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=images.dtype)) - large


@pytest.fixture
def answering(monkeypatch):
    """Let a file answer as `prepared` does, and `off` by so much."""

    def put(prepared, off):
        def forward(pixels):
            return prepared.network(torch.from_numpy(pixels)).numpy() + off

        monkeypatch.setattr(check.runtimes, "load", lambda *_: Loaded(forward, {}))

    return put


def test_a_network_that_magnifies_rounding_may_differ_by_what_rounding_does_and_no_more(answering):
    prepared = Prepared(Cancelling(2e4), torch.zeros(1, 1, 2, 2), {})
    answering(prepared, 2e-3)
    check.compare(prepared, Path("file"), "onnxruntime")
    answering(prepared, 0.02)
    with pytest.raises(ExportError, match="differ"):
        check.compare(prepared, Path("file"), "onnxruntime")
    plain = dataclasses.replace(prepared, network=Cancelling(1.0))
    answering(plain, 2e-3)
    with pytest.raises(ExportError, match=r"allowed is 0\.0001"):
        check.compare(plain, Path("file"), "onnxruntime")
