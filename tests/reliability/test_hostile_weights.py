"""Files that would run code or fill the memory if they were loaded the usual way (RELIABILITY C2 to C4, R7)."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch

from cvtrain.core.weights import parse_metadata, pickle_globals, read
from cvtrain.errors import WeightsError

CANARY = "canary"
WATCHED = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect", "exec", "compile")


class Calls:
    """Calls `function` with `arguments` as soon as it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


PAYLOADS = {
    "system": Calls(os.system, f"touch {CANARY}"),
    "popen": Calls(os.popen, f"touch {CANARY}"),
    "eval": Calls(eval, f"open('{CANARY}', 'w')"),
    "exec": Calls(exec, f"open('{CANARY}', 'w').close()"),
    "getattr": Calls(getattr, list, "append"),
    "nested load": Calls(torch.load, "other.pt"),
    "write": Calls(open, CANARY, "w"),
}
FORMS = {
    "zip": torch.save,
    "legacy": lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False),
    "raw": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=4)),
    "protocol 2": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2)),
    "text": lambda value, path: path.write_bytes(pickle.dumps(value, protocol=0)),
}
NAMES = {
    "system": "posix.system", "popen": "os.popen", "eval": "eval", "exec": "exec", "getattr": "getattr",
    "nested load": "torch.serialization.load", "write": "io.open",
}  # fmt: skip


@pytest.fixture
def events():
    """Names of the audit events since the test began; a hook cannot be taken away, so it is switched off."""
    seen, on = [], [True]
    sys.addaudithook(lambda name, _: seen.append(name) if on[0] else None)
    yield seen
    on[0] = False


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_pickle_in_any_form_is_refused_without_being_run(tmp_path, monkeypatch, form, payload, events):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "model.pt"
    FORMS[form]({"weight": torch.zeros(2), "code": PAYLOADS[payload]} if form in ("zip", "legacy") else
                PAYLOADS[payload], path)  # fmt: skip
    events.clear()
    with pytest.raises(WeightsError) as caught:
        read(path)
    assert caught.value.exit_code == 4
    assert [name for name in events if name in WATCHED or name.startswith("pickle")] == []
    assert not (tmp_path / CANARY).exists()
    if form != "text":  # which is no different from any other text
        assert "is a pickle, which may run any code; it was not loaded" in str(caught.value)
        assert NAMES[payload] in str(caught.value)
        assert "safetensors" in str(caught.value)


def test_the_canary_does_show_when_a_pickle_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(PAYLOADS["exec"]))
    assert (tmp_path / CANARY).exists()


def test_a_harmless_state_dict_is_refused_too_with_the_way_to_convert_it(tmp_path):
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "m.pth")
    with pytest.raises(WeightsError, match=r"torch\._utils\._rebuild_tensor_v2(.|\n)*weights_only=True"):
        read(tmp_path / "m.pth")


def test_the_command_line_refuses_a_pickle_with_4(cvtrain, tmp_path):
    (tmp_path / "x.png").write_bytes(b"")
    torch.save({"code": PAYLOADS["system"]}, tmp_path / "evil.pt")
    answer = cvtrain("predict", "weights=evil.pt", "source=x.png")
    assert answer.code == 4
    assert "posix.system" in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / CANARY).exists()


def test_a_zip_bomb_is_refused_without_being_unpacked(tmp_path):
    """1000 to 1: 64 MB of zeros that a loader would fill the memory with."""
    import tracemalloc

    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data.pkl", bytes(64 << 20))
        archive.writestr("bomb/data/0", bytes(64 << 20))
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(WeightsError, match="is a pickle"):
        read(tmp_path / "bomb.pt")
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


def safetensors(header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"\xff" * 64,
        struct.pack("<Q", 1 << 62) + b"{}",
        safetensors(b"[" * 100_000),
        safetensors(b'{"a":'),
        safetensors({"a": {"dtype": "F32", "shape": [1 << 40, 1 << 40], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
                     "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
        safetensors({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        safetensors({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 1 << 40]}}, bytes(8)),
    ],
    ids=["noise", "endless header", "deep header", "torn header", "huge", "overlap", "backwards", "dtype", "beyond"],
)  # fmt: skip
def test_a_malformed_safetensors_file_is_a_weights_error(tmp_path, content):
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(WeightsError):
        read(tmp_path / "m.safetensors")


def test_metadata_nested_without_end_is_a_weights_error():
    with pytest.raises(WeightsError, match="is not JSON"):
        parse_metadata({"preprocess": "[" * 100_000 + "]" * 100_000}, "preprocess")


def test_a_pickle_is_looked_through_to_its_last_name_and_a_safetensors_file_is_none(tmp_path):
    stream = io.BytesIO()
    for payload in PAYLOADS.values():
        pickle.dump(payload, stream, protocol=4)
    (tmp_path / "several.pkl").write_bytes(stream.getvalue())
    found = pickle_globals(tmp_path / "several.pkl")
    assert {"posix.system", "os.popen", "io.open", "torch.serialization.load"} <= set(found)
    (tmp_path / "none").write_bytes(safetensors({}))
    assert pickle_globals(tmp_path / "none") is None
