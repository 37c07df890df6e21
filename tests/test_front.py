"""Help, errors and the audit: everything that happens before torch is imported."""

import contextlib
import os
import re
import signal
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvtrain import catalog, runs, schema
from cvtrain.audit import HYDRA_TARGETS, audit
from cvtrain.compose import Composer
from cvtrain.errors import ConfigError, LockedError

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["modle=resnet18"], ["'modle'", "model=resnet18"]),
        (["model=resnet81"], ["model=resnet81", "'resnet18'"]),
        (["epochs=-3"], ["epochs=-3", "at least 1"]),
        (["optimizer.lr=fast"], ["optimizer.lr=fast", "number above 0"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "number above 0"]),
        (["monitor=val/f2"], ["monitor=val/f2", "'val/f1'"]),
        (["regularizer=label_smothing"], ["label_smothing", "'label_smoothing'"]),
        (["regularizer=[label_smothing,stochastic_depth]"], ["label_smothing", "'label_smoothing'"]),
        (["predcit", "run=x"], ["'predcit'", "'predict'"]),
        (["optimizer.lrr=0.1"], ["'optimizer.lrr'", "'optimizer.lr'"]),
        (["epoch=3"], ["'epoch'", "epochs=3"]),
        (["--multrun"], ["--multrun", "'--multirun'"]),
        (["model=lenet5,simple_cnn"], ["-m"]),
        (["seed=[1"], ["seed=[1", "key=value"]),
        (["compression.ptq_static.max_drop=5"], ["max_drop=5", "at most 1"]),
        (["optimizer.momentum=0"], ["optimizer.nesterov", "optimizer.momentum"]),
        (["precision=fp16", "device=cpu"], ["precision=fp16", "device=cpu", "precision=amp"]),
        (["max_time=5"], ["max_time=5", "30m"]),
        (["data.val_fraction=0.6", "data.test_fraction=0.5"], ["val_fraction", "test_fraction"]),
        (["scheduler.warmup_epochs=30"], ["scheduler.warmup_epochs=30", "epochs=24"]),
        (["trusted=mypkg"], ["trusted=[mypkg]"]),
        (["resume=/nowhere"], ["resume=/nowhere", "resume=auto"]),
        (["-cd", "/nowhere"], ["/nowhere", "not a folder"]),
        (["~optimizer"], ["optimizer was removed", "~optimizer"]),
        (["~seed"], ["seed was removed", "~seed"]),
        (["val", "runn=x"], ["'runn'", "run=x"]),
        (["list", "modell"], ["'modell'", "'model'"]),
        (["-m", "seed=0,1", "model=lenet5,resnet81"], ["model=resnet81", "'resnet18'"]),
        (["--experimental-rerun=x.pickle"], ["--experimental-rerun", "-cd"]),
    ],
)
def test_a_mistake_gets_a_short_answer_with_the_fix_and_writes_nothing(cvtrain, tmp_path, argv, fragments):
    answer = cvtrain(*argv)
    assert answer.code == 2
    assert not answer.out
    assert len(answer.err.strip().splitlines()) <= 3
    for fragment in fragments:
        assert fragment in answer.err
    assert "Traceback" not in answer.err
    assert list(tmp_path.iterdir()) == []


def test_all_wrong_values_are_told_at_once(cvtrain):
    answer = cvtrain("epochs=-3", "optimizer.lr=fast", "monitor=val/f2")
    assert all(text in answer.err for text in ("epochs=-3", "optimizer.lr=fast", "monitor=val/f2"))


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["list", "model"],
        ["--cfg", "job"],
        ["epochs=-3"],
        ["predcit"],
        ["--info", "searchpath"],
    ],
)
def test_the_front_imports_no_torch(argv):
    code = (
        "import sys\n"
        "from cvtrain import cli\n"
        "from cvtrain.errors import CvtrainError\n"
        f"sys.argv = ['cvtrain'] + {argv!r}\n"
        "try:\n    cli.run(sys.argv[1:])\n"
        "except CvtrainError:\n    pass\n"
        "print('LOADED', sorted({'torch', 'numpy', 'matplotlib'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LOADED []"), done.stdout[-500:]


def test_help_shows_every_verb_group_and_option_with_a_line_each(cvtrain):
    text = cvtrain("--help").out
    groups = catalog.groups()
    for verb in [*catalog.verbs(), "list"]:
        assert re.search(rf"^  {verb} +\S", text, re.MULTILINE), verb
    for group, options in groups.items():
        assert re.search(rf"^{group}  \(default", text, re.MULTILINE), group
        for option, description in options.items():
            assert description, f"{group}/{option}.yaml has no first comment"
            assert re.search(rf"^  {option} +{re.escape(description)}$", text, re.MULTILINE)


def test_train_help_explains_every_key(cvtrain):
    text = cvtrain("train", "--help").out
    keys = catalog.keys("train")
    assert len(keys) == 46
    for name, default, comment in keys:
        assert comment, name
        assert f"  {name}={default}" in text


def test_cfg_job_prints_the_composed_config(cvtrain):
    answer = cvtrain("--cfg", "job", "model=resnet18", "aug=cutmix", "regularizer=[label_smoothing,stochastic_depth]")
    assert answer.code == 0
    assert "name: resnet18" in answer.out
    assert "cvtrain.aug.CutMix" in answer.out
    assert answer.out.index("label_smoothing:") < answer.out.index("stochastic_depth:")


def test_list_marks_the_default(cvtrain):
    lines = cvtrain("list", "model").out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("* ") and "default" not in line] == ["simple_cnn"]


@pytest.mark.parametrize("target", sorted(HYDRA_TARGETS))
def test_hydras_own_parts_are_not_model_targets(target):
    with pytest.raises(ConfigError, match="refused"):
        audit({"model": {"_target_": target}, "trusted": []}, [])


HOSTILE = [
    "os.system", "posix.system", "subprocess.Popen", "torch.load", "torch.nn.functional.torch.load", "torch.hub.load",
    "torch.save", "torch.utils.cpp_extension.load", "builtins.open", "builtins.eval", "pathlib.Path.write_text",
    "shutil.copy", "numpy.load", "urllib.request.urlopen", "cvtrain.build.resolve",
    "cvtrain.model.torchvision_model.torch.load",
    "hydra.utils.instantiate", "hydra.utils.get_method", "functools.partial", "torch.optim.SGD.__init__", "torch.optim",
    "", "..", "os system", "torch.optim.SGD ",
]  # fmt: skip


@pytest.mark.parametrize("target", HOSTILE)
@pytest.mark.parametrize("where", ["model", "nested", "list"])
def test_a_target_that_is_not_shipped_is_refused_wherever_it_stands(target, where):
    node = {"model": {"_target_": target}, "nested": {"a": {"b": {"_target_": target}}}, "list": [{"_target_": target}]}
    with pytest.raises(ConfigError, match="refused"):
        audit({"x": node[where], "trusted": []}, [])


def test_every_shipped_target_passes_the_audit():
    targets = catalog.shipped_targets()
    assert len(targets) == 96
    audit({"parts": [{"_target_": target} for target in targets], "trusted": []}, [])


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "torch.nn.functional.torch.load",
        "builtins.open",
        "pathlib.Path.write_text",
        "mypkg.Net",
    ],
)
def test_a_yaml_of_the_users_with_a_strange_target_is_refused_before_anything_runs(cvtrain, tmp_path, target):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text(f"_target_: {target}\n")
    answer = cvtrain("-cd", "conf", "model=mine")
    assert answer.code == 2
    assert f"model._target_={target} is refused" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["conf"]


@pytest.mark.parametrize(
    "override",
    [
        "+hydra.callbacks.x._target_=torch.load",
        "+hydra.callbacks.x={_target_:os.system}",
        "hydra.launcher._target_=os.system",
        "hydra.sweeper._target_=os.system",
        "hydra.job_logging.handlers.file.class=os.system",
        "+hydra.job_logging.handlers.x={class:logging.StreamHandler,stream:'ext://os.environ'}",
    ],
)
def test_code_named_below_hydra_is_refused(cvtrain, tmp_path, override):
    answer = cvtrain(override)
    assert answer.code == 2, answer.err
    assert "refused" in answer.err
    assert list(tmp_path.iterdir()) == []


HOSTILE_YAML = {
    "a callback made by a resolver": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra:\n  callbacks:\n    x: "
        "${oc.create:'{_target_: builtins.open, file: MARK, mode: w}'}\n",
        ["experiment=mine"],
    ),
    "a value resolved a second time": (
        "model/mine.yaml",
        "_target_: cvtrain.model.torchvision_model\nname: '\\${oc.create:{_target_:builtins.open,file:MARK,mode:w}}'\n",
        ["model=mine"],
    ),
    "a log file of its choice": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra: {job_logging: {handlers: {file: {filename: MARK}}}}\n",
        ["experiment=mine"],
    ),
    "environment variables": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra: {job: {env_set: {PATH: /tmp}}}\n",
        ["experiment=mine"],
    ),
    "overrides given by the sweeper": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra: {sweeper: {params: {seed: '0,1'}}}\n",
        ["-m", "experiment=mine"],
    ),
    "a handler shown with the help": (
        "hydra/hydra_logging/mine.yaml",
        "version: 1\nhandlers: {x: {class: logging.FileHandler, filename: MARK, mode: w}}\nroot: {handlers: [x]}\n",
        ["--hydra-help", "hydra/hydra_logging=mine"],
    ),
    "a secret of the environment": (
        "experiment/mine.yaml",
        "# @package _global_\nname: ${oc.env:SECRET_TOKEN}\n",
        ["experiment=mine"],
    ),
    "a run folder anywhere": (
        "experiment/mine.yaml",
        "# @package _global_\nhydra: {run: {dir: MARK}}\n",
        ["experiment=mine"],
    ),
    "nesting without end": (
        "experiment/mine.yaml",
        "# @package _global_\nname: " + "[" * 3000 + "\n",
        ["experiment=mine"],
    ),
}


@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_a_hostile_yaml_is_refused_and_leaves_no_mark(cvtrain, tmp_path, monkeypatch, case):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    name, text, argv = HOSTILE_YAML[case]
    path = tmp_path / "conf" / name
    path.parent.mkdir(parents=True)
    path.write_text(text.replace("MARK", str(tmp_path / "mark")))
    answer = cvtrain(*argv, "-cd", "conf")
    assert answer.code == 2, answer.err
    assert "Traceback" not in answer.err
    assert "s3cret" not in answer.err + answer.out
    assert [entry.name for entry in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("part", ["handlers", "formatters"])
def test_a_logging_config_that_names_a_factory_is_refused(cvtrain, tmp_path, part):
    (tmp_path / "conf" / "hydra" / "job_logging").mkdir(parents=True)
    text = f"version: 1\n{part}:\n  x:\n    (): os.system\n"
    (tmp_path / "conf" / "hydra" / "job_logging" / "mine.yaml").write_text(text)
    answer = cvtrain("-cd", "conf", "hydra/job_logging=mine")
    assert answer.code == 2
    assert "hydra.job_logging" in answer.err
    assert "refused" in answer.err
    assert [path.name for path in tmp_path.iterdir()] == ["conf"]


@pytest.mark.parametrize("flag", [[], ["-m"]])
def test_trust_in_a_yaml_file_is_no_trust(cvtrain, tmp_path, flag):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\ntrusted: [os]\nmodel: {_target_: os.system}\n"
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(text)
    answer = cvtrain(*flag, "-cd", "conf", "experiment=mine", *(["seed=0,1"] if flag else []))
    assert answer.code == 2
    assert "command line" in answer.err


def test_a_target_made_by_a_resolver_is_seen(cvtrain, tmp_path):
    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "conf" / "loss" / "mine.yaml").write_text(
        "_target_: cvtrain.loss.CrossEntropy\ncode: '_target_: os.system'\nx: ${oc.create:${loss.code}}\n"
    )
    answer = cvtrain("-cd", "conf", "loss=mine")
    assert answer.code == 2
    assert "loss.x._target_=os.system is refused" in answer.err


def test_yaml_that_does_not_parse_is_named(cvtrain, tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "mine.yaml").write_text("a: b: c\n")
    answer = cvtrain("-cd", "conf", "model=mine")
    assert answer.code == 2
    assert "mine.yaml" in answer.err


def test_every_shipped_key_has_a_rule_and_every_rule_a_key():
    used = set()

    def walk(node):
        for key, value in node.items():
            if isinstance(value, dict):
                walk(value)
            if not key.startswith("_"):
                used.add(key)

    for verb in catalog.verbs():
        if verb != "train":
            used.update(name for name, _, _ in catalog.keys(verb))
    # Each option is composed and held against the rules in tests/configs; here the keys of its file are enough.
    walk(Composer("train", None).check([], [])[1])
    for path in CONFIGS.rglob("*.yaml"):
        walk(yaml.safe_load(path.read_text()) or {})
    unused = set(schema.RULES) - used
    assert unused == set()


def test_one_edit_typos_of_every_key_and_group_find_the_right_name(cvtrain):
    names = [name for name, _, _ in catalog.keys("train")] + list(catalog.groups())
    found = total = 0
    for name in names:
        for typo in {name[:1] + name[2:], name[:-1], name + "s" if name[-1] != "s" else name + "z"} - set(names):
            total += 1
            found += name in cvtrain(f"{typo}=1").err.split("groups:")[0]
    assert total > 90
    assert found / total >= 0.95


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from([*schema.RULES, *catalog.groups(), "optimizer.lr", "data.root", "x.y"]),
    value=st.one_of(
        st.integers().map(str), st.floats().map(str), st.text(string.printable, max_size=8), st.just("null")
    ),
    prefix=st.sampled_from(["", "+", "++", "~"]),
)
def test_any_override_is_accepted_or_refused_with_a_message(key, value, prefix):
    composer = Composer("train", None)
    try:
        composer.check([f"{prefix}{key}={value}"], [])
    except ConfigError as error:
        assert str(error).strip()
    else:
        assert True


def test_class_names_that_look_like_numbers_may_stand_beside_others():
    config = Composer("train", None).check(["class_weights={1: 2, other: 1}"], [])[1]
    assert config["class_weights"] == {"1": 2, "other": 1}
    assert runs.config_hash(config)


def test_a_warm_up_longer_than_a_phase_is_refused_by_its_name():
    phases = [f"resizing.phases.{name}.epochs=2" for name in ("small", "medium", "full")]
    with pytest.raises(ConfigError, match=r"resizing\.phases\.small\.epochs=2"):
        Composer("train", None).check(["resizing=progressive", "epochs=6", "scheduler.warmup_epochs=3", *phases], [])


def test_a_forked_worker_does_not_keep_the_run_locked(tmp_path):
    """Data workers live on for some seconds when their parent is killed."""
    with runs.locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
    try:
        for _ in range(50):  # the child closes its copy as its first act, which may take a moment
            with contextlib.suppress(LockedError), runs.locked(tmp_path):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the child holds the lock")
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
