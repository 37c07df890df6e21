"""The objective against NumPy, and a teacher that sees and counts otherwise than its student."""

import dataclasses
import logging

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cvtrain.core.types import Preprocess
from cvtrain.distillation import KnowledgeDistillation, NoDistillation, Teacher
from cvtrain.errors import ConfigError
from cvtrain.model import SimpleCNN

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ["ant", "bee", "cat"]
PREPROCESS = Preprocess(8, 8, 2, (0.5, 0.4), (0.25, 0.2))


def network(seed=0, img_size=8):
    torch.manual_seed(seed)
    return SimpleCNN(3, 2, img_size, (4, 6))


def teacher(model=None, names=NAMES, preprocess=PREPROCESS, student_names=NAMES, student_preprocess=PREPROCESS):
    return Teacher(model or network(1), names, preprocess, student_names, student_preprocess, "ab12")


def pictures(count=5, size=8):
    return torch.randint(0, 256, (count, 2, size, size), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)


def softmax(logits, temperature):
    powers = np.exp(logits / temperature)
    return powers / powers.sum(1, keepdims=True)


def sigmoid(logits, temperature):
    return 1 / (1 + np.exp(-logits / temperature))


@pytest.mark.parametrize(("temperature", "weight"), [(4.0, 0.7), (1.0, 0.0), (2.5, 1.0)])
@pytest.mark.parametrize("multilabel", [False, True], ids=["classes", "labels"])
def test_the_loss_is_the_formula(temperature, weight, multilabel):
    taught = KnowledgeDistillation(teacher(), multilabel, temperature, weight)
    images = PREPROCESS.normalize(pictures())
    logits, task_loss = 3 * torch.randn((5, 3), generator=torch.Generator().manual_seed(9)), torch.tensor(1.7)
    given = {"loss": task_loss, "acc": torch.tensor(0.5), "logits": logits}
    terms = taught(given, images)

    s, t = logits.double().numpy(), network(1).eval()(images).detach().double().numpy()
    if multilabel:
        q, p = sigmoid(s, temperature), sigmoid(t, temperature)
        divergence = (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    else:
        q, p = softmax(s, temperature), softmax(t, temperature)
        divergence = (p * np.log(p / q)).sum(1).mean()
    assert float(terms["distillation"]) == pytest.approx(temperature**2 * divergence, rel=1e-4)
    assert float(terms["task"]) == pytest.approx(1.7)
    expected = (1 - weight) * 1.7 + weight * temperature**2 * divergence
    assert float(terms["loss"]) == pytest.approx(expected, rel=1e-4)
    assert terms["acc"] is given["acc"]
    assert float(given["loss"]) == pytest.approx(1.7)
    assert set(taught.terms) < set(terms)


def test_the_gradient_is_the_formula_and_reaches_the_student_alone():
    """d/ds of T²·KL is T·(softmax(s/T) - softmax(t/T)), of which a batch's mean takes 1/B."""
    own = teacher()
    images = PREPROCESS.normalize(pictures())
    logits = torch.randn((5, 3), generator=torch.Generator().manual_seed(9)).requires_grad_()
    KnowledgeDistillation(own, False, 4.0, 0.7)({"loss": torch.tensor(0.0), "logits": logits}, images)[
        "loss"
    ].backward()
    s, t = logits.detach().double().numpy(), network(1).eval()(images).detach().double().numpy()
    expected = 0.7 * 4.0 * (softmax(s, 4.0) - softmax(t, 4.0)) / 5
    np.testing.assert_allclose(logits.grad.numpy(), expected, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in own.model.parameters())


def test_a_student_that_answers_like_its_teacher_has_nothing_to_learn():
    images = PREPROCESS.normalize(pictures())
    for multilabel in (False, True):
        logits = network(1).eval()(images)
        terms = KnowledgeDistillation(teacher(), multilabel)({"loss": torch.tensor(0.0), "logits": logits}, images)
        assert float(terms["distillation"]) == pytest.approx(0, abs=1e-5)


def test_training_leaves_every_bit_of_the_teacher_as_it_was():
    model = network(1).train()
    taught = KnowledgeDistillation(teacher(model))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    student = network(2)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    images = PREPROCESS.normalize(pictures())
    for _ in range(3):
        logits = student(images)
        optimizer.zero_grad()
        taught({"loss": logits.square().mean(), "logits": logits}, images)["loss"].backward()
        optimizer.step()
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not torch.equal(student.head.weight, network(2).head.weight)


def test_the_teacher_computes_in_the_format_of_the_step_and_the_divergence_in_float32():
    images = PREPROCESS.normalize(pictures())
    with torch.autocast("cpu", torch.bfloat16):
        answer = teacher()(images)
        logits = network(2)(images)
        terms = KnowledgeDistillation(teacher())({"loss": torch.tensor(0.0), "logits": logits}, images)
    assert answer.dtype == logits.dtype == torch.bfloat16
    assert terms["loss"].dtype == torch.float32


class Reads(TorchDispatchMode):
    """Counts values that are read from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_step_reads_nothing_back_from_the_device():
    other = Preprocess(12, 12, 2, (0.1, 0.7), (0.5, 0.3))
    taught = KnowledgeDistillation(teacher(network(1, 12), preprocess=other, student_names=["cat", "ant", "bee"]))
    images = PREPROCESS.normalize(pictures())
    with Reads() as reads:
        loss = taught({"loss": torch.tensor(0.0), "logits": torch.zeros(5, 3)}, images)["loss"]
    assert reads.count == 0
    with Reads() as reads:
        float(loss)
    assert reads.count == 1, "the counter counts"


def test_classes_in_another_order_are_matched_by_name(caplog):
    images = PREPROCESS.normalize(pictures())
    plain = teacher()(images)
    with caplog.at_level(logging.INFO, "cvtrain"):
        ordered = teacher(student_names=["cat", "ant", "bee"])(images)
    assert torch.equal(ordered, plain[:, [2, 0, 1]])
    assert "its classes are put into this run's order" in caplog.text


def test_a_teacher_of_the_same_kind_is_given_the_very_pictures(caplog):
    seen = []
    model = network(1)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    images = PREPROCESS.normalize(pictures())
    with caplog.at_level(logging.INFO, "cvtrain"):
        teacher(model)(images)
    assert seen[0] is images
    assert caplog.text == ""


def test_pictures_are_normalised_anew_for_a_teacher_with_other_statistics(caplog):
    other = Preprocess(8, 8, 2, (0.1, 0.7), (0.5, 0.3))
    with caplog.at_level(logging.INFO, "cvtrain"):
        taught = teacher(preprocess=other)
    expected = network(1).eval()(other.normalize(pictures()))
    torch.testing.assert_close(taught(PREPROCESS.normalize(pictures())), expected, rtol=1e-4, atol=1e-5)
    assert "pictures are normalised anew for it" in caplog.text
    unchanged = network(1).eval()(PREPROCESS.normalize(pictures()))
    assert not torch.allclose(unchanged, expected, atol=1e-2), "else this test could not fail"


def test_pictures_of_another_size_are_resized_for_the_teacher(caplog):
    seen = []
    model = network(1, img_size=16)
    model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with caplog.at_level(logging.INFO, "cvtrain"):
        taught = teacher(model, preprocess=dataclasses.replace(PREPROCESS, img_size=16, resize=16))
    for size in (8, 16, 32):  # also while the pictures grow from phase to phase
        images = PREPROCESS.normalize(pictures(size=size))
        assert taught(images).shape == (5, 3)
        assert seen[-1].shape == (5, 2, 16, 16)
        torch.testing.assert_close(seen[-1].mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.2)
    blocks = PREPROCESS.normalize(torch.full((1, 2, 8, 8), 77, dtype=torch.uint8))
    taught(blocks)
    torch.testing.assert_close(seen[-1], PREPROCESS.normalize(torch.full((1, 2, 16, 16), 77, dtype=torch.uint8)))
    assert "pictures are resized for it from 8 to 16 pixels" in caplog.text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["ant", "bee", "dog"], ["3 classes, this run 3", "1 unknown to it ('cat')", "1 of its own ('dog')"]),
        (["ant", "bee"], ["2 classes, this run 3", "1 unknown to it ('cat')"]),
        ([*NAMES, "d", "e", "f", "g"], ["7 classes, this run 3", "4 of its own ('d', 'e', 'f', …)"]),
    ],
)
def test_other_classes_are_refused_by_name(names, words):
    with pytest.raises(ConfigError) as refused:
        teacher(names=names)
    assert all(word in str(refused.value) for word in [*words, "choose a teacher of the same classes"])
    assert str(refused.value).count("\n") <= 2


def test_other_channels_are_refused():
    with pytest.raises(ConfigError, match="sees 1 channels, this run 2"):
        teacher(preprocess=Preprocess(8, 8, 1, (0.5,), (0.25,)))


def test_without_a_teacher_the_objective_is_the_tasks_own():
    losses = {"loss": torch.tensor(1.0), "logits": torch.zeros(2, 3)}
    assert NoDistillation()(losses, torch.zeros(2, 2, 8, 8)) is losses
    assert NoDistillation.terms == ()
    assert NoDistillation.teacher_sha256 is None
    assert KnowledgeDistillation(teacher()).teacher_sha256 == "ab12"
