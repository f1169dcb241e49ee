"""``report.html``: the results of a run as a self-contained page, in light or dark mode, also for printing.

A script combines blocks in any order; each function here returns a block of HTML::

    write_report(
        run / "report.html", "AG News", "DistilBERT, LoRA, seed 1",
        [headline([("macro F1", "0.931", "test, 7 600 rows")]), curves(history, CURVES), confusion(matrix, names)],
    )

All external text (class names, texts, settings) is escaped, and the page's content security policy forbids network
access and other scripts. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import html
import io
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from importlib import resources
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerando.base.files import open_whole
from accelerando.report.plots import MAX_COUNTED_CLASSES, Curve, Point, best_point, points, row_shares, shorten

if TYPE_CHECKING:
    import numpy as np

LONG_TEXT = 280  # characters; longer texts of mistakes are folded
LONG_TABLE = 30  # rows; longer tables scroll in a frame
MOST_SENTENCES = 12  # further ones are folded
DRAWN_POINTS = 300  # per line; longer lines are thinned but keep their peaks

WIDTH, HEIGHT = 440, 230  # of a panel of curves, in SVG units


def write_report(path: str | Path, title: str, subtitle: str, blocks: Sequence[str]) -> None:
    """Writes the page atomically. ``blocks`` are inserted without escaping."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    style, script = _asset("page.css"), _asset("page.js")
    # Only the script with this hash may run, not even one in text that was not escaped.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<header><h1>{_text(title)}</h1><p>{_text(subtitle)}</p></header>
{chr(10).join(blocks)}
</main>
<script>{script}</script>
</body>
</html>
"""
    with open_whole(path, errors="replace") as file:  # a lone surrogate must not lose the page
        file.write(page)


def headline(numbers: Sequence[tuple[str, str, str]]) -> str:
    """Large numbers in tiles: ``(label, value, note)`` each; the note may be empty."""
    tiles = []
    for label, value, note in numbers:
        size = ' class="long"' if len(str(value)) > 8 else ""
        small = f"<span>{_text(note)}</span>" if note else ""
        tiles.append(f'<div class="tile"><dt>{_text(label)}</dt><dd><b{size}>{_text(value)}</b>{small}</dd></div>')
    return f'<section><dl class="tiles">{"".join(tiles)}</dl></section>'


def curves(history: Sequence[Mapping[str, Any]], series: Sequence[Curve], title: str = "Training") -> str:
    """Panels of curves over the steps, with the best point marked and the values at the pointer.

    ``history``: dicts with ``step`` and metric keys, each of which may be missing; NaN and infinity are omitted and
    counted in a note. It may have one row or none.
    """
    return _section(title, f'<div class="panels">{"".join(_panel(history, curve) for curve in series)}</div>')


def confusion(matrix: np.ndarray, names: Sequence[str], title: str = "Confusion matrix") -> str:
    """Counts [C, C], rows true, columns predicted; blue: correct, orange: wrong, opacity: the fraction of the row.

    With up to 20 classes the cells show the counts; more are drawn as an image beside the most confused pairs. Raises
    ValueError unless the matrix is square with a row for each name.
    """
    import numpy as np

    matrix = np.asarray(matrix)
    shares = row_shares(matrix, names)
    if len(names) > MAX_COUNTED_CLASSES:
        return _section(title, _confusion_image(matrix, shares, names) + _confused_pairs(matrix, shares, names))
    dense, length = (" dense", 18) if len(names) > 12 else ("", 24)
    labels = [_text(shorten(str(name), length)) for name in names]
    columns = "".join(
        f'<th scope="col"><span title="{_text(name)}">{label}</span></th>'
        for name, label in zip(names, labels, strict=True)
    )
    rows = []
    for row, name in enumerate(names):
        cells = []
        for column, other in enumerate(names):
            count, share = int(matrix[row, column]), shares[row, column]
            kind = ("hit" if row == column else "miss") + (" strong" if share > 0.6 else "")
            hint = _text(f"{name} → {other}: {count:,} of {int(matrix[row].sum()):,} ({share:.1%})")
            cells.append(
                f'<td class="{kind if count else "none"}" style="--v:{share:.3f}" title="{hint}">{_number(count)}</td>'
            )
        rows.append(f'<tr><th scope="row" title="{_text(name)}">{labels[row]}</th>{"".join(cells)}</tr>')
    corner = '<td class="corner"><span>true ↓ &nbsp; predicted →</span></td>'
    grid = (
        f'<div class="scroll"><table class="confusion{dense}"><thead><tr>{corner}{columns}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )
    return _section(title, grid + _note("Rows are the true class; the colour is the share of the row."))


def table(
    header: Sequence[str],
    rows: Sequence[Sequence[Any]],
    align: Sequence[str] | None = None,
    note: str = "",
    heat: Collection[int] | None = None,
    title: str = "",
) -> str:
    """A table that can be sorted by clicking on a heading; with more than 30 rows it scrolls (but not in print).

    ``align``: "left" or "right" for each column; by default columns of numbers are right-aligned. ``heat``: the indices
    of columns with numbers from 0 to 1 that get a small bar. Raises ValueError if a row is not as long as the header.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} of the table has {len(row)} cells, but there are {len(header)} headings")
    if align is None:
        numeric = [bool(rows) and all(_is_number(row[c]) or row[c] is None for row in rows) for c in range(len(header))]
        align = ["right" if is_numeric else "left" for is_numeric in numeric]
    sides = ["r" if side == "right" else "l" for side in align]
    head = "".join(
        f'<th scope="col" class="{side}"><button type="button">{_text(name)}</button></th>'
        for name, side in zip(header, sides, strict=True)
    )
    body = []
    for row in rows:
        cells = []
        for column, (value, side) in enumerate(zip(row, sides, strict=True)):
            sort_key = f' data-v="{float(value)!r}"' if _is_number(value) and math.isfinite(value) else ""
            if heat and column in heat and sort_key:
                share = min(1.0, max(0.0, float(value)))
                bar = f'<i class="bar" style="--v:{share:.3f}"></i>'
                cells.append(f'<td class="{side} heat"{sort_key}><span>{_share(value)}</span>{bar}</td>')
            else:
                cells.append(f'<td class="{side}"{sort_key}>{_cell(value)}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    frame = "scroll tall" if len(rows) > LONG_TABLE else "scroll"
    grid = (
        f'<div class="{frame}"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )
    return _section(title, grid + _note(note))


def per_class(
    names: Sequence[str],
    precision: Sequence[float],
    recall: Sequence[float],
    f1: Sequence[float],
    support: Sequence[int],
    title: str = "Per class",
) -> str:
    """Precision, recall and F1 (0 to 1) and the number of rows of each class."""
    rows = [
        (str(name), float(p), float(r), float(f), int(count))
        for name, p, r, f, count in zip(names, precision, recall, f1, support, strict=True)
    ]
    return table(["class", "precision", "recall", "F1", "rows"], rows, heat=(1, 2, 3), title=title)


def picture(image: bytes, what: str, title: str) -> str:
    """An image (bytes of a PNG, JPEG or WebP) at its own width at most; ``what`` it shows is its alternative text."""
    return _section(title, f'<img class="plot" alt="{_text(what)}" src="{_data_uri(image)}">')


def mistakes(rows: Sequence[Mapping[str, Any]], title: str = "Worst mistakes") -> str:
    """The most confident errors, worst first as given: dicts with ``text``, ``true``, ``predicted``, ``confidence``.

    Rows that were chosen by their loss have ``loss`` instead of ``confidence``.
    Texts longer than 280 characters are folded. ``image`` (bytes of a PNG, JPEG or WebP) and ``text`` are optional.
    ``heat``, a square saliency map (report.saliency), is shown beside the image. With images the mistakes are shown as
    cards side by side, otherwise as a list.
    """
    items = []
    for row in rows:
        text = str(row.get("text") or "")
        shown = f'<p dir="auto">{_text(text)}</p>' if text else ""
        if len(text) > LONG_TEXT:
            cut = text[: LONG_TEXT - 40].rsplit(None, 1)[0]
            shown = (
                f'<details class="text"><summary dir="auto">{_text(cut)} … <u>whole text</u></summary>'
                f'<p dir="auto">{_text(text)}</p></details>'
            )
        images = _seen(row)
        confidence = row.get("confidence", row.get("loss"))
        sure = f'<span class="sure">{_number(confidence)}</span>' if confidence is not None else ""
        verdict = (
            f'<p class="verdict"><span>true <b>{_text(row["true"])}</b></span> '
            f'<span>predicted <b class="wrong">{_text(row["predicted"])}</b> {sure}</span></p>'
        )
        wide = ' class="pair"' if row.get("image") and row.get("heat") else ""
        items.append(f'<li{wide}>{images}<div class="said">{verdict}{shown}</div></li>')
    if not items:
        return _section(title, '<p class="note">None.</p>')
    note = "The number is the model’s confidence in its wrong prediction." if "sure" in items[0] else ""
    note = "The number is the loss of the row." if "loss" in rows[0] else note
    if not any(row.get("image") for row in rows):
        return _section(title, f'<ol class="mistakes">{"".join(items)}</ol>{_note(note)}')
    legend = _heat_legend() if any(row.get("heat") for row in rows) else ""
    return _section(title, f'{_note(note)}{legend}<ol class="mistakes cards">{"".join(items)}</ol>')


def sentences(lines: Sequence[str], title: str = "") -> str:
    """Sentences as a numbered list; those after the first 12 are folded."""
    items = [f"<li>{_text(line)}</li>" for line in lines]
    shown, folded = items[:MOST_SENTENCES], items[MOST_SENTENCES:]
    body = f'<ol class="sentences">{"".join(shown)}</ol>'
    if folded:
        rest = f'<ol class="sentences" start="{MOST_SENTENCES + 1}">{"".join(folded)}</ol>'
        body += f"<details><summary>{len(folded)} more</summary>{rest}</details>"
    return _section(title, body)


def differences(rows: Sequence[tuple[str, float, float, float, bool]], title: str = "", note: str = "") -> str:
    """A line with a dot on a shared axis for each of ``rows``: (name, difference, from, to, whether it is filled).

    From and to are the ends of an interval. The axis begins and ends with the outermost of them, and always has zero.
    Numbers that are not finite are not drawn.
    """
    ends = [end for row in rows for end in row[1:4] if math.isfinite(end)]
    low, high = min([*ends, 0.0]), max([*ends, 0.0])
    room = (high - low) * 0.03 or 0.5
    low, high = low - room, high + room
    ticks = _ticks(low, high, 6)

    def place(value: float) -> str:
        return f"{100 * (value - low) / (high - low):.2f}"

    parts = []
    for name, difference, start, end, filled in rows:
        marks = f'<i class="zero" style="--x:{place(0)}"></i>'
        if math.isfinite(start) and math.isfinite(end):
            width = f"{100 * (end - start) / (high - low):.2f}"
            marks += f'<i class="reach" style="--x:{place(start)};--w:{width}"></i>'
        if math.isfinite(difference):
            marks += f'<b style="--x:{place(difference)}"></b>'
        hint = _text(f"{name}: {difference:+.4f}, {start:+.4f} to {end:+.4f}")
        parts.append(
            f'<div class="row{" claimed" if filled else ""}" title="{hint}"><span class="who">{_text(name)}</span>'
            f'<span class="track">{marks}</span><span class="amount">{_signed(difference)}</span></div>'
        )
    labels = "".join(
        f'<span style="--x:{place(tick)}">{text}</span>' for tick, text in zip(ticks, _tick_names(ticks), strict=True)
    )
    parts.append(f'<div class="row"><span></span><span class="track ticks">{labels}</span><span></span></div>')
    return _section(title, f'<figure class="differences">{"".join(parts)}</figure>{_note(note)}')


def _seen(row: Mapping[str, Any]) -> str:
    """The ``image`` of a card and, beside it, its ``heat``."""
    images = f'<img alt="" src="{_data_uri(row["image"])}">' if row.get("image") else ""
    if row.get("heat"):
        alt = _text(f"saliency map for {row['predicted']}")
        images += f'<img alt="{alt}" title="{alt}" src="{_data_uri(row["heat"])}">'
    return f'<div class="seen">{images}</div>' if images else ""


def class_scores(rows: Sequence[Mapping[str, Any]], title: str = "Scores", limit: int = 15) -> str:
    """Samples with the probability of every class name, as cards: dicts with ``text``, ``true``, ``predicted`` and
    ``scores`` (name -> probability); ``image`` and ``heat`` as in :func:`mistakes`. Of more than ``limit`` classes the
    most probable ones are shown."""
    items = []
    for row in rows:
        marked = ' class="right"'
        ranked = sorted(row["scores"].items(), key=lambda each: -each[1])
        bars = "".join(
            f"<tr{marked if name == row['true'] else ''}><td>{_text(name)}</td>"
            f'<td class="heat"><span>{_share(share)}</span><i class="bar" style="--v:{share:.3f}"></i></td></tr>'
            for name, share in ranked[:limit]
        )
        more = f'<p class="note">and {len(ranked) - limit:,} more</p>' if len(ranked) > limit else ""
        said = f'<p>{_text(row.get("text") or "")}</p><table class="scores"><tbody>{bars}</tbody></table>{more}'
        items.append(f'<li class="pair">{_seen(row)}<div class="said">{said}</div></li>')
    legend = _heat_legend() if any(row.get("heat") for row in rows) else ""
    note = _note("The true class is in bold.")
    return _section(title, f'{note}{legend}<ol class="mistakes cards">{"".join(items)}</ol>')


def _heat_legend() -> str:
    """The legend of the saliency maps, with a colour bar."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from accelerando.report.saliency import COLOURS

    stops = ",".join(to_hex(colormaps[COLOURS](number / 8)) for number in range(9))
    bar = f'<i class="scale" style="background:linear-gradient(90deg,{stops})"></i>'
    return (
        f'<p class="note">The coloured images show how much each part contributed to the predicted class: none {bar} '
        "most. They cover the part of the image that was the model’s input.</p>"
    )


def retrieval(rows: Sequence[Mapping[str, Any]], title: str = "Examples") -> str:
    """Captions and the images retrieved for them, in a strip for each model; correct ones have a frame.

    Each row is a dict with ``query`` and ``strips``: name -> [(image as JPEG or PNG bytes, score, whether it is
    correct), ...], the best first.
    """
    if not rows:
        return _section(title, _note("There were no queries."))
    parts = []
    for row in rows:
        strips = []
        for name, found in row["strips"].items():
            images = "".join(
                f'<figure class="{"right" if right else "wrong"}">'
                f'<img src="{_data_uri(image)}" alt="{"right" if right else "wrong"}">'
                f"<figcaption>{'✓ ' if right else ''}{score:.3f}</figcaption></figure>"
                for image, score, right in found
            )
            strips.append(f'<div class="strip"><span>{_text(name)}</span>{images}</div>')
        parts.append(f'<article class="search"><h3>{_text(row["query"])}</h3>{"".join(strips)}</article>')
    note = _note("The five best images of the whole gallery with their cosine similarity; correct ones have a frame.")
    return _section(title, note + "".join(parts))


def command(cmd: str, title: str = "Reproduce this run") -> str:
    """The command in a block with a copy button."""
    button = '<button type="button" class="copy">Copy</button>'
    return _section(title, f'<div class="command"><pre><code>{_text(cmd.strip())}</code></pre>{button}</div>')


def settings(config: Mapping[str, Mapping[str, Any]], changed: Collection[str] = (), title: str = "Settings") -> str:
    """The config, ``{section: {name: value}}``, folded; names in ``changed`` differ from the default."""
    groups, count, marked = [], 0, 0
    for section, values in config.items():
        lines = []
        for name, value in values.items():
            is_changed = name in changed
            count, marked = count + 1, marked + is_changed
            mark = ' class="changed" title="changed from the default"' if is_changed else ""
            lines.append(f"<div{mark}><dt>{_text(name)}</dt><dd>{_setting(value)}</dd></div>")
        groups.append(f'<div class="group"><h3>{_text(section)}</h3><dl>{"".join(lines)}</dl></div>')
    total = f"{count} settings" + (f", {marked} changed from the default" if marked else "")
    body = f'<div class="groups">{"".join(groups)}</div>'
    return _section(title, f'<details class="settings"><summary>{total}</summary>{body}</details>')


@functools.cache
def _asset(name: str) -> str:
    """The text of a file beside this module, after a line break."""
    return "\n" + resources.files("accelerando.report").joinpath(name).read_text(encoding="utf-8")


def _section(title: str, body: str) -> str:
    return f"<section>{f'<h2>{_text(title)}</h2>' if title else ''}{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return _number(value) if _is_number(value) else _text(value)


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        value = " ".join(str(item) for item in value)
    return _text(value) if value not in ("", None) else '<span class="none">none</span>'


def _share(value: Real) -> str:
    """A share with three decimals, so that the bars after them stand below each other; others as numbers."""
    return f"{value:.3f}" if 0 <= value <= 1 else _number(value)


def _number(value: Real) -> str:
    """12,345 · 831.9 · 0.912 · 0.0004 · 3.2e-7 · – for NaN."""
    if isinstance(value, Integral):
        return f"{int(value):,}"
    value = float(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size >= 1e7 or 0 < size < 1e-4:
        return _short_exponent(f"{value:.3g}")
    if size >= 100:
        return f"{value:,.0f}" if size >= 1000 else f"{value:.1f}"
    return f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.3g}"


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−") if math.isfinite(value) else "–"


def _short_exponent(text: str) -> str:
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")


def _data_uri(image: bytes) -> str:
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "webp" if image[8:12] == b"WEBP" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"


# -- curves --


def _panel(history: Sequence[Mapping[str, Any]], curve: Curve) -> str:
    lines, left_out = {}, 0
    for key in curve.keys:
        lines[key], skipped = points(history, key, curve.log_y)
        left_out += skipped
    best = best_point(curve, history)
    unit = f" <small>{_text(curve.unit)}</small>" if curve.unit else ""
    legend = []
    for number, (key, label) in enumerate(curve.keys.items()):
        last = f" <b>{_number(lines[key][-1][1])}</b>" if lines[key] else " –"
        legend.append(f'<span><i class="key c{number % 6 + 1}"></i>{_text(label)}{last}</span>')
    if best:
        step, value = best[1]
        legend.append(f'<span class="at"><i class="ring"></i>best <b>{_number(value)}</b> at {step:,.0f}</span>')
    if left_out:
        reason = "not finite or not positive" if curve.log_y else "not finite"
        values = "1 value" if left_out == 1 else f"{left_out:,} values"
        legend.append(f'<span class="warn">{values} {reason}, left out</span>')
    caption = f'<figcaption><h3>{_text(curve.title)}{unit}</h3><p class="legend">{"".join(legend)}</p></figcaption>'
    if not any(lines.values()):
        return f'<figure class="panel">{caption}<p class="empty">nothing measured</p></figure>'
    return f'<figure class="panel">{caption}{_svg(curve, lines, best)}</figure>'


def _svg(curve: Curve, lines: Mapping[str, list[Point]], best: tuple[str, Point] | None) -> str:
    steps = [step for line in lines.values() for step, _ in line]
    values = [value for line in lines.values() for _, value in line]
    low, high = min(values), max(values)
    if curve.log_y:
        low, high = math.log10(low), math.log10(high)
    if high - low > 1e-6 * max(abs(low), abs(high)):
        room = (high - low) * 0.05
    else:  # a constant line
        room = 0.3 if curve.log_y else abs(high) * 0.1 or 0.5
    low, high = low - room, high + room
    first, final = min(steps), max(steps)
    x_ticks = _ticks(first, final, 5, whole=True) if final > first else [first]
    y_ticks = _log_ticks(low, high) if curve.log_y else _ticks(low, high, 5)
    x_names, y_names = _tick_names(x_ticks), _tick_names(y_ticks)
    left, right, top, bottom = 12 + 6.8 * max(map(len, y_names)), 16, 8, 40
    across, down = WIDTH - left - right, HEIGHT - top - bottom

    def x_of(step: float) -> float:
        return left + across * ((step - first) / (final - first) if final > first else 0.5)

    def y_of(value: float) -> float:
        return top + down * (1 - ((math.log10(value) if curve.log_y else value) - low) / (high - low))

    base = HEIGHT - bottom
    parts = [f'<path class="axis" d="M{left:.1f} {base}H{WIDTH - right}"/>']
    for tick, name in zip(y_ticks, y_names, strict=True):
        y = y_of(tick)
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{WIDTH - right}"/>')
        parts.append(f'<text class="y" x="{left - 7:.1f}" y="{y + 4:.1f}">{name}</text>')
    for tick, name in zip(x_ticks, x_names, strict=True):
        parts.append(f'<path class="axis" d="M{x_of(tick):.1f} {base}v4"/>')
        parts.append(f'<text class="x" x="{x_of(tick):.1f}" y="{base + 17}">{name}</text>')
    parts.append(f'<text class="x" x="{left + across / 2:.1f}" y="{HEIGHT - 6}">step</text>')
    hover = []
    for number, (key, label) in enumerate(curve.keys.items()):
        line = _thinned(lines[key])
        colour = f"c{number % 6 + 1}" + (" dashed" if number >= 6 else "")
        spots = [(x_of(step), y_of(value)) for step, value in line]
        if len(line) > 1:
            weight = " fine" if len(line) > 100 else ""
            parts.append(f'<path class="line {colour}{weight}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in spots)}"/>')
        if len(line) <= 25:
            parts += [f'<circle class="dot {colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in spots]
        hover.append([label, [[round(x_of(s), 1), f"{s:,.0f}", _number(v)] for s, v in line]])
    if best:
        step, value = best[1]
        x, y = x_of(step), y_of(value)
        hint = _text(f"best: {_number(value)} at step {step:,.0f}")
        parts.append(f'<path class="drop" d="M{x:.1f} {y + 6:.1f}V{base}"/>')
        parts.append(f'<circle class="best" cx="{x:.1f}" cy="{y:.1f}" r="5.5"><title>{hint}</title></circle>')
    parts.append(f'<path class="cursor" d="M0 {top}V{base}"/>')
    data = _text(json.dumps(hover, ensure_ascii=False, separators=(",", ":")))
    name = _text(f"{curve.title} over the training step")
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{name}" data-curves="{data}">'
    return f"{head}{''.join(parts)}</svg>"


def _thinned(line: list[Point]) -> list[Point]:
    """At most DRAWN_POINTS + 2 points: the ends, and the minimum and maximum of equal intervals."""
    if len(line) <= DRAWN_POINTS:
        return line
    import numpy as np

    kept = {0, len(line) - 1}
    for stretch in np.array_split(np.arange(len(line)), DRAWN_POINTS // 2):
        values = [line[index][1] for index in stretch]
        kept |= {int(stretch[np.argmin(values)]), int(stretch[np.argmax(values)])}
    return [line[index] for index in sorted(kept)]


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """About ``about`` round numbers within [low, high]."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    stride = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.85)
    if whole:
        stride = max(1.0, float(math.ceil(stride)))
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [number * stride for number in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """Like :func:`_ticks` for a logarithmic axis; the limits are given as logarithms to base 10."""
    first, last = math.ceil(low), math.floor(high)
    if last - first >= 2:
        return [10.0**power for power in range(first, last + 1, math.ceil((last - first) / 6))]
    if last - first >= 0:
        powers = range(first - 1, last + 1)
        ticks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        return [tick for tick in ticks if low <= math.log10(tick) <= high]
    return [tick for tick in _ticks(10**low, 10**high, 4) if tick > 0]


def _tick_names(ticks: Sequence[float]) -> list[str]:
    largest = max(map(abs, ticks))
    strides = [after - before for before, after in itertools.pairwise(ticks)]
    stride = min(strides) if strides else largest
    if 0 < largest < 1e-3 or largest >= 1e9 or (strides and max(strides) > 3 * stride):
        return [_short_exponent(f"{tick:.3g}") for tick in ticks]
    scale, letter = (1e6, "M") if largest >= 2e6 else (1e3, "k") if largest >= 1e4 else (1, "")
    rounded = float(f"{stride / scale:.3g}")  # without the float error of a difference
    decimals = len(f"{rounded:.12f}".rstrip("0").partition(".")[2])
    return [f"{tick / scale:.{decimals}f}".replace("-", "−") + (letter if tick else "") for tick in ticks]


# -- confusion of many classes --


def _confusion_image(matrix: np.ndarray, shares: np.ndarray, names: Sequence[str]) -> str:
    import numpy as np
    from PIL import Image

    # Colours with alpha, so that the same image suits light and dark mode.
    pixels = np.empty((*matrix.shape, 4), np.uint8)
    pixels[..., :3] = (232, 124, 40)
    pixels[np.arange(len(names)), np.arange(len(names)), :3] = (52, 120, 196)
    # The square root and the offset keep a single error in a large class visible.
    pixels[..., 3] = np.rint(255 * np.where(shares > 0, 0.15 + 0.85 * np.sqrt(shares), 0))
    buffer = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(buffer, format="PNG")
    flat = matrix.reshape(-1)
    cells = {int(index): int(flat[index]) for index in np.flatnonzero(flat)}
    data = _text(json.dumps([list(map(str, names)), cells], ensure_ascii=False, separators=(",", ":")))
    source = _data_uri(buffer.getvalue())
    return (
        f'<figure class="heatmap"><span class="down">true, {len(names)} classes</span>'
        f'<img alt="confusion matrix of {len(names)} classes" src="{source}" data-matrix="{data}">'
        '<span class="along">predicted</span></figure>'
        + _note("Each row is a true class, in the order of the classes; blue is correct, orange is wrong.")
    )


def _confused_pairs(matrix: np.ndarray, shares: np.ndarray, names: Sequence[str], limit: int = 20) -> str:
    import numpy as np

    wrong = matrix.copy()
    np.fill_diagonal(wrong, 0)
    order = [index for index in np.argsort(-wrong, axis=None, kind="stable")[:limit] if wrong.flat[index] > 0]
    rows = []
    for index in order:
        row, column = divmod(int(index), len(names))
        rows.append((str(names[row]), str(names[column]), int(matrix[row, column]), float(shares[row, column])))
    if not rows:
        return _note("No class was confused with another.")
    grid = table(["true", "predicted", "count", "of class"], rows, heat=(3,))
    return "<h3>Most often confused</h3>" + grid.removeprefix("<section>").removesuffix("</section>")
