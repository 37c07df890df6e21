"""Weights as safetensors."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cvtrain.core.weights import all_finite, load_into, parse_metadata, pieces, read, save_weights, to_bytes
from cvtrain.errors import WeightsError


def net(width=4, head=True):
    torch.manual_seed(width)
    layers = [nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(width, 2)) if head else nn.Sequential(*layers)


def test_weights_buffers_and_metadata_come_back_bit_for_bit(tmp_path):
    saved, loaded = net(), net()
    saved(torch.randn(5, 3, 3, 3))  # moves the batch norm's buffers
    with torch.no_grad():
        saved[0].weight.view(-1)[:3] = torch.tensor([1e-42, -0.0, torch.finfo(torch.float32).max])
    save_weights(saved, tmp_path / "m.safetensors", {"note": "Grüße", "empty": ""})
    assert load_into(loaded, tmp_path / "m.safetensors") == {"note": "Grüße", "empty": ""}
    assert set(saved.state_dict()) == set(loaded.state_dict())
    for name, value in saved.state_dict().items():
        other = loaded.state_dict()[name]
        assert other.dtype == value.dtype
        assert other.numpy().tobytes() == value.numpy().tobytes(), name


def test_shared_and_channels_last_tensors_are_written_like_any_other(tmp_path):
    plain = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).view(2, 3, 4, 5)
    layouts = {"a": plain.to(memory_format=torch.channels_last), "b": plain, "c": plain, "d": plain[:, 1:, ::2]}
    (tmp_path / "x").write_bytes(to_bytes(layouts, {}))
    tensors, metadata = read(tmp_path / "x")
    assert metadata == {}
    for name, value in layouts.items():
        assert torch.equal(tensors[name], value), name


def test_every_dtype_and_shape_is_read_by_the_library_itself_and_starts_where_its_width_wants_it(tmp_path):
    torch.manual_seed(0)
    floats = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    whole = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    tensors = {f"{t}": (torch.randn(3, 5) * 9).to(t) for t in (*floats, *whole, torch.bool, torch.complex64)}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.zeros(0, 4), "one byte": torch.tensor([True])}
    path = tmp_path / "x"
    path.write_bytes(b"".join(pieces(tensors, {"b": "2", "a": "1"})))
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, value in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
        assert loaded[name].flatten().view(torch.uint8).tolist() == value.flatten().view(torch.uint8).tolist(), name
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert header.pop("__metadata__") == {"a": "1", "b": "2"}
    for name, entry in header.items():
        assert (8 + size + entry["data_offsets"][0]) % tensors[name].element_size() == 0, name


def test_the_same_weights_are_the_same_bytes_whatever_the_order_of_names_and_metadata():
    a, b = torch.randn(3), torch.randn(4)
    assert to_bytes({"a": a, "b": b}, {"x": "1", "y": "2"}) == to_bytes({"b": b, "a": a}, {"y": "2", "x": "1"})


def test_finite_values_whose_sum_overflows_are_finite():
    largest = torch.finfo(torch.float32).max
    assert all_finite({"a": torch.full((9,), largest)})
    assert not all_finite({"a": torch.tensor([largest, largest, float("nan")])})
    assert all_finite({})


def test_a_mismatch_lists_the_first_five_of_all_differences_and_changes_nothing(tmp_path):
    save_weights(net(width=6, head=False), tmp_path / "m.safetensors", {})
    model = net(width=4)
    before = to_bytes(dict(model.state_dict()), {})
    with pytest.raises(WeightsError) as caught:
        load_into(model, tmp_path / "m.safetensors")
    message = str(caught.value)
    assert "8 differences" in message  # the head's 2, and 6 shapes of convolution and batch norm
    for part in ("missing 3.weight", "missing 3.bias", "0.weight: file (6, 3, 3, 3), model (4, 3, 3, 3)", "model="):
        assert part in message
    assert message.count(";") == 4
    assert to_bytes(dict(model.state_dict()), {}) == before


def test_a_tensor_that_the_model_does_not_have_is_a_difference(tmp_path):
    save_weights(net(), tmp_path / "m.safetensors", {})
    with pytest.raises(WeightsError, match=r"2 differences: unexpected 3\.bias; unexpected 3\.weight"):
        load_into(net(head=False), tmp_path / "m.safetensors")


@pytest.mark.parametrize("left", [0, 4, 8, 60, 0.5, -1])
def test_a_file_cut_short_anywhere_is_a_weights_error(tmp_path, left):
    content = to_bytes(dict(net().state_dict()), {})
    (tmp_path / "m").write_bytes(content[: int(len(content) * left) if isinstance(left, float) else left])
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        read(tmp_path / "m")


def test_no_file_is_a_weights_error_that_says_so(tmp_path):
    with pytest.raises(WeightsError, match="no weights at"):
        read(tmp_path / "absent.safetensors")
    with pytest.raises(WeightsError, match="no weights at"):
        read(tmp_path)


def test_metadata_is_parsed_and_its_absence_is_told(tmp_path):
    assert parse_metadata({"class_names": json.dumps(["a", "ß"])}, "class_names") == ["a", "ß"]
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(WeightsError, match="no 'class_names'; they were not written by cvtrain"):
        parse_metadata(read(tmp_path / "foreign.safetensors")[1], "class_names")


def test_metadata_of_a_foreign_file_that_is_not_json_is_a_weights_error():
    with pytest.raises(WeightsError, match="class_names"):
        parse_metadata({"class_names": "cat, dog"}, "class_names")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_found(bad):
    tensors = {"a": torch.zeros(1000), "steps": torch.tensor(3), "h": torch.zeros(4, dtype=torch.bfloat16)}
    assert all_finite(tensors)
    for name in ("a", "h"):
        spoilt = tensors[name].clone()
        spoilt[-1] = bad
        assert not all_finite({**tensors, name: spoilt})
