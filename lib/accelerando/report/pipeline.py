"""What comes out of a pipeline: a summary on the console, and ``report.html``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerando.report import page

Results = Mapping[str, Any]  # what pipeline.json holds


def metric_names(results: Results) -> list[str]:
    """The metrics of all splits, in their order."""
    found = dict.fromkeys(name for values in results["metrics"].values() for name in values)
    return [name for name in found if name != "count"]


def summary_text(results: Results) -> str:
    """The result on one screen."""
    from accelerando.report.results import aligned_table

    rows = {name: "ran" if one["ran"] else f"skipped: {one['why']}" for name, one in results["steps"].items()}
    wide = max(map(len, rows.values()))
    seconds = {name: one["seconds"] for name, one in results["steps"].items()}
    lines = [f"{name:<10}{text:<{wide}}{seconds[name]:>10,.1f} s" for name, text in rows.items()]
    metrics = {
        f"{split} ({values.get('count', 0):,})": {
            name: f"{value:.4f}" for name, value in values.items() if isinstance(value, float)
        }
        for split, values in results["metrics"].items()
    }
    lines += ["", aligned_table(metric_names(results), metrics), "", f"data    {results['data']['title']}"]
    lines += [f"run     {results['run']}"]
    lines += [f"export  {results['export']['folder']}"] if "export" in results else []
    lines += [f"Hub     {results['hub']['url']}"] if "hub" in results else []
    return "\n".join([*lines, f"report  {results['report']}"])


def write_page(path: Path, results: Results, settings: Mapping[str, Mapping[str, Any]], shown: Sequence[str]) -> None:
    """``report.html``: what came out, what was done, the data and its check, the export, the settings of the training.

    ``shown``: the metrics in the headline, the most important one first.
    """
    data, check = results["data"], results["validation"]
    last = "test" if "test" in results["metrics"] else next(iter(results["metrics"]))
    values = results["metrics"][last]
    tiles = [(f"{last} {name}", f"{values[name]:.4f}", f"{values.get('count', 0):,} samples")
             for name in [name for name in shown if name in values][:2]]  # fmt: skip
    tiles.append(("data", data.get("revision") or "as it lies", data.get("commit", "")[:12]))
    tiles += [(f"{split} samples", f"{facts['count']:,}", "") for split, facts in check["splits"].items()]
    steps = [(name, "ran" if one["ran"] else "skipped", one["why"], one["seconds"])
             for name, one in results["steps"].items()]  # fmt: skip
    metrics = [(name, *(found.get(name) for found in results["metrics"].values())) for name in metric_names(results)]
    blocks = [
        page.headline(tiles),
        page.table(["step", "now", "why", "seconds"], steps, title="Steps"),
        page.table(["metric", *results["metrics"]], metrics, title="Metrics of the best weights"),
    ]
    if data.get("tracked"):
        rows = [(one["path"], one["file"], one["md5"]) for one in data["tracked"]]
        note = "; ".join(filter(None, [f"{data['repository']}, commit {data['commit']}", data.get("note", "")]))
        title = f"Data version {data['revision']}"
        blocks.append(page.table(["data", "named by", "md5"], rows, note=note, title=title))
    for head, counts in check["classes"].items():
        rows = [(name, *(found.get(name) for found in counts.values())) for name in next(iter(counts.values()))]
        blocks.append(page.table([head, *counts], rows, title=f"Samples by {head}"))
    lines = [("error, accepted", line) for line in check["errors"]] + [("warning", line) for line in check["warnings"]]
    if lines:
        blocks.append(page.table(["", "what"], lines, title="What the check of the data found"))
    if "export" in results:
        rows = [(name, about["precision"], about["largest_difference"], about["equal_predictions"], about["samples"])
                for name, about in results["export"]["files"].items()]  # fmt: skip
        header = ["file", "precision", "largest difference", "equal predictions", "samples"]
        blocks.append(page.table(header, rows, note=results["export"]["folder"], title="Export"))
    blocks += [page.command(results["command"]), page.settings(settings, title="Settings of the training")]
    page.write_report(path, results["name"], f"{Path(results['script']).name}, {data['title']}", blocks)
