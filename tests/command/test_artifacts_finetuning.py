"""What compression may ask of a run: training by its own recipe, validation accuracy, gradients."""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "engine"))
from engine_parts import CLASSES, CPU, make_run, network, sets, sgd

from cvtrain.averaging import Ema, NoAveraging
from cvtrain.command.finetuning import Recipe, strategy_for
from cvtrain.core.stages import Stage
from cvtrain.engine.loop import fit
from cvtrain.errors import DivergedError
from cvtrain.finetune import Full
from cvtrain.finetune.base import RatesPhase, Strategy
from cvtrain.optimizer import param_groups

pytestmark = pytest.mark.usefixtures("one_thread")


def recipe(tmp_path, averaging=NoAveraging, **changes):
    """A trained run's recipe, and the run."""
    run = make_run(tmp_path, **changes)
    fit(run)
    run.model.eval()
    builder = SimpleNamespace(
        config={"distillation": {}},
        build=lambda group: averaging(),
        optimizer=lambda model, strategy: sgd(param_groups(model, 1e-2, strategy.part_of)),
    )
    return Recipe(builder, run, ["a", "b", "c"]), run


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_candidate_is_trained_in_place_and_the_run_stays_as_it_is(tmp_path):
    made, run = recipe(tmp_path)
    before, candidate = weights_of(run.model), copy.deepcopy(run.model)
    files = sorted(tmp_path.iterdir())
    made.finetune(candidate, 2, 0.1, None)
    assert not same(weights_of(candidate), before)
    assert same(weights_of(run.model), before)
    assert not candidate.training
    assert sorted(tmp_path.iterdir()) == files
    assert run.state.epoch == 2


def test_no_epochs_do_nothing(tmp_path):
    made, run = recipe(tmp_path)
    candidate = copy.deepcopy(run.model)
    made.finetune(candidate, 0, 0.1, None)
    assert same(weights_of(candidate), weights_of(run.model))


def test_a_finetuning_that_diverges_is_told_as_one_and_names_no_file_of_a_training(tmp_path):
    made, run = recipe(tmp_path)
    candidate = copy.deepcopy(run.model)
    with torch.no_grad():
        next(candidate.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"^fine-tuning of what was compressed: .*; the trained") as told:
        made.finetune(candidate, 1, 0.1, None)
    assert "diverged.json" not in str(told.value)


def test_two_finetunings_see_other_augmentations_and_a_second_process_the_same(tmp_path):
    made, run = recipe(tmp_path / "a")
    again, _ = recipe(tmp_path / "b")
    candidates = [copy.deepcopy(run.model) for _ in range(3)]
    made.finetune(candidates[0], 1, 0.1, None)
    made.finetune(candidates[1], 1, 0.1, None)
    again.finetune(candidates[2], 1, 0.1, None)
    assert not same(weights_of(candidates[0]), weights_of(candidates[1]))
    assert same(weights_of(candidates[0]), weights_of(candidates[2]))


def test_where_the_run_averages_the_average_is_what_is_kept(tmp_path):
    averages = []

    def ema():
        averages.append(Ema(decay=0.9))
        return averages[-1]

    averaged, run = recipe(tmp_path / "a", ema)
    plain, _ = recipe(tmp_path / "b")
    kept, last = copy.deepcopy(run.model), copy.deepcopy(run.model)
    averaged.finetune(kept, 2, 0.1, None)
    plain.finetune(last, 2, 0.1, None)
    assert not same(weights_of(kept), weights_of(last))
    (average,) = averages
    assert same(weights_of(kept), weights_of(average.model()))
    assert next(kept.parameters()).requires_grad


def test_a_teachers_answers_are_distilled_and_the_teacher_stays_as_it_is(tmp_path):
    made, run = recipe(tmp_path, mix=False)
    teacher = network()
    with torch.no_grad():
        teacher[-1].bias += torch.tensor([8.0, 0.0, 0.0])  # always sure of the first class
    teacher.eval()
    before = weights_of(teacher)
    taught, untaught = copy.deepcopy(run.model), copy.deepcopy(run.model)
    made.finetune(taught, 3, 0.1, teacher)
    made.finetune(untaught, 3, 0.1, None)
    images = torch.randn((64, 1, 6, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first = [model(images).softmax(1)[:, 0].mean() for model in (taught, untaught)]
    assert first[0] > first[1] + 0.1
    assert same(weights_of(teacher), before)
    assert all(parameter.requires_grad for parameter in teacher.parameters())


def test_masked_and_parametrized_weights_train_under_their_own_names_at_their_stages_rates(tmp_path):
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    made, run = recipe(tmp_path)
    names = [name for name, _ in run.model.named_parameters()]
    stages = [Stage("body", ("0", "1"), tuple(names[:4])), Stage("head", ("6",), tuple(names[4:]))]
    run.finetune = Strategy(stages, [RatesPhase(name="last", first=0, epochs=1, factors=(0.0, 1.0))])
    candidate = copy.deepcopy(run.model)
    prune.l1_unstructured(candidate[0], "weight", 0.5)
    parametrize.register_parametrization(candidate[6], "weight", Doubled(), unsafe=True)
    candidate.eval()
    with torch.no_grad():
        candidate(torch.zeros(1, 1, 6, 6))
    before = weights_of(candidate)
    made.finetune(candidate, 1, 0.1, None)
    after = weights_of(candidate)
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"6.bias", "6.parametrizations.weight.original"}


def test_a_model_without_the_runs_stages_is_trained_as_a_whole(tmp_path):
    run = make_run(tmp_path)
    stages = [Stage("body", ("gone",), ("gone.weight",)), Stage("head", ("6",), ("6.weight", "6.bias"))]
    frozen = Strategy(stages, [RatesPhase(name="last", first=0, epochs=1, factors=(0.0, 1.0))])
    strategy = strategy_for(run.model, frozen)
    assert isinstance(strategy, Full)
    assert all(strategy.part_of(name) == 0 for name, _ in run.model.named_parameters())


def test_accuracy_is_that_of_the_whole_validation_set(tmp_path):
    data = sets(val=13)
    made, run = recipe(tmp_path, data=data)
    pictures = data.val.read(torch.arange(13).numpy())
    with torch.no_grad():
        right = run.model(data.preprocess(pictures)).argmax(1).numpy() == data.val.labels
    assert made.evaluate(run.model) == right.mean()
    assert made.evaluate(WithoutWeights(run.model)) == right.mean()


class WithoutWeights(nn.Module):
    """A file that is run, as far as torch knows."""

    def __init__(self, model):
        super().__init__()
        self.hidden = (model,)

    def forward(self, images):
        return self.hidden[0](images)


def test_gradients_are_the_mean_over_batches_of_the_plain_pictures_loss(tmp_path):
    made, run = recipe(tmp_path, mix=False)
    run.model[0].weight.requires_grad_(False)
    candidate = copy.deepcopy(run.model)
    statistics = candidate[1].running_mean.clone()
    made.backward(candidate, 3)
    expected = copy.deepcopy(run.model).requires_grad_(True).eval()
    batches = run.loader.train_batches(0)
    total = 0.0
    for _ in range(3):
        batch = next(batches)
        targets = nn.functional.one_hot(batch.targets, CLASSES).float() * 0.9 + 0.1 / CLASSES
        total = total + nn.functional.cross_entropy(expected(run.preprocess(batch.images)), targets) / 3
    total.backward()
    for (name, ours), theirs in zip(candidate.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, msg=name)
    assert not candidate[0].weight.requires_grad
    assert torch.equal(candidate[1].running_mean, statistics)


def test_calibration_gives_training_pictures_as_the_model_takes_them(tmp_path):
    made, run = recipe(tmp_path)
    pictures = torch.cat(list(made.calibration()))
    assert pictures.shape == (22, 1, 6, 6)
    assert pictures.dtype == torch.float32
    assert pictures.device == CPU
    train = run.preprocess(run.loader.sets.train.read(torch.arange(22).numpy()))
    assert {tuple(picture.flatten().tolist()) for picture in pictures} <= {tuple(p.flatten().tolist()) for p in train}
