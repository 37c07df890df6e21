"""Features in the plane, the names beside them, filters, weights and mistakes."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from cvtrain.core.anatomy import classifier
from cvtrain.errors import ConfigError
from cvtrain.inspection.filters import first_filters, scaled, strongest
from cvtrain.inspection.mistakes import confused_pairs, worst_first
from cvtrain.inspection.projection import penultimate, project
from cvtrain.inspection.weights import BINS, weight_statistics
from cvtrain.report.layers import MOST, distributions
from cvtrain.report.scatter import _styles, classes, spread

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(each, dimensions):
    rng = np.random.default_rng(0)
    middles = 20 * rng.standard_normal((3, dimensions))
    labels = np.repeat(np.arange(3), each)
    return (middles[labels] + rng.standard_normal((3 * each, dimensions))).astype(np.float32), labels


@pytest.mark.parametrize(("each", "dimensions", "method"), [(34, 60, "t-SNE"), (33, 8, "PCA"), (1, 8, "PCA")])
def test_clusters_stay_clusters(each, dimensions, method):
    features, labels = clusters(each, dimensions)
    places, used = project(features, seed=3)
    assert used == method
    assert places.shape == (len(features), 2)
    middles = np.stack([places[labels == k].mean(0) for k in range(3)])
    nearest = ((places[:, None] - middles) ** 2).sum(2).argmin(1)
    assert (nearest == labels).all()
    np.testing.assert_array_equal(project(features, seed=3)[0], places)


def test_principal_components_are_those_of_the_singular_vectors():
    features, _ = clusters(10, 5)
    centred = features.astype(np.float64) - features.mean(0, dtype=np.float64)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = project(features, 0)[0]
    np.testing.assert_allclose(np.abs(found), np.abs(left[:, :2] * values[:2]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 5), (4, 1), (150, 3)])
def test_features_that_do_not_differ_lie_in_one_place(shape):
    places, method = project(np.ones(shape, np.float32), 0)
    assert method == "PCA"
    assert not places.any()


def test_the_features_are_what_the_last_layer_gets():
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    path = classifier(model, (3, 32, 32))
    features, logits = penultimate(model, images, path)
    assert features.shape == (2, 512)
    torch.testing.assert_close(model.fc(features), logits)
    squeeze = torchvision.models.squeezenet1_1(num_classes=3).eval()  # its classifier is a convolution
    features, _ = penultimate(squeeze, torch.randn(2, 3, 64, 64), classifier(squeeze, (3, 64, 64)))
    assert features.shape == (2, 512)


def overlaps(places, sizes):
    gap = np.abs(places[:, None] - places[None])
    hit = (gap < (sizes[:, None] + sizes[None]) / 2 - 1e-9).all(2)
    return int(np.triu(hit, 1).sum())


def test_a_hundred_names_do_not_overlap_and_stay_in_the_frame():
    rng = np.random.default_rng(1)
    wanted = np.array([500.0, 450.0]) + rng.standard_normal((100, 2)) * 130
    sizes = np.stack([rng.uniform(30, 130, 100), np.full(100, 12.0)], 1)
    bounds = np.array([[0.0, 0.0], [1000.0, 900.0]])
    assert overlaps(wanted, sizes) > 50
    found = spread(wanted, sizes, bounds)
    assert overlaps(found, sizes) == 0
    assert (found - sizes / 2 >= bounds[0]).all()
    assert (found + sizes / 2 <= bounds[1]).all()
    assert np.median(np.abs(found - wanted).max(1)) < 120


def test_names_that_have_room_and_names_in_one_place():
    bounds = np.array([[0.0, 0.0], [400.0, 400.0]])
    apart = np.array([[100.0, 100.0], [300.0, 300.0]])
    sizes = np.full((2, 2), 20.0)
    assert np.abs(spread(apart, sizes, bounds) - apart).max() <= 0.5
    assert overlaps(spread(np.full((9, 2), 200.0), np.full((9, 2), 20.0), bounds), np.full((9, 2), 20.0)) == 0


def test_neighbouring_classes_differ_in_colour_and_a_hundred_are_drawn(tmp_path):
    rng = np.random.default_rng(0)
    centres = 10 * rng.standard_normal((100, 2))
    styles = _styles(centres)
    for i, centre in enumerate(centres):
        order = np.argsort(((centres - centre) ** 2).sum(1))[1:3]
        assert sum(styles[j][0] == styles[i][0] for j in order) <= 1
    labels = np.repeat(np.arange(100), 6)
    places = centres[labels] + rng.standard_normal((600, 2)) / 2
    names = [f"class with a name {k}" for k in range(100)]
    classes(places, labels, rng.random(600) < 0.1, names, "t-SNE of fc", tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert min(picture.size) > 900


def test_filters_of_the_first_convolution_keep_their_sign_and_order():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    with torch.no_grad():
        for i, size in enumerate((2.0, -0.1, 0.0, 3.0)):
            model[0].weight[i] = size
    path, filters = first_filters(model, (3, 8, 8))
    assert path == "0"
    assert strongest(filters, 2).tolist() == [0, 3]
    assert scaled(filters)[:, 0, 0, 0].tolist() == [1.0, 0.0, 0.5, 1.0]
    with pytest.raises(ConfigError, match="what=filters: Sequential has no 2-D convolution"):
        first_filters(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), (1, 2, 2))


def test_statistics_of_weights_are_those_of_numpy(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 50, 3), nn.BatchNorm2d(50), nn.Flatten(), nn.Linear(50, 3, bias=False))
    with torch.no_grad():
        model[3].weight[:, :40] = 0
    found = {each.name: each for each in weight_statistics(model)}
    assert list(found) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight"]
    values = model[0].weight.detach().double().numpy().ravel()
    convolution = found["0.weight"]
    assert (convolution.kind, convolution.shape, convolution.count) == ("Conv2d", (50, 2, 3, 3), 900)
    assert convolution.mean == pytest.approx(values.mean())
    assert convolution.std == pytest.approx(values.std())
    assert (convolution.lowest, convolution.highest) == (values.min(), values.max())
    assert convolution.near_zero == pytest.approx(np.mean(np.abs(values) <= 0.01 * np.abs(values).max()))
    edges = np.linspace(-4, 4, BINS + 1)
    assert convolution.histogram == pytest.approx(np.histogram(values / values.std(), edges)[0] / 900)
    assert found["3.weight"].near_zero >= 0.8
    assert found["3.weight"].histogram[BINS // 2] >= 0.8
    assert found["1.weight"].std == 0
    assert all(each.histogram.sum() == pytest.approx(1) for each in found.values())
    distributions([convolution] * (MOST + 50), 4, "Weights of many", tmp_path / "many.png")
    with Image.open(tmp_path / "many.png") as picture:
        assert picture.size[1] > 1500


def test_the_most_confident_error_comes_first_and_the_surest_right_answer_last():
    correct = np.array([True, False, True, False, True])
    confidence = np.array([0.9, 0.6, 0.4, 0.8, 0.7], np.float32)
    assert worst_first(correct, confidence).tolist() == [3, 1, 2, 4, 0]


def test_confused_pairs_are_counted_with_their_direction():
    labels = np.array([0, 0, 0, 1, 1, 2, 2])
    decided = np.array([1, 1, 0, 0, 1, 0, 2])
    confidence = np.array([0.5, 0.9, 0.9, 0.7, 0.9, 0.8, 0.6], np.float32)
    found = [
        (p.true, p.predicted, p.support, p.positions.tolist()) for p in confused_pairs(labels, decided, confidence)
    ]
    assert found == [(0, 1, 3, [1, 0]), (1, 0, 2, [3]), (2, 0, 2, [5])]
