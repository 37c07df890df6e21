"""`cvtrain report`: what it tells of runs is theirs, and their pages work in a real browser."""

import csv
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import CHROMIUM, Browser
from command_line import run_cvtrain
from sklearn.metrics import confusion_matrix

from cvtrain.command import report
from cvtrain.core.files import write_json
from cvtrain.errors import ConfigError
from cvtrain.evaluation import CalibrationError, paired_bootstrap
from cvtrain.report.folder import read_run

COMMAND = (
    *("epochs=2", "compression=none", "export=[onnx]", "logger=none", "threads=1", "model=lenet5"),
    *("scheduler.pct_start=0.2", "report=true"),
)
NASTY = '<script>alert(1)</script>"&'


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A real run of two epochs."""
    folder = tmp_path_factory.mktemp("trained")
    answer = run_cvtrain(folder, *COMMAND, "json=true")
    assert answer.code == 0, answer.err
    return answer.folder


@pytest.fixture
def copied(trained, tmp_path):
    """Copies of the run, to be changed."""

    def copy(name="copy"):
        return Path(shutil.copytree(trained, tmp_path / name))

    return copy


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    opened = Browser()
    yield opened
    opened.close()


class Reader(HTMLParser):
    """Checks that tags nest, and collects texts by element, pictures and everything that points elsewhere."""

    VOID = ("meta", "img", "br", "rect", "line", "circle", "path")

    def __init__(self, text):
        super().__init__()
        self.open, self.images, self.links, self.texts, self.tags = [], [], [], [], Counter()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        found = dict(attrs)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.links += [found[key] for key in ("src", "href", "srcset", "action") if key in found]
        if tag == "img":
            self.images.append(found)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip() and self.open[-1] not in ("style", "script"):
            self.texts.append(data.strip())


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def rewrite(folder, name, change):
    """Change the rows of a CSV file of a run folder."""
    rows = change(rows_of(folder / name))
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    write_json(folder / name, content)


def named(folder, names):
    """Give the classes of a run other names."""
    old = json.loads((folder / "manifest.json").read_text())["data"]["classes"]
    new = dict(zip(old, names, strict=True))
    edit(folder, "manifest.json", lambda manifest: manifest["data"].update(classes=list(names)))
    rewrite(folder, "per_class.csv", lambda rows: [{**row, "class": new[row["class"]]} for row in rows])
    keys = ("label", "predicted")
    rewrite(folder, "predictions.csv", lambda rows: [{**row, **{k: new[row[k]] for k in keys}} for row in rows])
    return folder


def test_a_training_leaves_the_page_that_the_verb_writes_again(trained):
    path = trained / "report.html"
    pictures = path.read_text().count("data:image/")
    assert pictures > report.ERRORS
    path.write_text("")
    answer = run_cvtrain(trained.parent, "report", str(trained))
    assert (answer.code, answer.last) == (0, str(path))
    assert path.read_text().count("data:image/") == pictures


def test_the_page_of_a_run_tells_its_numbers_and_points_nowhere_but_into_itself(trained):
    text = (trained / "report.html").read_text()
    read = Reader(text)
    assert len(text) < 5e6
    assert all(link.startswith(("data:image/", "#")) for link in read.links)
    assert {link[1:] for link in read.links if link[0] == "#"} <= set(re.findall(r'id="([\w-]+)"', text))
    assert not re.search(r"https?:|url\(|@import", text)
    summary = json.loads((trained / "metrics.json").read_text())
    low, high = summary["intervals_95"]["test/acc"]
    assert f"{100 * summary['metrics']['test/acc']:.2f}" in read.texts
    assert any(f"{100 * low:.2f} to {100 * high:.2f}" in said for said in read.texts)
    assert {row["artifact"] for row in summary["artifacts"]} == {"fp32", "onnx"}
    for row in summary["artifacts"]:
        assert any(said.removeprefix("★ ") == row["artifact"] for said in read.texts)
    wrong = sum(row["correct"] == "0" for row in rows_of(trained / "predictions.csv"))
    assert wrong > 0
    shown = min(wrong, report.ERRORS)
    assert sum("predicted" in image["alt"] for image in read.images) == shown
    assert sum("what speaks for" in image["alt"] for image in read.images) == shown


def test_the_settings_are_what_the_command_changed_and_nothing_else(trained):
    found = {one.key: (one.value, one.default) for one in report.settings_of(read_run(trained))}
    assert found == {
        "model": ("lenet5", "simple_cnn"),
        "compression": ("none", "prune_unstructured, ptq_static"),
        "export": ("onnx", "onnx, safetensors"),
        "logger": ("none", "tensorboard"),
        "epochs": ("2", "24"),
        "threads": ("1", "null"),
        "json": ("true", "false"),
        "scheduler.pct_start": ("0.2", "0.3"),
    }


def test_composing_the_defaults_leaves_the_job_that_is_running_as_it_is(trained):
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    before = OmegaConf.create({"hydra": {"job": {"name": "mine"}}})
    HydraConfig.instance().cfg = before
    everywhere = GlobalHydra.instance().hydra
    report._composed.cache_clear()
    report.settings_of(read_run(trained))
    assert HydraConfig.instance().cfg is before
    assert GlobalHydra.instance().hydra is everywhere


def test_the_command_that_makes_the_run_again_is_the_one_that_made_it(trained, copied):
    words = [word if "[" not in word else f"'{word}'" for word in ("cvtrain", *COMMAND)]
    assert report.command_of(read_run(trained)) == " ".join(words)
    folder = copied()
    (folder / ".hydra" / "overrides.yaml").write_text("- data.root=my photos/a'b\n- resume=auto\n- seed=1\n")
    edit(folder, "manifest.json", lambda manifest: manifest.update(command=["x", "-cd", "my conf", "seed=0,1", "-m"]))
    assert report.command_of(read_run(folder)) == """cvtrain -cd 'my conf' 'data.root=my photos/a'"'"'b' seed=1"""


def test_the_calibration_error_is_that_of_the_probabilities_in_predictions_csv(copied):
    folder, rng = copied(), np.random.default_rng(0)

    def change(rows):
        return [
            {**row, "confidence": round(float(rng.random()), 6), "correct": int(rng.random() < 0.6)} for row in rows
        ]

    rewrite(folder, "predictions.csv", change)
    rows = rows_of(folder / "predictions.csv")
    sure = torch.tensor([float(row["confidence"]) for row in rows], dtype=torch.float64)
    reference = CalibrationError()
    right = torch.tensor([int(row["correct"]) for row in rows])
    reference.add(torch.stack([sure, sure - 1], 1), 1 - right)
    bins, ece = report.calibration(read_run(folder).predictions)
    assert abs(ece - reference.compute()) < 1e-9
    assert sum(one.count for one in bins) == len(rows)
    assert f"is {100 * ece:.2f} points" in report.write_report(folder).read_text()


def test_the_matrix_on_the_page_is_scikit_learns(trained):
    text = report.write_report(trained).read_text()
    rows = rows_of(trained / "predictions.csv")
    labels, answers = ([row[key] for row in rows] for key in ("label", "predicted"))
    names = json.loads((trained / "manifest.json").read_text())["data"]["classes"]
    wanted = confusion_matrix(labels, answers, labels=names)
    cells = re.findall(r"<title>(\S+), predicted (\S+): (\d+) \(", text)
    found = np.zeros_like(wanted)
    for true, answer, count in cells:
        found[names.index(true), names.index(answer)] = int(count)
    assert (found == wanted).all()


def test_without_weights_or_data_the_errors_are_listed_with_a_sentence(copied):
    folder = copied()
    (folder / "weights" / "model.safetensors").unlink()
    answer = run_cvtrain(folder, "report", "run=.")
    assert answer.code == 0
    read = Reader((folder / "report.html").read_text())
    assert any(said.startswith("Without pictures: ") for said in read.texts)
    assert not any("speaks for" in image["alt"] for image in read.images)


def test_a_run_that_has_only_begun_has_a_page_too(trained, tmp_path):
    for name in ("manifest.json", "args.yaml"):
        shutil.copy(trained / name, tmp_path / name)
    write_json(tmp_path / "status.json", {"state": "stopped", "reason": "by a <signal>"})
    (tmp_path / "results.csv").write_bytes(b"epoch,train/loss\n\x00\xff,")
    (tmp_path / "predictions.csv").write_text("name,label\n1,2\n")
    texts = Reader(report.write_report(tmp_path).read_text()).texts
    assert "stopped: by a <signal>" in texts
    assert any("no results yet" in said for said in texts)


def test_artifacts_of_an_older_cvtrain_are_left_out(copied):
    folder = copied()
    edit(folder, "metrics.json", lambda found: [row.pop("ece") for row in found["artifacts"]])
    edit(folder, "status.json", lambda found: found.update(state="running"))
    text = report.write_report(folder).read_text()
    assert 'id="artifacts"' not in text
    assert "verdict bad" not in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    answer = run_cvtrain(tmp_path, "report", "run=.")
    assert answer.code == ConfigError.exit_code
    assert "is not a run folder" in answer.err


def worse(folder, wrong):
    """Make the first `wrong` right answers of a run wrong ones, and the run less accurate on val."""

    def change(rows):
        right = [row for row in rows if row["correct"] == "1"]
        for row in right[:wrong]:
            row |= {"correct": "0", "predicted": str((int(row["label"]) + 1) % 10)}
        return rows

    rewrite(folder, "predictions.csv", change)
    edit(folder, "metrics.json", lambda found: found["metrics"].update({"val/acc": 0.01}))
    edit(folder, "manifest.json", lambda found: found["config"].update(seed=7))
    return folder


def test_runs_side_by_side_are_judged_picture_by_picture(trained, copied):
    near, far, other = worse(copied("near"), 1), worse(copied("far"), 60), worse(copied("other"), 0)
    rewrite(other, "predictions.csv", lambda rows: [{**row, "name": f"x{row['name']}"} for row in rows])
    total = len(rows_of(trained / "predictions.csv"))
    answer = run_cvtrain(trained.parent, "report", *map(str, (near, trained, far, other)), "json=true")
    assert answer.code == 0, answer.err
    texts = Reader(Path(answer.json["report"]).read_text()).texts
    assert any("The reference is B, the most accurate on the validation set." in said for said in texts)
    for verdict in ("reference", "worse", "not distinguishable", "other test pictures"):
        assert texts.count(verdict) == 1
    for wrong in (1, 60):
        value, low, high = (f"{100 * number:+.2f}" for number in paired_bootstrap(0, wrong, total))
        assert f"{value} [{low}, {high}]" in texts
    at = texts.index("seed")
    assert texts[at + 1 : at + 5] == ["7", "0", "7", "7"]
    assert "epochs" not in texts


def test_the_folder_of_a_sweep_stands_for_its_jobs(copied, tmp_path):
    sweep = tmp_path / "sweep"
    for name in ("seed=0,lr=1", "seed=1,lr=1"):
        copied(f"sweep/{name}")
    write_json(sweep / "sweep.json", {"number": 1})
    answer = run_cvtrain(tmp_path, "report", f"run={sweep}", "json=true")
    assert answer.code == 0, answer.err
    assert [Path(folder).name for folder in answer.json["runs"]] == ["seed=0,lr=1", "seed=1,lr=1"]
    assert "2 runs side by side" in Reader(Path(answer.json["report"]).read_text()).texts


def several_labels(folder):
    """Make of the run one of several labels, as predictions.csv and per_class.csv have them."""
    edit(folder, "manifest.json", lambda found: found["config"]["task"].update(_target_="cvtrain.task.Multilabel"))
    names = json.loads((folder / "manifest.json").read_text())["data"]["classes"]

    def change(rows):
        for i, row in enumerate(rows):
            answer = {"label": f"{row['label']}|{NASTY}" if i % 2 else "", "probabilities": row.pop("confidence")}
            row.update(answer | {f"p_{name}": f"{0.1 + 0.8 * (name == row['predicted']):.3f}" for name in names})
        return rows

    rewrite(folder, "predictions.csv", change)
    rewrite(folder, "per_class.csv", lambda rows: [{**row, "average_precision": "0.5"} for row in rows])
    return folder


def test_a_run_of_several_labels_has_no_matrix_and_judges_each_label(copied):
    folder = several_labels(copied())
    text = report.write_report(folder).read_text()
    assert "Confusion matrix" not in text
    assert "test exact match" in Reader(text).texts
    given = read_run(folder).predictions
    assert len(given.stated) == 10 * len(given.names)
    assert abs(given.stated.mean() - 0.18) < 1e-9


def hundred(folder):
    """Make of the run one of 100 classes with 3,000 answers."""
    names = [f"class number {i:03d} <b>" for i in range(100)]
    rng = np.random.default_rng(0)
    edit(folder, "manifest.json", lambda manifest: manifest["data"].update(classes=names))
    row = rows_of(folder / "per_class.csv")[0]
    rewrite(folder, "per_class.csv", lambda rows: [{**row, "class": name} for name in names])
    labels = rng.integers(0, 100, 3000)
    answers = np.where(rng.random(3000) < 0.7, labels, rng.integers(0, 100, 3000))

    def change(rows):
        sure = rng.random(3000).round(4)
        given = zip(labels.tolist(), answers.tolist(), sure.tolist(), strict=True)
        return [
            {"name": f"{i}.jpg", "label": names[a], "predicted": names[b], "confidence": c, "correct": int(a == b)}
            for i, (a, b, c) in enumerate(given)
        ]

    rewrite(folder, "predictions.csv", change)
    return folder


PICTURES = "[...document.images].map(image => image.naturalWidth)"
OVERFLOW = "document.documentElement.scrollWidth - innerWidth"
UNNAMED = """[...document.querySelectorAll('svg')].filter(
  svg => svg.getAttribute('role') !== 'img' || !svg.getAttribute('aria-labelledby').split(' ').every(
    id => document.getElementById(id).textContent.trim())).length"""
LATER = "[...document.querySelectorAll('h2, h3')].map(head => head.tagName)"


@pytest.fixture(scope="module")
def pages(trained, tmp_path_factory):
    """The pages of a run, of one with nasty names, of 100 classes, of several labels, and of several runs."""
    place = tmp_path_factory.mktemp("pages")
    plain, nasty, many, labels, last = (
        Path(shutil.copytree(trained, place / name)) for name in ("plain", "nasty", "many", "labels", "last")
    )
    named(nasty, [NASTY, *(f"a long and wordy class name {i}" for i in range(9))])
    made = [report.write_report(folder) for folder in (nasty, hundred(many), several_labels(labels))]
    assert run_cvtrain(place, "report", f"run={plain}").code == 0  # with pictures
    folders = [plain, nasty, many, labels, worse(last, 5)]
    return [plain / "report.html", *made, report.write_comparison(folders, place)]


def test_every_page_opens_without_a_complaint_and_fits_a_telephone_and_a_screen(browser, pages):
    for path in pages:
        for width in (400, 1400):
            browser.open(path, width)
            assert browser.run("innerWidth") == width
            assert browser.run(OVERFLOW) <= 0, (path, width)
            assert all(natural > 0 for natural in browser.run(PICTURES)), path
            assert browser.errors == [], path
        assert browser.run(UNNAMED) == 0
        assert browser.run("document.images.length && [...document.images].every(image => image.alt)") is not False
        assert browser.run("document.documentElement.lang") == "en"
        assert browser.run("document.querySelectorAll('h1').length") == 1
        assert browser.run(LATER)[0] == "H2"
    assert browser.open(pages[0]).run("document.images.length") > 2
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    told = [node["name"]["value"] for node in tree if node.get("role", {}).get("value") in ("image", "img", "button")]
    assert len(told) > 20
    assert all(told)


def test_names_are_shown_as_they_are(browser, pages):
    browser.open(pages[1])
    assert browser.run("document.querySelectorAll('script').length") == 1
    assert NASTY in browser.run("document.body.innerText")


COLUMN = "[...document.querySelectorAll('#classes .tall tbody tr')].map(row => row.cells[2].textContent)"
HEAD = "document.querySelector('#classes .tall thead').rows[0].cells[2]"


def test_tables_sort_by_click_and_by_key(browser, pages):
    browser.open(pages[0])
    before = browser.run(COLUMN)
    numbers = sorted(float(text.split()[0]) for text in before)
    assert len(set(numbers)) > 2
    browser.run(f"{HEAD}.querySelector('button').click()")
    assert [float(text.split()[0]) for text in browser.run(COLUMN)] == numbers
    assert browser.run(f"{HEAD}.getAttribute('aria-sort')") == "ascending"
    browser.run(f"{HEAD}.querySelector('button').focus()")
    browser.press("Enter", text="\r")
    assert [float(text.split()[0]) for text in browser.run(COLUMN)] == numbers[::-1]
    assert browser.run(f"{HEAD}.getAttribute('aria-sort')") == "descending"
    browser.press("Tab")
    browser.press(" ", "Space", " ")
    assert browser.run("document.querySelectorAll('#classes .tall [aria-sort]').length") == 1
    assert browser.run(f"{HEAD}.nextElementSibling.getAttribute('aria-sort')") == "ascending"
    assert browser.run("document.querySelectorAll('table.sortable').length") == browser.run(
        "document.querySelectorAll('table.sortable thead:has(button)').length"
    )
