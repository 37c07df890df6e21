"""Preprocessing and probabilities around a network, held against the same written out in NumPy."""

import copy

import numpy as np
import pytest
import torch
from export_parts import EXAMPLE, METADATA, logits_by_hand, pictures, tiny

from cvtrain.export.network import prepare


def embedded(images, **changes):
    ready = prepare(tiny(), EXAMPLE, {**METADATA, **changes}, embed_preprocessing=True)
    assert ready.images.shape == (1, 3, 11, 11)
    assert ready.metadata["embedded"] == "true"
    with torch.no_grad():
        return ready.network(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize(("changes", "temperature"), [({}, 1.0), ({"temperature": "2.5"}, 2.5)])
def test_a_picture_as_it_is_read_gives_the_probabilities_of_a_softmax_at_the_temperature(changes, temperature):
    images = pictures(5)
    powers = np.exp(logits_by_hand(tiny(), images) / temperature)
    assert np.abs(embedded(images, **changes) - powers / powers.sum(1, keepdims=True)).max() < 1e-6


def test_a_multilabel_network_gives_each_class_a_probability_of_its_own():
    images = pictures(5)
    expected = 1 / (1 + np.exp(-logits_by_hand(tiny(), images) / 0.5))
    found = embedded(images, task="multilabel", temperature="0.5")
    assert np.abs(found - expected).max() < 1e-6
    assert not np.allclose(found.sum(1), 1)


def test_what_is_written_is_a_copy_in_eval_mode_and_the_model_is_left_alone():
    model = tiny().train().to(memory_format=torch.channels_last)
    model[0].eval()
    before = copy.deepcopy(model.state_dict())
    ready = prepare(model, EXAMPLE, METADATA)
    assert not any(module.training for module in ready.network.modules())
    assert not any(parameter.requires_grad for parameter in ready.network.parameters())
    assert "embedded" not in ready.metadata
    assert [module.training for module in model] == [False, True, True, True, True, True]
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
