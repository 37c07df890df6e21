"""What a run may go on with, which run `resume=auto` means, and how exact the continuation says it is."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from cvtrain import catalog, resume, runs
from cvtrain.command.single import choose_folder, settled
from cvtrain.compose import Composer
from cvtrain.errors import ConfigError
from cvtrain.resume import CLASSES, EFFECTS

CONFIGS = Path(__file__).parents[2] / "configs"
CHOICES = {"data": "digits", "model": "simple_cnn"}
QUICK = (
    *("threads=1", "compression=none", "export=none", "logger=none", "device=cpu", "model=lenet5"),
    *("limit_train_batches=3", "limit_eval_batches=1", "json=true"),
)


@pytest.fixture(scope="module")
def default():
    return Composer("train", None).check([], [])[1]


@pytest.fixture
def config(default, tmp_path):
    def changed(**values):
        new = copy.deepcopy(default) | {"resume": "auto", "output_dir": str(tmp_path)}
        for key, value in values.items():
            *outer, last = key.split("__")
            node = new
            for name in outer:
                node = node[name]
            node[last] = value
        return new

    return changed


@pytest.fixture
def stored(tmp_path):
    """Make a run folder as an earlier run would have left it."""

    def make(name, config, number=0, finished=False):
        folder = tmp_path / "digits_simple_cnn" / name
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"number": number, "config": config}))
        runs.write_status(folder, "done" if finished else "failed", 0 if finished else 1)
        return folder

    return make


def leaves(node, prefix=""):
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")


def test_every_key_and_group_of_the_config_is_in_one_class():
    keys = {name for name, _, _ in catalog.keys("train")}
    groups = set(catalog.defaults("train")) - {"experiment", "debug"}
    debug = {key for file in (CONFIGS / "debug").glob("*.yaml") for key in yaml.safe_load(file.read_text()) or {}}
    missing = (keys | groups | debug) - {"defaults"} - EFFECTS.keys()
    assert len(EFFECTS) == sum(len(keys.split()) for keys in CLASSES.values()), "no key is in two classes"
    assert not missing, f"decide in cvtrain/resume.py what a change of these does to a run that has begun: {missing}"


def test_no_class_is_given_to_a_key_that_does_not_exist():
    known = {name for name, _, _ in catalog.keys("train")} | set(catalog.defaults("train"))
    for group in catalog.defaults("train"):
        for file in (CONFIGS / group).rglob("*.yaml"):
            known |= {f"{group}.{key}" for key in leaves(yaml.safe_load(file.read_text()) or {})}
    known |= {f"data.{key}" for file in (CONFIGS / "data").rglob("*.yaml") for key in yaml.safe_load(file.read_text())}
    assert not EFFECTS.keys() - known


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"workers": 0, "json": True, "resume_allow": ["aug"]}, {"workers": "free", "json": "free"}),
        ({"epochs": 48, "patience": 3}, {"epochs": "free", "patience": "free"}),
        ({"epochs": 12}, {"epochs": "never"}),
        ({"threads": 1, "device": "cuda"}, {"threads": "free", "device": "free"}),
        ({"optimizer__lr": 0.05, "clip_grad_norm": 1}, {"optimizer.lr": "confirm", "clip_grad_norm": "confirm"}),
        ({"optimizer": {"_target_": "torch.optim.Adam", "lr": 0.1}}, {"optimizer": "never"}),
        ({"scheduler": {"_target_": "cvtrain.scheduler.Step"}}, {"scheduler": "confirm"}),
        ({"regularizer": {}}, {"regularizer.label_smoothing": "confirm"}),
        ({"aug__eval_resize": 1.1, "aug__sample": {}}, {"aug.eval_resize": "never", "aug.sample.affine": "confirm"}),
        ({"data__split_seed": 1, "data__root": "x"}, {"data.split_seed": "never", "data.root": "confirm"}),
        ({"model__widths": [8], "seed": 1}, {"model.widths": "never", "seed": "never"}),
        ({"compression": {}}, dict.fromkeys(["compression.prune_unstructured", "compression.ptq_static"], "free")),
        ({"somebodys_own": 1}, {"somebodys_own": "never"}),
        ({"aug__sample__horizontal_flip": None}, {}),
    ],
)  # fmt: skip
def test_what_differs_is_named_with_its_class(config, changes, expected):
    assert {c.key: c.effect.word for c in resume.compare(config(), config(**changes))} == expected


def test_free_keys_do_not_change_the_hash_and_all_others_do(config):
    digest = runs.config_hash(config())
    for changes in ({"epochs": 48}, {"workers": 0}, {"compression": {}}, {"threads": 1}, {"optimizer__fused": False}):
        assert runs.config_hash(config(**changes)) == digest
    for changes in (
        {"optimizer__lr": 0.05},
        {"seed": 1},
        {"aug__sample": {}},
        {"data__fold": 1},
        {"aug__batch": {"x": 1}},
    ):
        assert runs.config_hash(config(**changes)) != digest


@pytest.mark.parametrize(
    ("changes", "allow", "fragments"),
    [
        ({"optimizer__lr": 0.05}, [], ["optimizer.lr: 0.1 -> 0.05 (confirm)", "resume_allow=[optimizer.lr]"]),
        ({"optimizer__lr": 0.05, "optimizer__momentum": 0.5}, [], ["resume_allow=[optimizer]"]),
        ({"optimizer__lr": 0.05, "workers": 0}, [], ["resume_allow=[optimizer.lr]", "workers: 2 -> 0 (free)"]),
        ({"optimizer__lr": 0.05, "loss": {}}, ["optimizer.lr"], ["resume_allow=[optimizer.lr,loss]"]),
        ({"seed": 1, "optimizer__lr": 0.05}, ["seed", "optimizer"], ["seed: 0 -> 1 (never)", "resume=none"]),
        ({"epochs": 12}, ["epochs"], ["epochs: 24 -> 12 (never)"]),
        ({"model__widths": [8], "seed": 1, "batch_size": 32, "sampler": "balanced", "mode": "max"}, [], ["and 1 more"]),
    ],
)  # fmt: skip
def test_a_refusal_says_in_three_lines_what_differs_and_what_to_add(config, changes, allow, fragments):
    with pytest.raises(ConfigError) as refused:
        resume.check("runs/a", config(), config(resume_allow=allow, **changes))
    lines = str(refused.value).splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("runs/a ")
    for fragment in fragments:
        assert fragment in str(refused.value)


@pytest.mark.parametrize("allow", [["optimizer.lr"], ["optimizer"], ["aug", "optimizer"]])
def test_a_key_or_its_group_allows_a_change(config, allow):
    changes = resume.check("a", config(), config(optimizer__lr=0.05, resume_allow=allow))
    assert [str(change) for change in changes] == ["optimizer.lr: 0.1 -> 0.05"]


def test_part_of_a_name_allows_nothing(config):
    with pytest.raises(ConfigError):
        resume.check("a", config(), config(optimizer__lr=0.05, resume_allow=["optimizer.l"]))


HERE = {"cvtrain": "1", "torch": "2", "threads": 1, "device": "cpu", "cpu_capability": "AVX2", "world_size": 1}


@pytest.mark.parametrize(
    ("changes", "elsewhere", "exact_device", "expected"),
    [
        ({"workers": 0, "epochs": 48}, {}, True, ("bit-exact", [])),
        ({}, {"threads": 2}, True, ("sample-exact", ["threads 1 then 2"])),
        ({"threads": 2}, {"threads": 2}, True, ("sample-exact", ["threads 1 then 2"])),
        ({"channels_last": False}, {}, True, ("sample-exact", ["channels_last true then false"])),
        ({}, {"torch": "3", "world_size": 2}, True, ("sample-exact", ["torch 2 then 3", "world_size 1 then 2"])),
        ({}, {"cpu_capability": "AVX512"}, True, ("sample-exact", ["cpu_capability AVX2 then AVX512"])),
        ({}, {}, False, ("sample-exact", ["cpu rounds differently from run to run"])),
        ({"optimizer__lr": 0.05}, {"threads": 2}, True, ("approximate", ["optimizer.lr 0.1 then 0.05"])),
        ({}, {"cvtrain": "2"}, True, ("approximate", ["cvtrain 1 then 2"])),
    ],
)
def test_the_level_is_the_worst_of_what_differs(config, changes, elsewhere, exact_device, expected):
    found = resume.compare(config(), config(**changes))
    assert resume.exactness(found, HERE, HERE | elsewhere, exact_device) == expected


def test_the_worst_of_several_resumes_is_the_level_of_the_run():
    assert resume.worst(["bit-exact", "approximate", "sample-exact"]) == "approximate"
    assert resume.worst([]) is None


def test_auto_takes_the_newest_by_number_whatever_the_clock_said(config, stored):
    stored("2031-01-01_00-00-00", config(), number=1)
    newest = stored("2026-01-01_00-00-00", config(), number=2)
    assert choose_folder(config(), CHOICES) == newest
    assert runs.next_number(newest.parent) == 3


def test_auto_goes_on_with_free_changes_and_prefers_a_run_that_needs_no_permission(config, stored):
    same = stored("a", config(), number=1)
    other = stored("b", config(optimizer__lr=0.05), number=2)
    assert choose_folder(config(workers=0, epochs=48), CHOICES) == same
    assert choose_folder(config(resume_allow=["optimizer.lr"]), CHOICES) == same
    assert choose_folder(config(optimizer__lr=0.2, resume_allow=["optimizer.lr"]), CHOICES) == other


def test_auto_starts_a_new_run_in_a_grid_and_says_how_the_unfinished_one_would_go_on(config, stored, capsys):
    stored("a", config(), number=1, finished=True)
    unfinished = stored("b", config(seed=1), number=2)
    new = choose_folder(config(seed=1, optimizer__lr=0.05), CHOICES)
    assert new.name not in ("a", "b")
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "optimizer.lr: 0.1 -> 0.05 (confirm)" in told
    assert f"resume={unfinished} resume_allow=[optimizer.lr]" in told

    choose_folder(config(seed=2, optimizer__lr=0.05), CHOICES)
    told = capsys.readouterr().err
    assert "seed: 1 -> 2 (never)" in told
    assert "resume_allow" not in told


def test_auto_says_nothing_when_no_run_is_unfinished(config, stored, capsys):
    stored("a", config(), finished=True)
    assert choose_folder(config(seed=1), CHOICES).name != "a"
    assert not capsys.readouterr().err


def test_fewer_epochs_are_another_run_for_auto_and_refused_in_a_folder(config, stored):
    folder = stored("a", config(), finished=True)
    assert choose_folder(config(epochs=12), CHOICES) != folder
    with pytest.raises(ConfigError, match="epochs: 24 -> 12"):
        settled(folder, config(epochs=12, resume=str(folder)))


def test_a_finished_run_is_settled_until_more_is_asked_of_it(config, stored):
    folder = stored("a", config(), finished=True)
    assert settled(folder, config(workers=0, threads=1)).exit_code == 0
    for more in ({"epochs": 48}, {"patience": 3}, {"compression": {}}):
        assert settled(folder, config(**more)) is None
    runs.write_status(folder, "stopped", 143)
    assert settled(folder, config()) is None


def test_auto_prefers_the_finished_run_of_this_config_to_a_newer_one_that_it_could_lengthen(config, stored, capsys):
    same = stored("a", config(epochs=2), finished=True)
    longer = stored("b", config(epochs=1), finished=True)
    assert choose_folder(config(epochs=2, resume="auto"), CHOICES) == same
    assert capsys.readouterr().err == ""
    assert choose_folder(config(epochs=3, resume="auto"), CHOICES) == longer
    assert "which was finished: this command asks it for more" in capsys.readouterr().err


def test_resume_allow_must_name_keys(config):
    with pytest.raises(ConfigError, match=r"did you mean 'optimizer\.lr'"):
        choose_folder(config(resume_allow=["optimzer.lr"]), CHOICES)


@pytest.fixture
def without_drawings(monkeypatch):
    """Drawing is two thirds of a tiny run."""
    from matplotlib.figure import Figure
    from PIL import Image

    def blank(figure, buffer, format, **options):
        Image.new("RGB", (1, 1)).save(buffer, {"jpg": "jpeg"}.get(format, format))

    monkeypatch.setattr(Figure, "savefig", blank)


def files(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def level(folder):
    return json.loads((folder / "status.json").read_text())["resume_level"]


def tensors(folder):
    from cvtrain.core import weights

    read = weights.read(folder / "weights" / "last.safetensors")[0]
    return {name: value.numpy().tobytes() for name, value in read.items()}


@pytest.mark.usefixtures("one_thread", "without_drawings")
def test_more_epochs_of_a_finished_run_equal_the_longer_run_to_the_bit_under_a_constant_rate(cvtrain):
    whole = cvtrain(*QUICK, "scheduler=constant", "epochs=3", "name=whole")
    assert whole.code == 0, whole.err
    short = cvtrain(*QUICK, "scheduler=constant", "epochs=2")
    assert level(short.folder) is None
    longer = cvtrain(*QUICK, "scheduler=constant", "epochs=3", "resume=auto")
    assert longer.code == 0, longer.err
    assert longer.folder == short.folder
    assert "resume: bit-exact" in longer.err
    assert "no rate of Constant so far changes" in longer.err
    assert level(longer.folder) == "bit-exact"
    assert tensors(longer.folder) == tensors(whole.folder)
    assert longer.json["metrics"] == whole.json["metrics"]
    assert "already finished" in cvtrain(*QUICK, "scheduler=constant", "epochs=3", "resume=auto").err


@pytest.mark.usefixtures("one_thread", "without_drawings")
def test_more_epochs_under_a_cosine_are_approximate_and_the_jump_is_told(cvtrain):
    argv = (*QUICK, "scheduler=cosine", "optimizer.lr=0.1")
    short = cvtrain(*argv, "epochs=2")
    longer = cvtrain(*argv, "epochs=4", "threads=2", "resume=auto")
    assert longer.code == 0, longer.err
    # 3 steps an epoch: step 5 of 6 had 0.1·(1 + cos(5π/6))/2, step 6 of 12 has half of the rate.
    assert "Cosine now ends at epoch 4; the last step had lr 0.0067, the next has 0.05" in longer.err
    assert "resume: approximate: epochs 2 then 4" in longer.err
    assert level(short.folder) == "approximate"
    resumes = manifest(short.folder)["resumes"]
    assert [(r["epoch"], r["step"], r["changes"]) for r in resumes] == [(2, 6, ["epochs: 2 -> 4", "threads: 1 -> 2"])]


@pytest.mark.usefixtures("one_thread", "without_drawings")
def test_another_number_of_threads_is_said_to_be_sample_exact(cvtrain):
    argv = (*QUICK, "scheduler=constant")
    folder = cvtrain(*argv, "epochs=1").folder
    longer = cvtrain(*argv, "epochs=2", "threads=2", "resume=auto")
    assert longer.folder == folder
    assert "resume: sample-exact, not bit-exact: threads 1 then 2" in longer.err
    assert level(folder) == "sample-exact"


@pytest.mark.usefixtures("one_thread", "without_drawings")
def test_a_changed_config_is_refused_untouched_then_allowed_and_recorded(cvtrain):
    first = cvtrain(*QUICK, "epochs=1")
    folder, before = first.folder, files(first.folder)
    changed = (*QUICK, "epochs=2", "optimizer.lr=0.05", "scheduler=plateau", "precision=bf16", f"resume={folder}")
    refused = cvtrain(*changed)
    assert refused.code == 2
    assert not refused.out
    assert "OneCycle -> Plateau (confirm)" in refused.err
    assert "resume_allow=[optimizer.lr,scheduler,precision]" in refused.err
    assert files(folder) == before
    old = (folder / "args.yaml").read_text()

    longer = cvtrain(*changed, "resume_allow=[optimizer.lr,scheduler,precision]")
    assert longer.code == 0, longer.err
    assert longer.folder == folder
    assert "resume: approximate: optimizer.lr 0.1 then 0.05" in longer.err
    entry = manifest(folder)["resumes"][0]
    assert (entry["level"], entry["epoch"]) == ("approximate", 1)
    assert "scheduler: OneCycle -> Plateau" in entry["changes"]
    assert len(manifest(folder)["config_hashes"]) == 2
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert yaml.safe_load(old)["optimizer"]["lr"] == 0.1
    assert args["optimizer"]["lr"] == 0.05
    assert "0.05" in longer.err.split("2/2")[1].splitlines()[0].replace("5.00e-02", "0.05"), "the new rate is used"

    from cvtrain.core import weights

    document = json.loads(weights.read(folder / "weights" / "last.safetensors")[1]["cvtrain"])
    assert document["precision"]["format"] == "bfloat16", "not the format that the checkpoint was trained in"

    # From here on the new config is the run's own, also for the checkpoint from before the change.
    (folder / "weights" / "last.safetensors").unlink()
    again = cvtrain(*changed, "epochs=3")
    assert again.code == 0, again.err
    assert "from last.previous.safetensors" in again.err
    assert cvtrain(*QUICK, "epochs=3", f"resume={folder}").code == 2


@pytest.mark.usefixtures("one_thread", "without_drawings")
def test_a_checkpoint_of_a_config_that_the_run_never_had_is_refused(cvtrain):
    folder = cvtrain(*QUICK, "epochs=1").folder
    claimed = manifest(folder)
    claimed["config"]["optimizer"]["lr"] = 0.05
    claimed["config_hashes"] = [runs.config_hash(claimed["config"])]
    (folder / "manifest.json").write_text(json.dumps(claimed))
    answer = cvtrain(*QUICK, "epochs=2", "optimizer.lr=0.05", f"resume={folder}")
    assert answer.code == 2
    assert "was trained with another config" in answer.err
    assert manifest(folder) == claimed, "a refused config leaves no trace"
