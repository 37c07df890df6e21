"""The averages against NumPy and torch's own, over real training steps of a real model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from cvtrain.averaging import Ema, NoAveraging, Swa
from cvtrain.errors import WeightsError
from cvtrain.model import SimpleCNN

pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed=0, widths=(4, 6)):
    torch.manual_seed(seed)
    return SimpleCNN(3, 1, 8, widths).to(memory_format=torch.channels_last)


class Training:
    """Real steps with momentum on random pictures; `weights` holds every step's, in float64."""

    def __init__(self, averaging, model=None, steps_per_epoch=4, epochs=8):
        self.model, self.averaging = model or network(), averaging
        self.clock = (steps_per_epoch, epochs)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.weights, self.taken = [], 0
        averaging.begin(self.model)

    def step(self, count=1):
        for _ in range(count):
            generator = torch.Generator().manual_seed(self.taken)
            images = torch.randn((6, 1, 8, 8), generator=generator)
            labels = torch.randint(0, 3, (6,), generator=generator)
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.model.train()(images), labels).backward()
            self.optimizer.step()
            self.averaging.update(self.model, self.taken, *self.clock)
            self.taken += 1
            self.weights.append(parameters(self.model))


def parameters(model):
    return {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}


def assert_close(model, expected):
    for name, value in parameters(model).items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(("decay", "every", "steps"), [(0.999, 1, 25), (0.5, 1, 25), (0.7, 3, 26)])
def test_ema_is_the_formula_with_its_warm_up(decay, every, steps):
    training = Training(Ema(decay, every))
    training.step(steps)
    taken_in = training.weights[every - 1 :: every]
    expected, spans = taken_in[0], []
    for t, now in enumerate(taken_in[1:], start=1):
        d = min(decay**every, (1 + t) / (10 + t))
        spans.append(d)
        expected = {name: d * expected[name] + (1 - d) * now[name] for name in now}
    assert_close(training.averaging.model(), expected)
    assert (decay**every in spans) == (decay != 0.999), "both sides of the minimum are seen"


def test_ema_has_nothing_before_its_first_update_which_is_a_copy():
    training = Training(Ema(every_steps=3))
    training.step(2)
    assert training.averaging.model() is None
    assert training.averaging.tensors() == {}
    training.step()
    for name, value in training.averaging.model().state_dict().items():
        assert torch.equal(value, training.model.state_dict()[name]), name
    training.step()
    assert not np.array_equal(parameters(training.model)["head.weight"], training.weights[2]["head.weight"])
    assert np.array_equal(parameters(training.averaging.model())["head.weight"], training.weights[2]["head.weight"])


@pytest.mark.parametrize(("start", "epochs", "first"), [(0.75, 8, 7), (0.5, 5, 3), (0.0, 3, 1), (0.29, 100, 30)])
def test_swa_is_the_mean_of_the_weights_at_the_end_of_each_epoch_that_counts(start, epochs, first):
    training = Training(Swa(start), steps_per_epoch=1 if epochs == 100 else 4, epochs=epochs)
    steps_per_epoch = training.clock[0]
    training.step((first - 1) * steps_per_epoch + steps_per_epoch - 1)
    assert training.averaging.model() is None
    training.step(min(epochs - first, 3) * steps_per_epoch + 1)
    ends = training.weights[first * steps_per_epoch - 1 :: steps_per_epoch]
    assert len(ends) == training.averaging.count
    assert_close(training.averaging.model(), {name: np.mean([w[name] for w in ends], axis=0) for name in ends[0]})


def test_swa_agrees_with_torch():
    training = Training(Swa(0.0), steps_per_epoch=2)
    theirs = AveragedModel(training.model)
    for _ in range(5):
        training.step(2)
        theirs.update_parameters(training.model)
    assert_close(training.averaging.model(), parameters(theirs.module))


def test_swa_begins_anew_when_more_epochs_put_its_start_later():
    training = Training(Swa(0.5), steps_per_epoch=1, epochs=4)
    training.step(4)
    assert training.averaging.count == 2
    training.clock = (1, 12)
    training.step(2)
    assert training.averaging.model() is None
    training.step(2)
    expected = {name: (training.weights[6][name] + training.weights[7][name]) / 2 for name in training.weights[0]}
    assert_close(training.averaging.model(), expected)


class Replacing(nn.Module):
    """Puts another tensor into its buffer's place at every pass, as a buffer's owner may."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, images):
        self.passes = self.passes + 1
        return self.norm(self.linear(images.flatten(1)))


@pytest.mark.parametrize("averaging", [Ema(), Swa(0.0)], ids=["ema", "swa"])
def test_buffers_are_those_of_the_trained_model(averaging):
    training = Training(averaging, Replacing())
    training.step(4)
    own = dict(averaging.model().named_buffers())
    assert float(own["passes"]) == 4
    assert int(own["norm.num_batches_tracked"]) == 4
    for name, buffer in training.model.named_buffers():
        assert torch.equal(own[name], buffer)
        assert own[name].data_ptr() != buffer.data_ptr()


class Reads(TorchDispatchMode):
    """Counts values that are read from the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("averaging", [Ema(), Ema(every_steps=2), Swa(0.0)], ids=["ema", "ema-2", "swa"])
def test_an_update_reads_nothing_back_from_the_device(averaging):
    training = Training(averaging, steps_per_epoch=1)
    training.step(2)
    with Reads() as reads:
        for step in range(2, 6):
            averaging.update(training.model, step, 1, 8)
    assert averaging.count >= 3
    assert reads.count == 0
    theirs = AveragedModel(training.model)
    with Reads() as reads:
        theirs.update_parameters(training.model)
    assert reads.count > 0, "torch's own does, so the counter counts"


@pytest.mark.parametrize("make", [lambda: Ema(0.9), lambda: Swa(0.25)], ids=["ema", "swa"])
@pytest.mark.parametrize("stop", [1, 8, 13, 20])
def test_a_resume_at_any_step_goes_on_to_the_same_bits(make, stop):
    whole = Training(make())
    whole.step(stop)
    kept = {name: value.clone() for name, value in whole.averaging.tensors().items()}
    rest = Training(make(), network(seed=1))
    rest.averaging.load_tensors(kept)
    rest.model.load_state_dict(whole.model.state_dict())
    rest.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))
    rest.taken = stop
    whole.step(24 - stop)
    rest.step(24 - stop)
    assert rest.averaging.tensors().keys() == whole.averaging.tensors().keys() != set()
    for name, value in whole.averaging.tensors().items():
        assert torch.equal(value, rest.averaging.tensors()[name]), name


def test_a_checkpoint_keeps_the_names_of_the_plain_model():
    training = Training(Ema())
    training.step()
    assert set(training.averaging.tensors()) == {*training.model.state_dict(), "n_averaged"}


def test_an_average_without_a_count_or_of_another_model_is_refused():
    training = Training(Ema())
    training.step()
    tensors = dict(training.averaging.tensors())
    for wrong in (
        {name: value for name, value in tensors.items() if name != "n_averaged"},
        {name: value for name, value in tensors.items() if name != "head.bias"},
        {**tensors, "head.bias": torch.zeros(4)},
    ):
        with pytest.raises(WeightsError, match="averaged weights are of another model"):
            training.averaging.load_tensors(wrong)


def test_loading_nothing_forgets_the_average():
    training = Training(Ema())
    training.step()
    training.averaging.load_tensors({})
    assert training.averaging.model() is None


def test_the_average_is_a_frozen_copy_in_eval_mode_and_in_the_models_memory_format():
    training = Training(Ema())
    training.step(3)
    averaged = training.averaging.model()
    assert not averaged.training
    assert not any(p.requires_grad for p in averaged.parameters())
    assert all(p.requires_grad for p in training.model.parameters())
    assert training.model.training
    for own, trained in zip(averaged.parameters(), training.model.parameters(), strict=True):
        assert own.data_ptr() != trained.data_ptr()
        assert own.stride() == trained.stride()


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.inside = nn.Linear(64, 3)

        def forward(self, images):
            return self.second(self.first(self.inside(images.flatten(1))))

    training = Training(Ema(0.5), Tied())
    training.step(3)
    averaged = training.averaging.model()
    assert averaged.first.weight is averaged.second.weight
    expected = training.weights[0]["first.weight"]
    for t, now in enumerate(training.weights[1:], start=1):
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * now["first.weight"]
    np.testing.assert_allclose(averaged.first.weight.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_no_averaging_keeps_nothing():
    training = Training(NoAveraging())
    training.step(3)
    assert training.averaging.model() is None
    assert training.averaging.tensors() == {}
    assert not training.averaging.needs_batch_norm
    assert Ema().needs_batch_norm
    assert Swa().needs_batch_norm
