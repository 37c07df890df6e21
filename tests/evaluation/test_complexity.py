import torch
from torch import nn

from cvtrain.core.complexity import count_macs, count_params


def test_parameters_count_frozen_ones_and_shared_ones_once():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    first.bias.requires_grad_(False)
    assert count_params(nn.Sequential(first, second)) == 16 + 4 + 4


def test_macs_of_convolutions_groups_and_linear_layers_agree_with_the_formula():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    expected = 8 * 3 * 9 * 64 + 8 * 1 * 9 * 36 + 8 * 36 * 5
    assert count_macs(model, torch.zeros(1, 3, 8, 8)) == expected
    assert count_macs(model, torch.zeros(5, 3, 8, 8)) == expected


def test_macs_of_attention_are_counted_in_eval_mode_too():
    class Attentive(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, tokens):
            return self.attention(tokens, tokens, tokens, need_weights=False)[0]

    length, width = 6, 8
    projections = length * width * 3 * width + length * width * width
    assert count_macs(Attentive().eval(), torch.zeros(1, length, width)) == projections + 2 * length**2 * width


def test_counting_leaves_modes_statistics_and_settings_as_they_were():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout()).train()
    model[2].eval()
    before = model[1].running_mean.clone()
    count_macs(model, torch.randn(2, 3, 8, 8))
    assert [module.training for module in model] == [True, True, False]
    assert torch.equal(model[1].running_mean, before)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_module_that_is_given_a_parameter_is_counted_too():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.ones(1, 4)), nn.Linear(4, 5)

        def forward(self, images):
            return self.layer(self.token) + images.sum()

    model = Tokens()
    assert count_macs(model, torch.zeros(2, 4)) == 20
    assert model.token.requires_grad
