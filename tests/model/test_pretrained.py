"""Trained weights as a start: where they may come from, how they are fitted, and what a run makes of them."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from teacher_file import write_teacher
from torch import nn
from torchvision import models

from cvtrain.build import Builder
from cvtrain.compose import Composer
from cvtrain.core.types import Preprocess
from cvtrain.core.weights import pieces
from cvtrain.errors import ConfigError, Interrupted, WeightsError
from cvtrain.model import SimpleCNN
from cvtrain.model.folding import fold, fold_statistics, transfer
from cvtrain.model.pretrained import Pretrained, _fetched, _from_hub, resolve

CNN = {"_target_": "cvtrain.model.SimpleCNN", "widths": [6, 8]}
RESNET = {"_target_": "cvtrain.model.torchvision_model", "name": "resnet18", "small_stem": "auto"}
TIMM = {"_target_": "cvtrain.model.timm_model", "name": "resnet10t"}
TEN = [str(i) for i in range(10)]
QUICK = ["epochs=1", "limit_train_batches=2", "workers=0", "threads=1", "compression=none"]
QUICK += ["export=none", "logger=none", "model.widths=[6,8]"]

pytestmark = pytest.mark.usefixtures("one_thread")


def network(classes=10, channels=3, size=8, seed=1):
    torch.manual_seed(seed)
    return SimpleCNN(classes, channels, size, (6, 8))


def weights_of(model, **known):
    return Pretrained("old.safetensors", "0" * 64, state=model.state_dict(), **known)


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


# Channels


@pytest.mark.parametrize("channels", [1, 2, 5, 6, 7])
def test_the_first_layers_response_to_a_replicated_picture_stays(channels):
    conv = models.resnet18(weights=None).conv1.double()
    grey = torch.rand(2, 1, 32, 32, dtype=torch.float64)
    folded = nn.Conv2d(channels, 64, 7, 2, 3, bias=False).double()
    folded.weight.data = fold(conv.weight.data, channels)
    expected = conv(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(folded(grey.expand(-1, channels, -1, -1)), expected, rtol=0, atol=1e-12)
    if channels > 3:  # the channels in turn: red, green, blue, red, …
        colour = torch.rand(2, 3, 32, 32, dtype=torch.float64)
        turns = colour[:, [i % 3 for i in range(channels)]]
        torch.testing.assert_close(folded(turns), conv(colour), rtol=0, atol=1e-12)


def test_weights_of_a_grey_run_fit_pictures_in_colour():
    weight = torch.randn(4, 1, 3, 3)
    assert torch.equal(fold(weight, 3), weight.repeat(1, 3, 1, 1) / 3)
    assert torch.equal(fold(weight, 1), weight)


def test_statistics_follow_the_channels():
    mean = (0.485, 0.456, 0.406)
    assert fold_statistics(mean, 3) == mean
    assert fold_statistics(mean, 1) == pytest.approx((0.449,))
    assert fold_statistics(mean, 5) == (0.485, 0.456, 0.406, 0.485, 0.456)
    assert fold_statistics(mean, 2) == pytest.approx((0.4455, 0.456))


@pytest.mark.parametrize("channels", [1, 5])
def test_a_whole_network_of_other_channels_gives_the_logits_of_the_replicated_picture(channels, caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    old, new = network().eval(), network(channels=channels, seed=2).eval()
    transfer(new, weights_of(old), (channels, 8, 8), TEN)
    grey = torch.rand(4, 1, 8, 8)
    torch.testing.assert_close(new(grey.expand(-1, channels, -1, -1)), old(grey.expand(-1, 3, -1, -1)))
    assert f"features.0.weight folded from 3 channels to {channels}" in caplog.text


# Names and classes


def test_the_classifier_is_taken_when_the_classes_agree_and_starts_afresh_when_not(caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    old, new = network(), network(seed=2)
    transfer(new, weights_of(old), (3, 8, 8), TEN)
    assert same(new.state_dict(), old.state_dict())
    assert "the classifier is taken, too: 10 classes" in caplog.text

    fewer = network(classes=4, seed=2)
    before = {name: value.clone() for name, value in fewer.state_dict().items()}
    transfer(fewer, weights_of(old), (3, 8, 8), TEN[:4])
    after = fewer.state_dict()
    assert same({n: t for n, t in old.state_dict().items() if n.startswith("features.")}, after)
    assert same({n: t for n, t in before.items() if n.startswith("head.")}, after)
    assert "the classifier head starts afresh: 10 classes in the weights, 4 here" in caplog.text


def test_as_many_but_other_classes_start_a_classifier_afresh(caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    old, new = network(), network(seed=2)
    before = new.head.weight.clone()
    transfer(new, weights_of(old, class_names=list("abcdefghij")), (3, 8, 8), TEN)
    assert torch.equal(new.head.weight, before)
    assert torch.equal(new.features[0].weight, old.features[0].weight)
    assert "starts afresh: other classes" in caplog.text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_what_a_wrapper_put_before_the_names_is_taken_off(prefix):
    old, new = network(), network(seed=2)
    state = {prefix + name: value for name, value in old.state_dict().items()}
    transfer(new, Pretrained("x.pt", "", state=state), (3, 8, 8), TEN)
    assert same(new.state_dict(), old.state_dict())


def test_weights_without_batch_counters_fit():
    old, new = network(), network(seed=2)
    state = {name: value for name, value in old.state_dict().items() if not name.endswith("num_batches_tracked")}
    transfer(new, Pretrained("x.pt", "", state=state), (3, 8, 8), TEN)
    assert torch.equal(new.features[1].running_var, old.features[1].running_var)


def test_every_other_difference_is_an_error_that_names_it():
    wide = SimpleCNN(10, 3, 8, (6, 9))
    with pytest.raises(WeightsError) as caught:
        transfer(network(), weights_of(wide, img_size=16), (3, 8, 8), TEN)
    message = str(caught.value)
    assert "pretrained=old.safetensors does not fit this model" in message
    assert "features.4.weight: file (9, 6, 3, 3), model (8, 6, 3, 3)" in message
    assert "img_size=16" in message
    assert caught.value.exit_code == 4
    state = {**network().state_dict(), "more": torch.zeros(1)}
    with pytest.raises(WeightsError, match="unexpected more"):
        transfer(network(), Pretrained("x.pt", "", state=state), (3, 8, 8), TEN)
    broken = network()
    broken.features[0].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(WeightsError, match="not finite"):
        transfer(network(), weights_of(broken), (3, 8, 8), TEN)


def test_auxiliary_classifiers_of_published_weights_are_left_out():
    from cvtrain.model import torchvision_model

    torch.manual_seed(0)
    published = models.googlenet(weights=None, aux_logits=True, init_weights=False)
    model = torchvision_model(10, 3, 32, "googlenet", small_stem=False)
    transfer(model, weights_of(published), (3, 32, 32), TEN)
    assert torch.equal(model.conv1.conv.weight, published.conv1.conv.weight)
    assert model.fc.out_features == 10


# Files


def saved(folder, content, name="weights.pt"):
    path = folder / name
    torch.save(content, path)
    return str(path)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {"module." + name: value for name, value in state.items()}, "optimizer": {"lr": 0.1}},
        lambda state: {"checkpoint": 1, "model": {"state_dict": state}},
    ],
    ids=["bare", "state_dict", "model of DDP", "nested"],
)
def test_pt_files_of_other_tools_are_read(wrap, tmp_path):
    old, new = network(), network(seed=2)
    found = resolve(saved(tmp_path, wrap(old.state_dict())), CNN)
    transfer(new, found, (3, 8, 8), TEN)
    assert same(new.state_dict(), old.state_dict())
    assert (found.mean, found.img_size, found.stated) == (None, None, False)


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


def test_a_pickle_that_asks_for_more_than_tensors_is_refused_unrun(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = saved(tmp_path, {"state_dict": network().state_dict(), "trap": Trap()})
    with pytest.raises(WeightsError, match=r"it asks for .*pathlib.*touch|it asks for .*getattr") as caught:
        resolve(path, CNN)
    assert caught.value.exit_code == 4
    assert not Path("trapped").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("no.pt", None, "does not exist"),
        ("torn.pt", b"PK\x03\x04 and no more", "cannot be read as plain tensors"),
        ("torn.safetensors", b"\x10\0\0\0\0\0\0\0{", "not a whole safetensors file"),
        ("list.pt", [1, 2], "holds no weights, but no mapping"),
        ("others.pt", {"epoch": 3}, "holds no weights, but the keys epoch"),
    ],
)
def test_a_file_that_is_no_weights_is_refused_with_the_reason(name, content, words, tmp_path):
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(WeightsError, match=words):
        resolve(str(path), CNN)


def test_another_runs_folder_brings_its_classes_and_preparation(tmp_path):
    path = write_teacher(tmp_path / "old" / "weights" / "model.safetensors")
    found = resolve(str(tmp_path / "old"), CNN)
    assert (found.mean, found.std, found.img_size, found.interpolation) == ((0.25,), (0.5,), 8, "bilinear")
    assert found.class_names == TEN
    assert found.stated
    assert resolve(str(path), CNN).sha256 == found.sha256
    assert Pretrained(**json.loads(json.dumps(found.record()))).record() == json.loads(json.dumps(found.record()))
    with pytest.raises(WeightsError, match=r"pretrained=.* holds no run"):
        resolve(str(tmp_path), CNN)


@pytest.mark.parametrize(("stem", "size", "small"), [("auto", 32, True), ("auto", 96, False), (True, 96, True)])
def test_the_stem_is_the_one_of_the_run_that_the_weights_come_from(stem, size, small, tmp_path):
    node = {"_target_": RESNET["_target_"], "name": "resnet18", "small_stem": stem}
    metadata = {"preprocess": json.dumps(Preprocess(size, size, 3, (0.5,) * 3, (0.5,) * 3).to_dict())}
    metadata |= {"model": json.dumps(node), "class_names": "[]"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(pieces({"a": torch.zeros(1)}, metadata)))
    assert resolve(str(path), RESNET).small_stem is small


def test_a_bare_file_is_taken_to_be_prepared_as_the_architectures_published_weights_are(tmp_path):
    path = saved(tmp_path, {"fc.bias": torch.zeros(2)})
    found = resolve(path, RESNET)
    assert (found.mean, found.img_size, found.interpolation) == ((0.485, 0.456, 0.406), 224, "bilinear")
    assert not found.stated
    mobile = resolve(path, {**RESNET, "name": "mobilenet_v3_large"})
    entry = models.MobileNet_V3_Large_Weights.DEFAULT.transforms()
    assert (mobile.mean, mobile.interpolation) == (tuple(entry.mean), entry.interpolation.value)
    assert resolve(path, {**RESNET, "name": "googlenet"}).mean == (0.5, 0.5, 0.5)
    lite = resolve(path, {**TIMM, "name": "tf_efficientnet_lite0"})
    assert (lite.mean, lite.std, lite.img_size, lite.interpolation) == ((0.5,) * 3, (0.5,) * 3, 224, "bicubic")


# Names


def test_torchvision_weights_are_found_by_name_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    torch.manual_seed(0)
    state = models.resnet18(weights=None).state_dict()
    entry = models.ResNet18_Weights.IMAGENET1K_V1
    cached = tmp_path / "hub" / "checkpoints" / Path(entry.url).name
    cached.parent.mkdir(parents=True)
    torch.save(state, cached)
    for given in ("IMAGENET1K_V1", "DEFAULT", True):
        found = resolve(given, RESNET)
        assert same(state, found.state)
        assert found.source == "torchvision resnet18 IMAGENET1K_V1"
        assert (found.mean, found.std, found.img_size) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 224)
        assert found.stated
        assert not found.small_stem


def test_timm_weights_are_found_by_tag_in_the_hubs_cache_without_asking_the_network(tmp_path, monkeypatch):
    import timm

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    model, node = timm.create_model("lcnet_050"), {**TIMM, "name": "lcnet_050"}
    repository = tmp_path / "models--timm--lcnet_050.ra2_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "model.safetensors").write_bytes(b"".join(pieces(dict(model.state_dict()), {"format": "pt"})))
    for given, name in (("ra2_in1k", "lcnet_050"), (True, "lcnet_050"), (True, "lcnet_050.ra2_in1k")):
        found = resolve(given, {**node, "name": name})
        assert same(model.state_dict(), found.state)
        assert found.source == "timm lcnet_050.ra2_in1k"
        assert (found.img_size, found.interpolation, found.stated) == (224, "bicubic", True)
    shutil.rmtree(repository)
    with pytest.raises(WeightsError, match=f"pretrained=true: not in {tmp_path}, and no answer .*is unreachable"):
        resolve(True, node)


def no_network(*args, **kwargs):
    raise OSError("Network is unreachable")


def test_without_a_network_one_line_names_the_cache_and_the_way_with_a_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("socket.getaddrinfo", no_network)
    with pytest.raises(WeightsError) as caught:
        resolve("IMAGENET1K_V1", RESNET)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert f"{tmp_path}/hub/checkpoints/resnet18-f37072fd.pth" in message
    assert "Network is unreachable" in message
    assert "pretrained=FILE.safetensors" in message
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("given", "model", "words"),
    [
        ("IMAGENET1K_V3", RESNET, "did you mean 'IMAGENET1K_V1'"),
        ("IMAGENET1K_V1", {**RESNET, "name": "resnet81"}, "did you mean 'resnet18'"),
        ("c3_in1k_x", TIMM, "did you mean 'c3_in1k'"),
        (True, {**TIMM, "name": "resnet10x"}, "did you mean 'resnet10t'"),
        (True, CNN, r"pretrained=true; this model is neither torchvision's nor timm's"),
        ("DEFAULT", CNN, "pretrained=DEFAULT: no such file or folder; .* no weights have names"),
    ],
)
def test_names_that_nobody_knows_are_refused_with_those_that_there_are(given, model, words):
    with pytest.raises(ConfigError, match=words):
        resolve(given, model)


# A run


def built(*overrides, begun=None):
    config = Composer("train", None).check([*QUICK, "device=cpu", *overrides], [])[1]
    builder = Builder(config, [])
    return builder, builder.data(begun)[0]


def test_the_weights_decide_size_and_normalisation_unless_the_user_does(tmp_path, caplog):
    caplog.set_level(logging.INFO, "cvtrain")
    path = write_teacher(tmp_path / "old.safetensors", preprocess=Preprocess(12, 12, 1, (0.25,), (0.5,), "bicubic"))
    builder, sets = built(f"pretrained={path}")
    assert sets.preprocess == Preprocess(12, 12, 1, (0.25,), (0.5,), "bicubic")
    assert "mean [0.25], std [0.5] of the weights, not the data's; pictures bicubic, 12 px" in caplog.text
    assert torch.equal(builder.model(sets).features[0].weight, builder.pretrained.state["features.0.weight"])
    assert built(f"pretrained={path}", "img_size=8")[1].preprocess.img_size == 8
    assert built(f"pretrained={path}", "data.mean=[0.25]")[1].preprocess.mean == (0.25,)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.mean=[0.5]", r"data.mean=\[0.5\] contradicts pretrained: .*old.safetensors was trained with \[0.25\]"),
        ("data.std=[0.4]", r"data.std=\[0.4\] contradicts"),
        ("data.interpolation=bicubic", "data.interpolation=bicubic contradicts pretrained: .* trained with bilinear"),
    ],
)
def test_what_the_user_set_against_the_weights_is_refused(override, words, tmp_path):
    path = write_teacher(tmp_path / "old.safetensors")
    with pytest.raises(ConfigError, match=words):
        built(f"pretrained={path}", override)


def test_a_file_that_says_nothing_leaves_the_data_as_they_are_with_a_warning(tmp_path, caplog):
    path = saved(tmp_path, network(channels=1).state_dict())
    assert built(f"pretrained={path}")[1].preprocess == built()[1].preprocess
    assert "does not say how its pictures were normalised" in caplog.text
    caplog.clear()
    assert built(f"pretrained={path}", "data.mean=[0.4]", "data.std=[0.3]")[1].preprocess.mean == (0.4,)
    assert "does not say" not in caplog.text


def test_small_pictures_keep_the_stem_that_the_weights_were_trained_with(tmp_path):
    torch.manual_seed(0)
    path = saved(tmp_path, models.resnet18(weights=None).state_dict())
    config = Composer("train", None).check(["model=resnet18", f"pretrained={path}", "img_size=16", "device=cpu"], [])[1]
    builder = Builder(config, [])
    sets, _ = builder.data()
    model = builder.model(sets)
    assert model.conv1.kernel_size == (7, 7)
    assert torch.equal(model.conv1.weight, fold(torch.load(path)["conv1.weight"], 1))
    assert torch.equal(model.layer4[1].conv2.weight, torch.load(path)["layer4.1.conv2.weight"])
    assert builder.model_node()["small_stem"] is False


def test_bicubic_pictures_are_those_of_pillow_wherever_they_are_read(tmp_path):
    from cvtrain.data.picture import read_picture
    from cvtrain.data.pixels import resize_all

    pixels = torch.randint(0, 256, (20, 30, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()
    Image.fromarray(pixels).save(tmp_path / "x.png")
    for name, kind in (("bicubic", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        whole = Image.fromarray(pixels).resize((12, 12), kind, box=(5, 0, 25, 20))
        expected = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
        assert torch.equal(read_picture(str(tmp_path / "x.png"), 12, 3, interpolation=name), expected)
        assert torch.equal(resize_all(pixels[None], 12, 0, name)[0], expected)


def test_a_run_that_has_a_checkpoint_needs_no_pretrained_file(tmp_path):
    path = write_teacher(tmp_path / "old.safetensors", preprocess=Preprocess(12, 12, 1, (0.25,), (0.5,), "bicubic"))
    builder, sets = built(f"pretrained={path}")
    begun = json.loads(json.dumps(builder.pretrained.record()))
    path.unlink()
    later, again = built(f"pretrained={path}", begun=begun)
    assert again.preprocess == sets.preprocess
    assert later.model(again).state_dict().keys() == builder.model(sets).state_dict().keys()
    with pytest.raises(WeightsError, match="does not exist"):
        built(f"pretrained={path}")


@pytest.mark.slow
def test_a_run_resumes_measures_and_predicts_when_its_pretrained_file_is_gone(cvtrain, tmp_path):
    prepared = Preprocess(12, 12, 1, (0.25,), (0.5,), "bicubic")
    path = write_teacher(tmp_path / "old" / "weights" / "model.safetensors", preprocess=prepared)
    command = [*QUICK, "pretrained=./old", "json=true", "resume=auto"]
    first = cvtrain(*command)
    assert first.code == 0, first.err
    manifest = json.loads((first.folder / "manifest.json").read_text())
    origin = manifest["pretrained"]
    assert origin["source"] == "old/weights/model.safetensors"
    assert len(origin["sha256"]) == 64
    shutil.rmtree(path.parents[1])

    longer = cvtrain(*[text.replace("epochs=1", "epochs=2") for text in command])
    assert longer.code == 0, longer.err
    assert longer.folder == first.folder
    assert json.loads((first.folder / "manifest.json").read_text())["pretrained"] == origin
    measured = cvtrain("val", f"run={first.folder}", "json=true")
    assert measured.code == 0, measured.err
    assert measured.json["metrics"]["test/loss"] == pytest.approx(longer.json["metrics"]["test/loss"], abs=1e-4)
    Image.new("L", (30, 20), 90).save(tmp_path / "x.png")
    assert cvtrain("predict", f"run={first.folder}", "source=x.png").code == 0

    gone = cvtrain(*command[:-1], "name=fresh")
    assert gone.code == 4
    assert "pretrained=./old does not exist" in gone.err


def test_a_signal_while_weights_are_fetched_is_no_missing_file():
    def stopped():
        raise Interrupted("stopped", 143)

    for load in (lambda: _fetched(stopped, "a1_in1k", "the cache"), lambda: _from_hub(stopped)):
        with pytest.raises(Interrupted):
            load()


def test_a_convolution_that_scales_its_own_weights_is_warned_of(caplog):
    timm = pytest.importorskip("timm")
    trained, model = (timm.create_model("resnetv2_50x1_bit", in_chans=n, num_classes=2) for n in (3, 5))
    transfer(model, weights_of(trained), (5, 64, 64), ["a", "b"])
    assert "stem.conv is a StdConv2d, which scales its weights anew" in caplog.text
