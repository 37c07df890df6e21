"""Stem, stages and head found by looking: on small networks made here, and in every family of two libraries."""

import functools

import pytest
import torch
from torch import nn
from torchvision import models

from cvtrain.compose import Composer
from cvtrain.core import stages as finding
from cvtrain.core.stages import find_stages
from cvtrain.core.trunk import find_trunk
from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, SimpleCNN


def on_meta(make):
    """A network that has shapes only: built at once, however large."""
    with torch.device("meta"):
        return make()


def torchvision(name, **kwargs):
    lazy = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # RegNet computes its widths by tensors
        return models.get_model(name, weights=None, **lazy, **kwargs)


def by_modules(model, shape=(3, 224, 224), **kwargs):
    return {stage.name: stage.modules for stage in find_stages(model, shape, **kwargs)}


def covers_once(model, stages):
    """Whether each parameter is in one stage, and what the stages' modules hold is theirs alone."""
    names = [name for stage in stages for name in stage.parameters]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    for stage in stages:
        inside = tuple(f"{path}." for path in stage.modules)
        for other in stages:
            assert any(name.startswith(inside) for name in other.parameters) == (other is stage and bool(inside))


class Block(nn.Module):
    """A residual block whose first convolution may halve the map."""

    def __init__(self, below, width, stride=1):
        super().__init__()
        self.first = nn.Conv2d(below, width, 3, stride, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.shortcut = nn.Conv2d(below, width, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.second(torch.relu(self.first(x)))


class Residual(nn.Module):
    """Written down in another order than it runs."""

    def __init__(self, strides=(1, 1, 2, 1, 2)):
        super().__init__()
        self.out = nn.Linear(4, 2)
        self.blocks = nn.ModuleList(Block(4, 4, stride) for stride in strides)
        self.into = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.into(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.norm(x).mean((2, 3)))


def test_stages_follow_the_picture_and_not_the_order_in_which_modules_are_written_down():
    model = Residual()
    stages = find_stages(model, (1, 16, 16))
    covers_once(model, stages)
    assert [stage.name for stage in stages] == ["stem", "stage1", "stage2", "stage3", "head"]
    assert [stage.modules for stage in stages] == [
        ("into",),
        ("blocks.0", "blocks.1"),
        ("blocks.2", "blocks.3"),
        ("blocks.4", "norm"),
        ("out",),
    ]
    assert stages[0].parameters == ("into.weight", "into.bias")


def test_a_network_whose_resolution_stays_the_same_has_four_near_equal_runs_of_blocks():
    stages = by_modules(Residual((1,) * 6), (1, 8, 8))
    assert list(stages) == ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
    assert stages["stem"] == ("into",)
    assert stages["stage1"] == ("blocks.0",)
    assert stages["stage2"] == ("blocks.1", "blocks.2")
    assert stages["stage4"] == ("blocks.4", "blocks.5", "norm")
    assert list(by_modules(Residual((1, 1)), (1, 8, 8))) == ["stem", "stage1", "stage2", "head"]


@pytest.mark.parametrize("size", [8, 40, 224])
def test_the_answer_is_the_same_for_every_size_also_where_the_maps_shrink_to_one_point(size):
    stages = by_modules(torchvision("resnet18"), (3, size, size))
    assert stages == {
        "stem": ("conv1", "bn1"),
        "stage1": ("layer1",),
        "stage2": ("layer2",),
        "stage3": ("layer3",),
        "stage4": ("layer4",),
        "head": ("fc",),
    }


def test_looking_at_a_network_leaves_it_as_it_was():
    model = Residual().train()
    model.norm.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_stages(model, (1, 16, 16))
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_transformer_has_its_tokens_and_positions_in_the_stem_and_the_norm_before_the_pooling_in_the_last_stage():
    model = on_meta(lambda: models.VisionTransformer(32, 8, num_layers=8, num_heads=2, hidden_dim=8, mlp_dim=16))
    stages = find_stages(model, (3, 32, 32))
    covers_once(model, stages)
    assert set(stages[0].parameters) == {"class_token", "encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}
    assert [len(stage.modules) for stage in stages] == [1, 2, 2, 2, 3, 1]
    assert stages[4].modules == (
        "encoder.layers.encoder_layer_6",
        "encoder.layers.encoder_layer_7",
        "encoder.ln",
    )
    assert stages[5].modules == ("heads",)


def test_plain_chains_are_cut_where_they_pool_and_their_fully_connected_layers_are_the_head():
    assert by_modules(LeNet5(10, 1, 28), (1, 28, 28)) == {
        "stem": ("features.0",), "stage1": ("features.3",), "head": ("head",)
    }  # fmt: skip
    assert by_modules(torchvision("alexnet")) == {
        "stem": ("features.0",),
        "stage1": ("features.3",),
        "stage2": ("features.6", "features.8", "features.10"),
        "head": ("classifier",),
    }
    vgg = by_modules(torchvision("vgg11"))
    assert vgg == {
        "stem": ("features.0",),
        "stage1": ("features.3",),
        "stage2": ("features.6", "features.8"),
        "stage3": ("features.11", "features.13"),
        "stage4": ("features.16", "features.18"),
        "head": ("classifier",),
    }


@pytest.mark.parametrize("size", [4, 8, 28, 64])
def test_the_small_network_has_stem_stages_and_head_at_every_size(size):
    model = SimpleCNN(10, 3, size)
    stages = find_stages(model, (3, size, size))
    covers_once(model, stages)
    assert len(stages) == 4
    assert stages[0].modules == ("features.0", "features.1")
    assert stages[-1].modules == ("head",)


def test_a_block_is_not_cut_in_two_where_the_map_shrinks_in_its_middle():
    stages = by_modules(torchvision("mobilenet_v2"))
    assert stages["stem"] == ("features.0",)
    assert stages["stage1"] == ("features.1",)
    assert stages["stage2"] == ("features.2", "features.3")
    assert stages["stage5"] == ("features.14", "features.15", "features.16", "features.17", "features.18")


def test_a_norm_belongs_to_the_layer_behind_it_that_lowers_the_resolution():
    stages = by_modules(torchvision("convnext_tiny"))
    assert stages["stage1"] == ("features.1",)
    assert stages["stage2"] == ("features.2", "features.3")
    assert stages["head"] == ("classifier",)  # its norm works on pooled features


def test_auxiliary_classifiers_that_run_only_in_training_are_in_the_head():
    stages = by_modules(torchvision("googlenet"))
    assert stages["stem"] == ("conv1", "conv2", "conv3")
    assert stages["stage1"] == ("inception3a", "inception3b")
    assert set(stages["head"]) == {"aux1", "aux2", "fc"}


class Odd(Residual):
    """Has what most networks do not have."""

    def __init__(self):
        super().__init__((1, 1, 2))
        self.mask_token = nn.Parameter(torch.zeros(1, 4, 1, 1))
        self.blocks[1].unused = nn.Linear(4, 4)
        self.blocks[2].second = self.blocks[2].first.__class__(4, 4, 3, padding=1, bias=False)
        self.blocks[2].second.weight = self.blocks[1].second.weight
        self.plain_norm = nn.BatchNorm2d(4, affine=False)
        self.out = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))

    def forward(self, x):
        return super().forward(self.plain_norm(x.expand(-1, 4, -1, -1))[:, :1])


def test_tied_unused_and_reparametrized_parameters_and_buffers_alone_have_one_stage_each():
    model = Odd()
    stages = {stage.name: stage for stage in find_stages(model, (1, 16, 16))}
    covers_once(model, list(stages.values()))
    assert "mask_token" in stages["stem"].parameters
    assert "plain_norm" in stages["stem"].modules
    assert "blocks.1.unused.weight" in stages["stage1"].parameters
    assert "blocks.1.second.weight" in stages["stage1"].parameters  # where it is used first
    assert stages["stage2"].modules == ("blocks.2", "norm")
    assert stages["head"].modules == ("out",)


def test_two_streams_that_meet_only_at_the_end_are_cut_into_runs():
    class Streams(nn.Module):
        def __init__(self):
            super().__init__()
            self.fine, self.coarse = nn.Conv2d(1, 4, 2, 2), nn.Conv2d(1, 4, 4, 4)
            self.pairs = nn.ModuleList(nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]) for _ in range(4))
            self.steps = nn.ModuleList(Step(pair) for pair in self.pairs)
            self.head = nn.Linear(8, 2)

        def forward(self, x):
            both = [self.fine(x), self.coarse(x)]
            for step in self.steps:
                both = step(both)
            return self.head(torch.cat([each.mean((2, 3)) for each in both], 1))

    class Step(nn.Module):
        def __init__(self, pair):
            super().__init__()
            self.one, self.two = pair

        def forward(self, both):
            return [self.one(both[0]), self.two(both[1])]

    model = Streams()
    stages = find_stages(model, (1, 16, 16))
    covers_once(model, stages)
    assert set(stages[0].modules) == {"fine", "coarse"}
    assert len(stages) == 6
    assert stages[-1].modules == ("head",)


def test_a_perceptron_has_stem_and_head_and_a_single_layer_is_all_head():
    deep = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert by_modules(deep, (1, 8, 8)) == {"stem": ("1",), "stage1": ("3",), "head": ("5",)}
    single = find_stages(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8))
    assert [(stage.name, stage.parameters) for stage in single] == [("head", ("1.weight", "1.bias"))]


def test_a_network_that_cannot_be_followed_says_so_unless_its_stages_are_given():
    class Branching(Residual):
        def forward(self, x):
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(ConfigError, match="Branching cannot be followed from pictures to logits"):
        find_stages(Branching(), (1, 16, 16))
    stages = find_stages(Branching(), (1, 16, 16), [["into"], ["blocks", "norm"], ["out"]])
    assert [stage.name for stage in stages] == ["stem", "stage1", "head"]


def test_given_stages_are_taken_and_the_longest_path_decides():
    model = Residual()
    stages = find_stages(model, (1, 16, 16), [["into"], ["blocks", "norm"], ["blocks.4"], ["out.bias", "out.weight"]])
    covers_once(model, stages)
    assert stages[1].modules == ("blocks.0", "blocks.1", "blocks.2", "blocks.3", "norm")
    assert stages[2].modules == ("blocks.4",)
    assert stages[3].modules == ("out",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ([["into", "norm"], ["block"], ["out"]], r"stages: block is no module .*did you mean 'blocks"),
        ([["into"], ["blocks"], ["out"]], r"norm\.weight and 1 more parameters .* in no stage"),
        ([["into", "norm"], ["blocks", "into"], ["out"]], "into stands in stages 1 and 2"),
        ([["into", "norm", "blocks", "out"]], "give two lists of module paths or more"),
        ([["into", "norm", "out"], ["blocks"], []], "stage 3 holds no parameters"),
    ],
)
def test_given_stages_that_do_not_fit_are_refused_with_the_fix(override, message):
    with pytest.raises(ConfigError, match=f"(?s){message}") as failure:
        find_stages(Residual(), (1, 16, 16), override)
    assert str(failure.value).count("\n") <= 2


def test_the_key_takes_lists_of_paths_and_nothing_else():
    config = Composer("train", None).check(["stages=[[conv1,bn1],[layer1],[fc]]"], [])[1]
    assert config["stages"] == [["conv1", "bn1"], ["layer1"], ["fc"]]
    with pytest.raises(ConfigError, match="stages="):
        Composer("train", None).check(["stages=[conv1,fc]"], [])


TORCHVISION = {
    "densenet121": (6, "classifier", ("features.conv0", "features.norm0")),
    "efficientnet_b0": (7, "classifier", ("features.0",)),
    "efficientnet_v2_s": (7, "classifier", ("features.0",)),
    "inception_v3": (5, "fc", None),
    "maxvit_t": (6, "classifier", ("stem",)),
    "mnasnet0_5": (6, "classifier", None),
    "mobilenet_v3_small": (6, "classifier", ("features.0",)),
    "regnet_x_400mf": (6, "fc", ("stem",)),
    "regnet_y_400mf": (6, "fc", ("stem",)),
    "resnext50_32x4d": (6, "fc", ("conv1", "bn1")),
    "shufflenet_v2_x0_5": (5, "fc", ("conv1",)),
    "squeezenet1_1": (5, "classifier", ("features.0",)),
    "swin_t": (6, "head", ("features.0",)),
    "swin_v2_t": (6, "head", ("features.0",)),
    "vgg11_bn": (6, "classifier", ("features.0", "features.1")),
    "vit_b_16": (6, "heads", None),
    "wide_resnet50_2": (6, "fc", ("conv1", "bn1")),
}
"""Number of stages, the module in the head that holds the classifier, and the modules of the stem."""


TIMM = {
    "cait_xxs24_224": (6, "head", ("patch_embed",)),
    "coat_lite_tiny": (6, "head", ("patch_embed1",)),
    "convnext_atto": (6, "head", ("stem",)),
    "crossvit_tiny_240": (5, "head", ("patch_embed",)),
    "deit_tiny_distilled_patch16_224": (6, "head_dist", ("patch_embed",)),
    "dla34": (6, "fc", ("base_layer", "level0", "level1")),
    "edgenext_xx_small": (6, "head", ("stem",)),
    "efficientnet_b0": (6, "classifier", ("conv_stem", "bn1", "blocks.0")),
    "fastvit_t8": (6, "head", ("stem",)),
    "ghostnet_050": (7, "classifier", ("conv_stem", "bn1")),
    "inception_v4": (6, "last_linear", ("features.0", "features.1", "features.2")),
    "levit_128s": (5, "head_dist", ("stem",)),
    "mixer_s32_224": (6, "head", ("stem",)),
    "mobilenetv3_small_050": (5, "classifier", ("conv_stem", "bn1", "blocks.0")),
    "mobilevit_xxs": (7, "head", ("stem",)),
    "mvitv2_tiny": (6, "head", ("patch_embed",)),
    "nf_regnet_b0": (6, "head", ("stem",)),
    "poolformer_s12": (6, "head", ("stem",)),
    "pvt_v2_b0": (6, "head", ("patch_embed",)),
    "repvgg_a0": (6, "head", ("stem",)),
    "resmlp_12_224": (6, "head", ("stem",)),
    "resnet10t": (6, "fc", ("conv1", "bn1")),
    "resnetv2_18": (6, "head", ("stem",)),
    "swinv2_tiny_window8_256": (6, "head", ("patch_embed",)),
    "twins_svt_small": (6, "head", ("patch_embeds.0",)),
    "vit_tiny_patch16_224": (6, "head", ("patch_embed",)),
    "volo_d1_224": (4, "head", ("patch_embed",)),
    "xcit_nano_12_p16_224": (6, "head", ("patch_embed", "pos_embed")),
}
"""The smallest member of each family; the same three facts."""


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_every_classifier_family_of_torchvision(monkeypatch, name):
    check(monkeypatch, torchvision(name), (3, 224, 224), *TORCHVISION[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_many_families_of_timm(monkeypatch, name):
    timm = pytest.importorskip("timm")
    model = on_meta(lambda: timm.create_model(name, pretrained=False))
    check(monkeypatch, model, model.pretrained_cfg["input_size"], *TIMM[name])


def check(monkeypatch, model, shape, count, head, stem):
    follow_once = functools.cache(find_trunk)
    monkeypatch.setattr(finding, "find_trunk", follow_once)
    stages = find_stages(model, tuple(shape))
    covers_once(model, stages)
    assert follow_once.cache_info().misses == 1
    assert [stage.name for stage in stages] == ["stem", *(f"stage{i}" for i in range(1, count - 1)), "head"]
    assert head in stages[-1].modules
    assert stem is None or stages[0].modules == stem
    spans = follow_once(model, tuple(shape)).flow.spans
    begins = [min(spans[path][0] for path in called(stage.modules, spans)) for stage in stages]
    assert begins == sorted(set(begins))


def called(modules, spans):
    """The modules, and what is called of those that are only lists of modules."""
    return [path for module in modules for path in spans if f"{path}.".startswith(f"{module}.")]
