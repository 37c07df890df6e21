"""Activation checkpointing: the same gradients to the bit, with less of the forward pass kept."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torchvision import models

from cvtrain.compose import Composer
from cvtrain.core.recompute import Recomputed, checkpoint_activations, keep_activations
from cvtrain.errors import ConfigError
from cvtrain.model import LeNet5, SimpleCNN, torchvision_model
from cvtrain.regularizer import Dropout, StochasticDepth

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPE = (3, 32, 32)


def small_vit():
    return models.VisionTransformer(32, 8, 3, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5, dropout=0.2)


def resnet():
    return models.ResNet(models.resnet.BasicBlock, [2, 1, 1, 1], num_classes=5)


def pair(make):
    """Twice the same network, the second with activation checkpointing."""
    torch.manual_seed(0)
    plain = make()
    saving = copy.deepcopy(plain)
    return plain, saving


def step(model, images, dtype=None):
    """Gradients, output and state behind one forward and backward pass, from the same seed."""
    torch.manual_seed(1)
    model.train().zero_grad()
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        output = model(images)
        loss = output.float().square().sum()
    behind = torch.rand(1)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return gradients, output.detach().clone(), copy.deepcopy(model.state_dict()), (behind, torch.rand(1))


def same(plain, saving, shape=SHAPE, dtype=None):
    images = torch.randn(4, *shape, generator=torch.Generator().manual_seed(3))
    one, other = step(plain, images, dtype), step(saving, images, dtype)
    for mine, others in zip(one[:3:2], other[:3:2], strict=True):
        assert list(mine) == list(others)
        assert [name for name in mine if not torch.equal(mine[name], others[name])] == []
    assert torch.equal(one[1], other[1])
    assert one[3] == other[3]  # the randomness of what follows
    return one[0]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_gradients_and_batch_norm_are_the_same_to_the_bit_with_dropout_and_stochastic_depth(dtype):
    plain, saving = pair(resnet)
    for model in (plain, saving):
        StochasticDepth(0.5).attach(model, SHAPE)
        Dropout(0.5).attach(model, SHAPE)
    assert checkpoint_activations(saving, SHAPE) == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    gradients = same(plain, saving, dtype=dtype)
    assert len(gradients) == len(list(plain.parameters()))
    assert int(saving.layer1[0].bn1.num_batches_tracked) == 1
    assert not torch.equal(saving.layer1[0].bn1.running_mean, torch.zeros(64))


def test_gradients_are_the_same_in_a_transformer_with_dropout():
    plain, saving = pair(small_vit)
    assert checkpoint_activations(saving, SHAPE) == [f"encoder.layers.encoder_layer_{i}" for i in range(3)]
    same(plain, saving)


@pytest.mark.parametrize(
    ("make", "shape", "parts"),
    [
        (lambda: SimpleCNN(5, 3, 32), SHAPE, {"features": 3}),
        (lambda: LeNet5(5, 1, 28), (1, 28, 28), {"features": 2}),
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3600, 5)), SHAPE, {"": 1}),
    ],
)
def test_a_plain_chain_is_divided_at_its_stages_and_its_head_is_left_alone(make, shape, parts):
    plain, saving = pair(make)
    checkpoint_activations(saving, shape)
    found = {path: m.forward for path, m in saving.named_modules() if isinstance(m.forward, Recomputed)}
    assert {path: len(forward.parts) for path, forward in found.items()} == parts
    same(plain, saving, shape)
    keep_activations(saving)
    assert not any("forward" in vars(module) for module in saving.modules())


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *(
            "alexnet",
            "convnext_tiny",
            "densenet121",
            "efficientnet_b0",
            "googlenet",
            "mnasnet0_5",
            "mobilenet_v3_small",
        ),
        *("regnet_y_400mf", "resnet50", "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "vgg11_bn", "vit_b_16"),
    ],
)
def test_gradients_are_the_same_in_every_family_of_torchvision(name):
    size = 64 if name in ("alexnet", "squeezenet1_1") else 32
    plain, saving = pair(lambda: torchvision_model(5, 3, size, name))
    checkpoint_activations(saving, (3, size, size))
    same(plain, saving, (3, size, size))


def kept_bytes(model, images):
    """Bytes of what the backward pass finds kept, each storage once, without weights and pictures."""
    known = {each.untyped_storage().data_ptr() for each in (*model.parameters(), *model.buffers(), images)}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.train()(images)
    del output
    return sum(sizes.values())


class Deep(nn.Module):
    """A stem and eight blocks of equal maps, so that what is kept can be told by hand."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.Sequential(*(models.resnet.BasicBlock(8, 8) for _ in range(8)))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def test_less_than_a_third_is_kept_of_a_residual_network():
    plain, saving = pair(Deep)
    checkpoint_activations(saving, SHAPE)
    images = torch.randn(4, *SHAPE)
    one_map = 4 * 8 * 32 * 32 * 4
    kept = kept_bytes(saving, images)
    assert kept < kept_bytes(plain, images) / 3
    assert 8 * one_map <= kept < 10 * one_map  # the input of each block


def test_a_deep_copy_is_independent_and_in_evaluation_nothing_changes():
    plain, saving = pair(resnet)
    names = list(saving.state_dict())
    checkpoint_activations(saving, SHAPE)
    copied = copy.deepcopy(saving)
    assert list(saving.state_dict()) == list(copied.state_dict()) == names
    assert copied.layer1[0].forward.module is copied.layer1[0]
    images = torch.randn(4, *SHAPE)
    with torch.no_grad():
        copied.layer1[0].conv1.weight.zero_()
    assert not torch.equal(copied.train()(images), saving.train()(images))
    with torch.no_grad():
        saving.load_state_dict(plain.state_dict())
        assert torch.equal(saving.eval()(images), plain.eval()(images))
    loaded = torch.load(_saved(saving), weights_only=False)
    assert loaded.layer1[0].forward.module is loaded.layer1[0]


def _saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_a_batch_norm_in_evaluation_keeps_its_statistics_inside_a_block_that_trains():
    plain, saving = pair(resnet)
    checkpoint_activations(saving, SHAPE)
    images = torch.randn(4, *SHAPE)
    results = []
    for model in (plain, saving):
        model.train()
        model.layer1.requires_grad_(False)
        for module in model.layer1.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        model(images).sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in results[0].items():
        assert (gradient is None) == name.startswith("layer1")
        assert gradient is None or torch.equal(gradient, results[1][name])
    assert int(saving.layer1[0].bn1.num_batches_tracked) == 0
    assert int(saving.layer2[0].bn1.num_batches_tracked) == 1


def test_a_network_without_blocks_is_refused_and_so_is_compiling():
    with pytest.raises(ConfigError, match=r"no blocks to compute again; use activation_checkpointing=false"):
        checkpoint_activations(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (3, 2, 2))
    with pytest.raises(ConfigError, match="activation_checkpointing=true and compile=true"):
        Composer("train", None).check(["activation_checkpointing=true", "compile=true"], [])


@pytest.mark.slow
def test_a_run_ends_with_the_same_weights_to_the_bit_with_ema_and_accumulation(cvtrain):
    command = [
        *("train", "model=resnet18", "epochs=1", "limit_train_batches=4", "limit_eval_batches=1", "batch_size=8"),
        *("regularizer=[stochastic_depth,dropout]", "averaging=ema", "grad_accum_steps=2", "device=cpu", "workers=0"),
        *("threads=1", "compression=none", "json=true"),
    ]
    runs = [
        cvtrain(*command, "export=none", "name=plain"),
        cvtrain(*command, "export=[onnx]", "name=saving", "activation_checkpointing=true"),
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].err
    files = [(run.folder / "weights" / "model.safetensors").read_bytes() for run in runs]
    from safetensors.torch import load

    one, other = (load(file) for file in files)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert "activation checkpointing: of 8 blocks only the input is kept" in (runs[1].folder / "train.log").read_text()


def _rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    plain, saving = pair(resnet)
    checkpoint_activations(saving, SHAPE)
    images = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(rank))
    gradients = []
    for model in (plain, saving):
        shared = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
        shared.train()(images).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    equal = all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    (folder / f"rank{rank}").write_text(str(equal))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_gradients_that_two_processes_share_are_the_same(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    assert [(tmp_path / f"rank{rank}").read_text() for rank in (0, 1)] == ["True", "True"]


def test_an_activation_that_a_chain_uses_twice_is_computed_twice():
    act = nn.ReLU()
    plain, saving = pair(
        lambda: nn.Sequential(
            *(nn.Conv2d(3, 4, 3, 2, 1), act, nn.Conv2d(4, 4, 3, 2, 1), act, nn.Conv2d(4, 4, 3, 2, 1), act),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5)),
        )
    )
    checkpoint_activations(saving, SHAPE)
    images = torch.randn(4, *SHAPE)
    for one, two in zip(step(plain, images), step(saving, images), strict=True):
        assert str(one) == str(two)
