"""The page of a run: one HTML file that needs nothing else and no network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from cvtrain import runs
from cvtrain.core import html
from cvtrain.report import charts
from cvtrain.report.charts import Series, few_points, line_chart, percent, points, short
from cvtrain.report.console import human_bytes, short_ms
from cvtrain.report.folder import RunFiles, number
from cvtrain.report.sections import Findings, calibration, classes, errors, saved
from cvtrain.report.tables import Cell, sortable

TITLES = {
    "loss": "loss", "acc": "accuracy", "top5": "top-5 accuracy", "balanced_acc": "balanced accuracy",
    "precision": "precision (macro)", "recall": "recall (macro)", "f1": "F1 (macro)", "f1_micro": "F1 (micro)",
    "map": "mean average precision", "hamming": "Hamming loss", "auroc": "AUROC (one-vs-rest, macro)",
    "ece": "calibration error (ECE)", "ece_uncalibrated": "ECE without the temperature",
}  # fmt: skip


def page(run: RunFiles, found: Findings) -> str:
    """Return the page of a run."""
    sections = {
        "results": _results(run),
        "settings": _settings(run, found),
        "curves": _curves(run),
        "classes": classes(run),
        "errors": errors(run, found),
        "artifacts": _artifacts(run),
        "calibration": calibration(run, found),
        "environment": _environment(run),
        "reproduce": _again(run, found),
    }
    return framed(f"{title_of(run)}: report", _header(run), {name: body for name, body in sections.items() if body})


def framed(title: str, header: str, sections: Mapping[str, str]) -> str:
    """Return a page of sections by anchor, with links to them under the header."""
    links = "".join(f'<a href="#{name}">{name}</a>' for name in sections)
    body = f'<header>{header}</header>\n<nav aria-label="Sections">{links}</nav>\n<main>\n' + "\n".join(
        sections.values()
    )
    style, script = (html.asset("cvtrain.report", name) for name in ("report.css", "report.js"))
    return html.document(title, body + "\n</main>", style, script)


def title_of(run: RunFiles) -> str:
    """Return what was trained on what: the network's name, or that of its option."""
    node = run.config.get("model")
    name = node.get("name") if isinstance(node, dict) else None
    model = name or run.manifest.get("choices", {}).get("model", "model")
    return f"{model} on {run.manifest.get('data', {}).get('name', 'data')}"


def winner_of(run: RunFiles) -> dict[str, Any] | None:
    """Return the row of the artifact to deploy; None where there is none."""
    return next((row for row in run.artifacts if row["artifact"] == run.summary.get("winner")), None)


def duration(seconds: float) -> str:
    """Return a time as people say it: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _header(run: RunFiles) -> str:
    data = run.manifest.get("data", {})
    accuracy, interval = run.metrics.get("test/acc"), run.interval("test/acc")
    parts = [
        f"<p class=over>{escape(run.folder.parent.name)}/{escape(run.folder.name)}</p><h1>{escape(title_of(run))}</h1>"
    ]
    state = str(run.status.get("state", "unknown"))
    # A training that writes its page at its end is still running.
    if state != "done" and not (state == "running" and run.metrics):
        why = str(run.status.get("reason") or "")
        parts.append(f'<p class="verdict bad">{escape(state)}{": " * bool(why)}{escape(why)}</p>')
    if accuracy is not None:
        parts.append(f'<p class="big"><b>{100 * accuracy:.2f}<span> %</span></b> <span>test {run.measure}</span></p>')
        if interval is not None:
            low, high = interval
            parts.append(
                f'<div class="span">{charts.interval_bar(accuracy, low, high)}</div><p class=soft>95 % interval '
                f"{100 * low:.2f} to {100 * high:.2f} %, on {data.get('test', '?')} test pictures</p>"
            )
    counts = " / ".join(f"{data[split]:,}" for split in ("train", "val", "test") if split in data)
    tiles = [("train / val / test pictures", counts), ("classes", str(len(run.class_names)))]
    if run.artifacts:
        tiles.append(("parameters", f"{int(number(run.artifacts[0], 'params')):,}"))
    best = run.best_epoch()
    tiles.append(("epochs", f"{len(run.history)}{f', best {best}' if best else ''}"))
    if run.seconds is not None:
        tiles.append(("trained for", duration(run.seconds)))
    winner = winner_of(run)
    if winner is not None:
        size = f"{short_ms(number(winner, 'latency_ms_p50'))} ms, {human_bytes(int(number(winner, 'bytes')))}"
        tiles.append(("to deploy", f"{winner['artifact']}: {percent(number(winner, 'accuracy'))}, {size}"))
    return "".join(parts) + html.tiles(tiles)


def _results(run: RunFiles) -> str:
    names = list(dict.fromkeys(name.split("/", 1)[1] for name in run.metrics if name.startswith(("val/", "test/"))))
    if not names:
        return html.section("Results", "results", "<p>There are no results yet: the run has not come to its end.</p>")
    rows = []
    for name in sorted(names, key=lambda name: list(TITLES).index(name) if name in TITLES else len(TITLES)):
        test, val = (run.metrics.get(f"{split}/{name}", math.nan) for split in ("test", "val"))
        interval = run.interval(f"test/{name}")
        between = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "–"
        title = run.measure if name == "acc" else TITLES.get(name, name)
        low = interval[0] if interval else math.nan
        cells = [Cell(_shown(test), test), Cell(between, low), Cell(_shown(val), val)]
        rows.append([Cell(title), *cells])
    note = "<p class=soft>The validation set chose the checkpoint; the test set was looked at once.</p>"
    table = sortable(("metric", "test", "95\u00a0% interval", "validation"), rows, "Metrics of the model", "plain")
    return html.section("Results", "results", note + table)


def _shown(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _settings(run: RunFiles, found: Findings) -> str:
    if found.settings is None:
        body = "<p>The defaults of this version could not be compared with.</p>"
    elif not found.settings:
        body = "<p>Everything is at its default.</p>"
    else:
        body = "<p class=soft>What differs from the defaults.</p>" + html.table(
            ("key", "this run", "default"), [(one.key, one.value, one.default) for one in found.settings]
        )
    try:
        text = (run.folder / runs.ARGS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    whole = (
        f'<details><summary>The whole config ({runs.ARGS})</summary><pre tabindex="0">{escape(text)}</pre></details>'
    )
    return html.section("Settings", "settings", body + whole * bool(text))


def _curves(run: RunFiles) -> str:
    if not run.history:
        return html.section("Curves", "curves", "<p>No epoch has been finished.</p>")
    best = run.best_epoch()
    both = ("train", "val")
    accuracies = [run.column(f"{name}/acc") for name in both]
    drawn = [
        line_chart("c-loss", "Loss", [Series(n, run.column(f"{n}/loss"), n) for n in both], short, best),
        line_chart(
            "c-acc", run.measure.capitalize(),
            [Series(name, values, name) for name, values in zip(both, accuracies, strict=True)], percent, best,
        ),
        line_chart(
            "c-gap", "Gap: train minus val accuracy, in points",
            [Series("gap", [a - b for a, b in zip(*accuracies, strict=False)], "gap")], few_points, best, zero=True,
        ),
        line_chart("c-lr", "Learning rate", [Series("lr", run.column("lr"), "rate")], short, best),
    ]  # fmt: skip
    note = (
        "<p class=soft>Training is measured while the model learns, on augmented pictures and with dropout: "
        "it may well lie below validation.</p>"
    )
    return html.section("Curves", "curves", f'<div class="charts">{"".join(drawn)}</div>{note}')


def _named(row: Mapping[str, Any], winner: str | None) -> str:
    star = "★ " * (row["artifact"] == winner)
    where = f"{row['runtime']}: {row['file']}"
    return f"<span>{star}{escape(str(row['artifact']))}</span><br><small>{escape(where)}</small>"


def _artifacts(run: RunFiles) -> str:
    rows, winner = [], run.summary.get("winner")
    for row in run.artifacts:
        value = {key: number(row, key) for key in row}
        per_second = (
            1000 * value["batch"] / value["latency_batch_ms_p50"] if value.get("latency_batch_ms_p50") else math.nan
        )
        delta = f"{points(value['delta'])} [{points(value['delta_low'])}, {points(value['delta_high'])}]"
        rows.append([
            Cell(_named(row, winner), markup=True, kind="artifact" + " winner" * (row["artifact"] == winner)),
            Cell(f"{100 * value['accuracy']:.2f} %", value["accuracy"]),
            Cell("–" if row is run.artifacts[0] else delta, value["delta"]),
            Cell(percent(value["agreement"]), value["agreement"]),
            Cell(human_bytes(int(value["bytes"])), value["bytes"]),
            Cell(f"{short_ms(value['latency_ms_p50'])} ms", value["latency_ms_p50"]),
            Cell(f"{per_second:,.0f}", per_second),
            Cell(f"{value['ece']:.3f}", value["ece"]),
            Cell(f"{int(value['params']):,}", value["params"]),
        ])  # fmt: skip
    if not rows:
        return ""
    heads = (
        "artifact", run.measure, "Δ points [95\u00a0%]", "same answers", "size", "batch\u00a01",
        f"images/s, batch\u00a0{int(number(run.artifacts[0], 'batch'))}", "ECE", "parameters",
    )  # fmt: skip
    notes = "".join(
        f"<li>{escape(row['artifact'])}: {escape(row['note'])}</li>" for row in run.artifacts if row.get("note")
    )
    text = (
        "<p class=soft>Each file was loaded in its own runtime and judged on the test pictures, on the CPU. "
        f"{'★ is the one to deploy within the budget.' if winner else 'None fits the budget.'}</p>"
    )
    table = sortable(heads, rows, "Artifacts of this run")
    drawing = saved(run, "artifacts.png", "Accuracy against latency of each artifact; the area is the file's size")
    return html.section("Artifacts", "artifacts", text + table + f"<ul class=soft>{notes}</ul>" * bool(notes) + drawing)


def environment(run: RunFiles) -> dict[str, str]:
    """Return what the run was made with, as texts by name."""
    manifest = run.manifest
    hardware, data = manifest.get("hardware", {}), manifest.get("data", {})
    found = {
        "device": hardware.get("gpu") or hardware.get("device"),
        "processor": hardware.get("cpu"),
        "CPU threads": hardware.get("threads"),
        "system": hardware.get("system"),
        **manifest.get("versions", {}),
        "commit": str(manifest.get("git") or "")[:12],
        "pretrained": (manifest.get("pretrained") or {}).get("source")
        if isinstance(manifest.get("pretrained"), dict)
        else None,
        "data fingerprint": str(data.get("fingerprint", ""))[:16],
        "config hash": manifest.get("config_hash"),
    }
    return {name: str(value) for name, value in found.items() if value}


def _environment(run: RunFiles) -> str:
    pairs = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in environment(run).items())
    resumes = run.manifest.get("resumes", [])
    note = ""
    if resumes:
        levels = ", ".join(str(entry.get("level")) for entry in resumes)
        note = f"<p>Resumed {len(resumes)} time{'s' * (len(resumes) > 1)}: {escape(levels)}.</p>"
    return html.section("Environment", "environment", f'<dl class="facts">{pairs}</dl>{note}')


def _again(run: RunFiles, found: Findings) -> str:
    if not found.command:
        return ""
    text = "<p class=soft>The command that makes this run again, with the same data, versions and kind of machine.</p>"
    return html.section(
        "Reproduce it", "reproduce", f'{text}<pre tabindex="0"><code>{escape(found.command)}</code></pre>'
    )
