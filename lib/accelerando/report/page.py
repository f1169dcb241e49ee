"""``report.html``: the end of a run as one self-contained page, light or dark as its reader's system, also on paper.

A script puts blocks together in the order it likes; each function here returns one block of HTML::

    write_report(
        run / "report.html", "AG News", "DistilBERT, LoRA, seed 1",
        [headline([("macro F1", "0.931", "test, 7 600 rows")]), curves(history, CURVES), confusion(matrix, names)],
    )

Whatever comes from outside (class names, texts, settings) is escaped, and the page's own policy forbids it the network
and any script but ours. The same input gives the same bytes.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import itertools
import json
import math
import os
from collections.abc import Collection, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from accelerando.report.plots import MAX_COUNTED_CLASSES, Curve, Point, best_point, points, row_shares, shorten

LONG_TEXT = 280  # characters of a mistake's text before it is folded
LONG_TABLE = 30  # rows before a table scrolls in a frame of its own
DRAWN_POINTS = 300  # of one line; a longer one is thinned without losing its peaks

WIDTH, HEIGHT = 440, 230  # of a panel of curves, in SVG units


def write_report(path: str | Path, title: str, subtitle: str, blocks: Sequence[str]) -> None:
    """Writes the page, atomically: a reader sees the old file or the whole new one. ``blocks`` are used as they are."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # With the hash of our script as the only one allowed, markup that slipped through could still not run.
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{_text(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header><h1>{_text(title)}</h1><p>{_text(subtitle)}</p></header>
{chr(10).join(blocks)}
</main>
<script>{_SCRIPT}</script>
</body>
</html>
"""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(page.encode(errors="replace"))  # a lone surrogate must not lose the page
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def headline(numbers: Sequence[tuple[str, str, str]]) -> str:
    """Big figures in tiles: ``(label, value, note)`` each, the note may be empty."""
    tiles = []
    for label, value, note in numbers:
        size = ' class="long"' if len(str(value)) > 8 else ""
        small = f"<span>{_text(note)}</span>" if note else ""
        tiles.append(f'<div class="tile"><dt>{_text(label)}</dt><dd><b{size}>{_text(value)}</b>{small}</dd></div>')
    return f'<section><dl class="tiles">{"".join(tiles)}</dl></section>'


def curves(history: Sequence[Mapping[str, Any]], series: Sequence[Curve], title: str = "Training") -> str:
    """Panels of lines over the step, with the best point marked and the values under the pointer.

    ``history``: dicts with ``step`` and metric keys, any of them absent in any row; NaN and infinity are left out and
    counted in a note. No row or one row is fine.
    """
    return _section(title, f'<div class="panels">{"".join(_panel(history, curve) for curve in series)}</div>')


def confusion(matrix: np.ndarray, names: Sequence[str], title: str = "Confusion matrix") -> str:
    """Counts [C, C], rows true, columns predicted; blue where right, orange where wrong, as strong as the row's share.

    Up to 20 classes the counts stand in their cells; more are drawn as an image beside the pairs that are most often
    confused. Raises ValueError unless the matrix is square with a row for each name.
    """
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
    """A table that a click on a heading sorts; from 31 rows on it scrolls in a frame (not on paper).

    ``align``: "left" or "right" for each column; by default columns of numbers are on the right. ``heat``: the columns,
    by index, whose numbers from 0 to 1 get a small bar. Raises ValueError where a row is not as long as the header.
    """
    for number, row in enumerate(rows):
        if len(row) != len(header):
            raise ValueError(f"row {number} of the table has {len(row)} cells under {len(header)} headings")
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
                cells.append(f'<td class="{side} heat"{sort_key}><span>{_number(value)}</span>{bar}</td>')
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


def mistakes(rows: Sequence[Mapping[str, Any]], title: str = "Worst mistakes") -> str:
    """The most confident errors, worst first as given: dicts with ``text``, ``true``, ``predicted``, ``confidence``.

    Beyond 280 characters a text is folded. ``image`` (bytes of a PNG, JPEG or WebP) is optional, and so is ``text``.
    ``heat``, a square picture of where the model looked (report.saliency), stands beside the image. Where there are
    images, the mistakes are cards side by side, and otherwise a list.
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
        pictures = f'<img alt="" src="{_data_uri(row["image"])}">' if row.get("image") else ""
        if row.get("heat"):
            alt = _text(f"where the model saw {row['predicted']}")
            pictures += f'<img alt="{alt}" title="{alt}" src="{_data_uri(row["heat"])}">'
        confidence = row.get("confidence")
        sure = f'<span class="sure">{_number(confidence)}</span>' if confidence is not None else ""
        verdict = (
            f'<p class="verdict"><span>true <b>{_text(row["true"])}</b></span> '
            f'<span>predicted <b class="wrong">{_text(row["predicted"])}</b> {sure}</span></p>'
        )
        wide = ' class="pair"' if row.get("image") and row.get("heat") else ""
        pictures = f'<div class="seen">{pictures}</div>' if pictures else ""
        items.append(f'<li{wide}>{pictures}<div class="said">{verdict}{shown}</div></li>')
    if not items:
        return _section(title, '<p class="note">None.</p>')
    note = "The number is the model’s confidence in its wrong answer." if "sure" in items[0] else ""
    if not any(row.get("image") for row in rows):
        return _section(title, f'<ol class="mistakes">{"".join(items)}</ol>{_note(note)}')
    legend = _heat_legend() if any(row.get("heat") for row in rows) else ""
    return _section(title, f'{_note(note)}{legend}<ol class="mistakes cards">{"".join(items)}</ol>')


def _heat_legend() -> str:
    """What the colours of ``heat`` mean, with a bar of them."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    from accelerando.report.saliency import COLOURS

    stops = ",".join(to_hex(colormaps[COLOURS](number / 8)) for number in range(9))
    bar = f'<i class="scale" style="background:linear-gradient(90deg,{stops})"></i>'
    return (
        f'<p class="note">The coloured pictures show what spoke for the predicted class: nothing {bar} the most. '
        "They hold the part of the picture that the model saw.</p>"
    )


def retrieval(rows: Sequence[Mapping[str, Any]], title: str = "Examples") -> str:
    """Captions and the pictures found for them, in strips one under the other; right ones are framed.

    Each row is a dict with ``query`` and ``strips``: name -> [(picture as JPEG or PNG bytes, score, whether it is
    right), ...], the best first.
    """
    if not rows:
        return _section(title, _note("Nothing was searched for."))
    parts = []
    for row in rows:
        strips = []
        for name, found in row["strips"].items():
            pictures = "".join(
                f'<figure class="{"right" if right else "wrong"}">'
                f'<img src="{_data_uri(picture)}" alt="{"right" if right else "wrong"}">'
                f"<figcaption>{'✓ ' if right else ''}{score:.3f}</figcaption></figure>"
                for picture, score, right in found
            )
            strips.append(f'<div class="strip"><span>{_text(name)}</span>{pictures}</div>')
        parts.append(f'<article class="search"><h3>{_text(row["query"])}</h3>{"".join(strips)}</article>')
    note = _note("The five best pictures of the whole gallery with their cosine; a frame marks what is right.")
    return _section(title, note + "".join(parts))


def command(cmd: str, title: str = "Reproduce this run") -> str:
    """The command in a block with a button that copies it."""
    button = '<button type="button" class="copy">Copy</button>'
    return _section(title, f'<div class="command"><pre><code>{_text(cmd.strip())}</code></pre>{button}</div>')


def settings(config: Mapping[str, Mapping[str, Any]], changed: Collection[str] = (), title: str = "Settings") -> str:
    """The resolved config, ``{section: {name: value}}``, folded; names in ``changed`` differ from the default."""
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


def _section(title: str, body: str) -> str:
    return f"<section>{f'<h2>{_text(title)}</h2>' if title else ''}{body}</section>"


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>' if text else ""


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return _number(value) if _is_number(value) else _text(value)


def _setting(value: object) -> str:
    if isinstance(value, list | tuple):
        value = " ".join(str(item) for item in value)
    return _text(value) if value not in ("", None) else '<span class="none">none</span>'


def _number(value: Any) -> str:
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
    else:  # the same value all along
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
    """At most DRAWN_POINTS + 2 points: the ends, and the lowest and the highest of each of equal stretches."""
    if len(line) <= DRAWN_POINTS:
        return line
    kept = {0, len(line) - 1}
    for stretch in np.array_split(np.arange(len(line)), DRAWN_POINTS // 2):
        values = [line[index][1] for index in stretch]
        kept |= {int(stretch[np.argmin(values)]), int(stretch[np.argmax(values)])}
    return [line[index] for index in sorted(kept)]


def _ticks(low: float, high: float, about: int, whole: bool = False) -> list[float]:
    """Round numbers within [low, high], ``about`` of them."""
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    stride = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.85)
    if whole:
        stride = max(1.0, float(math.ceil(stride)))
    first, last = math.ceil(low / stride - 1e-9), math.floor(high / stride + 1e-9)
    return [number * stride for number in range(first, last + 1)] or [low]


def _log_ticks(low: float, high: float) -> list[float]:
    """As :func:`_ticks` for a logarithmic axis, whose limits are given as powers of ten."""
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
    from PIL import Image

    # Colour with alpha instead of a background, so that the same picture suits the light page and the dark one.
    pixels = np.empty((*matrix.shape, 4), np.uint8)
    pixels[..., :3] = (232, 124, 40)
    pixels[np.arange(len(names)), np.arange(len(names)), :3] = (52, 120, 196)
    # The root and the floor keep a single error in a large class visible.
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
        + _note("Each row is a true class, in the order of the classes; blue is right, orange is wrong.")
    )


def _confused_pairs(matrix: np.ndarray, shares: np.ndarray, names: Sequence[str], limit: int = 20) -> str:
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


_STYLE = """
:root{--page:#fcfcfb;--ink:#1f2429;--soft:#636b74;--rule:#e3e4e2;--tile:#f4f5f3;--accent:#2463a8;--hit:36 99 168;
--miss:214 104 20;--on:#fff;--c1:#2463a8;--c2:#d9730d;--c3:#0b8468;--c4:#a14f9e;--c5:#5aa5d6;--c6:#8a7400}
@media screen and (prefers-color-scheme:dark){:root{--page:#16181b;--ink:#e4e6e9;--soft:#9aa2ab;--rule:#2e3237;
--tile:#1e2125;--accent:#7db3f2;--hit:112 172 240;--miss:240 150 70;--on:#10151b;--c1:#74adf0;--c2:#f0a04b;--c3:#4fc3a3;
--c4:#d294d3;--c5:#a9d4f2;--c6:#cfbd4d}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,"Liberation Sans",sans-serif;font-variant-numeric:tabular-nums;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1000px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:28px;line-height:1.2;margin:0;letter-spacing:-.01em;overflow-wrap:anywhere}
header p{margin:8px 0 0;color:var(--soft);overflow-wrap:anywhere}
section{margin-top:40px}
h2{font-size:18px;margin:0 0 14px;padding-bottom:8px;border-bottom:1px solid var(--rule)}
h3{font-size:14px;margin:0;font-weight:600}
h3 small{font-weight:400;font-size:13px;color:var(--soft)}
.note{margin:10px 0 0;font-size:13px;color:var(--soft)}
button{font:inherit;color:inherit;background:none;border:0;padding:0;cursor:pointer}
:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;margin:0}
.tile{background:var(--tile);border-radius:10px;padding:14px 16px;break-inside:avoid;min-width:0}
.tile dt{font-size:13px;color:var(--soft)}
.tile dd{margin:0}
.tile b{display:block;font-size:27px;line-height:1.3;font-weight:600;letter-spacing:-.01em;overflow-wrap:anywhere}
.tile .long{font-size:20px;line-height:35px}
.tile span{font-size:12.5px;color:var(--soft)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:32px 28px}
.panel{margin:0;break-inside:avoid;min-width:0;display:flex;flex-direction:column;justify-content:space-between}
.panel:only-child{max-width:620px;grid-column:1/-1;width:100%}
.legend{display:flex;flex-wrap:wrap;gap:0 16px;margin:2px 0 8px;font-size:13px;color:var(--soft)}
.legend b{color:var(--ink);font-weight:600}
.warn{color:var(--c2)}
.key{display:inline-block;width:14px;height:3px;border-radius:2px;margin-right:6px;vertical-align:middle;
background:currentColor}
.ring{display:inline-block;width:10px;height:10px;border:1.6px solid var(--ink);border-radius:50%;margin-right:6px;
vertical-align:-1px}
.empty{margin:0;height:120px;display:grid;place-items:center;color:var(--soft);background:var(--tile);border-radius:8px}
svg{display:block;width:100%;height:auto;touch-action:pan-y}
svg text{font-size:12px;fill:var(--soft)}
.x{text-anchor:middle}.y{text-anchor:end}
.grid{stroke:var(--rule);stroke-width:1}
.axis{stroke:var(--soft);stroke-width:1;opacity:.7}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
.fine{stroke-width:1.2}.dashed{stroke-dasharray:5 4}
.dot{fill:currentColor}
.best{fill:none;stroke:var(--ink);stroke-width:1.6;pointer-events:all}
.drop{stroke:var(--ink);stroke-width:1;stroke-dasharray:1.5 3.5;opacity:.55}
.cursor{stroke:var(--soft);stroke-width:1;visibility:hidden}
.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}
.tip{position:fixed;display:none;pointer-events:none;z-index:9;max-width:min(320px,90vw);padding:7px 10px;
font-size:12.5px;line-height:1.45;background:var(--ink);color:var(--page);border-radius:7px;overflow-wrap:anywhere}
.tip :first-child{opacity:.75}
.search{margin:22px 0 0;break-inside:avoid}
.strip{display:flex;align-items:flex-start;gap:8px;margin-top:8px}
.strip>span{flex:0 0 62px;font-size:13px;color:var(--soft);padding-top:4px}
.strip figure{margin:0;flex:0 1 112px;min-width:0;border:3px solid transparent;border-radius:9px;padding:2px}
.strip .right{border-color:rgb(var(--hit))}
.strip img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--tile);border-radius:5px}
.strip figcaption{font-size:12px;color:var(--soft);text-align:center}
.scroll{overflow-x:auto}
.tall{max-height:560px;overflow-y:auto;border-bottom:1px solid var(--rule)}
table{border-collapse:collapse;font-size:14px}
.sortable{min-width:min(100%,480px)}
.sortable td,.sortable th{padding:5px 14px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
.sortable th{position:sticky;top:0;background:var(--page);font-weight:600;font-size:13px;color:var(--soft);
white-space:nowrap}
.sortable td{max-width:420px;overflow-wrap:break-word}
.sortable tr>:last-child{padding-right:2px}
.l{text-align:left}.r{text-align:right}td.r{white-space:nowrap;overflow-wrap:normal}
th[aria-sort] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:" ↑"}th[aria-sort=descending] button::after{content:" ↓"}
.heat{min-width:118px}
.bar{display:inline-block;width:56px;height:6px;margin-left:9px;vertical-align:2px;border-radius:3px;
background:linear-gradient(var(--c1),var(--c1)) 0/calc(var(--v)*100%) 100% no-repeat var(--rule)}
.confusion{border-collapse:separate;border-spacing:2px;font-size:13px}
.confusion th{font-weight:400;color:var(--ink)}
.confusion thead th{vertical-align:bottom;padding:0 0 5px}
.confusion thead span{writing-mode:vertical-rl;transform:rotate(180deg);white-space:nowrap;display:inline-block}
.confusion tbody th{text-align:right;padding-right:8px;white-space:nowrap;position:sticky;left:0;background:var(--page)}
.confusion td{min-width:44px;height:34px;padding:0 5px;text-align:center;border-radius:4px;background:var(--tile)}
.dense{font-size:12px;border-spacing:1px}
.dense td{min-width:36px;height:30px;padding:0 1px;border-radius:3px}
.confusion .hit{background:rgb(var(--hit)/calc(.06 + .94*var(--v)))}
.confusion .miss{background:rgb(var(--miss)/calc(.1 + .9*var(--v)))}
.confusion .strong{color:var(--on)}
.confusion .none{color:var(--soft);opacity:.6}
.confusion .corner{background:none;vertical-align:bottom;text-align:right;font-size:12px;color:var(--soft);height:auto;
padding:0 8px 5px 0;position:sticky;left:0}
.confusion .corner span{writing-mode:horizontal-tb;transform:none;background:var(--page)}
.heatmap{margin:0;display:grid;grid-template-columns:auto minmax(0,560px);justify-content:start;gap:6px 8px;
font-size:12px;color:var(--soft);break-inside:avoid}
.heatmap img{width:100%;aspect-ratio:1;image-rendering:pixelated;border:1px solid var(--rule);border-radius:4px;
background:var(--page)}
.down{writing-mode:vertical-rl;transform:rotate(180deg);text-align:center}
.along{grid-column:2;text-align:center}
section>h3{margin:26px 0 8px}
.mistakes{margin:0;padding:0;list-style:none}
.mistakes li{padding:12px 0;border-bottom:1px solid var(--rule);break-inside:avoid}
.mistakes li:first-child{padding-top:0}
.mistakes p{margin:0;overflow-wrap:anywhere;white-space:pre-line}
.mistakes .verdict{font-size:13px;color:var(--soft);margin-bottom:3px;display:flex;flex-wrap:wrap;gap:0 16px;
white-space:normal}
.note+.note{margin-top:2px}
.cards{margin-top:16px;display:grid;grid-template-columns:repeat(6,minmax(0,1fr));gap:22px 8px}
.cards li,.cards li:first-child{padding:0;border:0;min-width:0}
.cards .pair{grid-column:span 2}
.cards .said{font-size:12.5px;color:var(--soft);margin-top:6px}
.cards .verdict{flex-direction:column;line-height:1.4}
.seen{display:grid;grid-template-columns:1fr;gap:8px}
.pair .seen{grid-template-columns:1fr 1fr}
.seen img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:var(--tile);border-radius:6px}
.scale{display:inline-block;width:90px;height:9px;margin:0 3px;border-radius:3px;vertical-align:0}
.verdict b{font-weight:600;color:var(--ink)}.verdict .wrong{color:var(--c2)}
.sure{margin-left:5px}
summary{cursor:pointer;overflow-wrap:anywhere}
.text summary{list-style:none}.text summary::-webkit-details-marker{display:none}
.text u{color:var(--accent);text-decoration:none;font-size:13px;white-space:nowrap}
.text[open] summary u{display:none}
.text[open] summary{color:var(--soft);display:none}
.command{position:relative}
pre{margin:0;padding:14px 76px 14px 16px;background:var(--tile);border-radius:10px;overflow-x:auto;white-space:pre-wrap;
overflow-wrap:anywhere;font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.copy{position:absolute;top:10px;right:10px;font-size:12.5px;padding:3px 10px;border:1px solid var(--rule);
border-radius:6px;background:var(--page);color:var(--soft)}
.settings summary{color:var(--soft)}
.groups{columns:2 340px;column-gap:36px;margin-top:14px}
.group{break-inside:avoid;margin-bottom:18px}
.group dl{margin:4px 0 0;font-size:13.5px}
.group dl div{display:flex;justify-content:space-between;gap:16px;padding:2px 0 2px 10px;
border-left:2px solid transparent}
.group dt{color:var(--soft);white-space:nowrap}.group dd{margin:0;text-align:right;overflow-wrap:anywhere;min-width:0}
.group .changed{border-color:var(--c2)}.group .changed dd,.group .changed dt{color:var(--ink)}
.group h3{padding-left:12px}
.none{color:var(--soft)}
@media (max-width:860px){.cards{grid-template-columns:repeat(4,minmax(0,1fr))}}
@media (max-width:560px){.cards{grid-template-columns:repeat(2,minmax(0,1fr))}
main{padding:28px 16px 48px}h1{font-size:23px}section{margin-top:32px}
.tiles{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}.tile{padding:11px 12px}.tile b{font-size:22px}
.tile .long{font-size:18px;line-height:29px}
.heat{min-width:0}.bar{display:block;width:100%;margin:2px 0 3px auto}.heat span{display:block}
.sortable td{max-width:116px}.sortable td,.sortable th{padding-right:10px}
.confusion td{min-width:36px;height:32px;padding:0 2px}.confusion tbody th{white-space:normal;max-width:104px;
line-height:1.2;overflow-wrap:break-word}
.legend{gap:0 12px}}
@media print{:root{--page:#fff}body{font-size:11pt}main{max-width:none;padding:0}
.scroll,.tall{overflow:visible;max-height:none}
.copy,.tip,.text u{display:none}.sortable th,.confusion th{position:static}tr{break-inside:avoid}
h2,h3{break-after:avoid}
.panels{grid-template-columns:1fr 1fr;gap:20px}.dense{font-size:7pt}.dense td{min-width:0;padding:0 2px;height:auto}}
"""

_SCRIPT = """
(() => {
  const tip = document.body.appendChild(document.createElement('div'));
  tip.className = 'tip';
  const hide = () => { tip.style.display = 'none'; };
  const show = (event, lines) => {
    tip.replaceChildren(...lines.map(text => {
      const line = document.createElement('div');
      line.textContent = text;
      return line;
    }));
    tip.style.display = 'block';
    const right = innerWidth - tip.offsetWidth - 8, below = event.clientY + 18;
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, right)) + 'px';
    tip.style.top = (below + tip.offsetHeight > innerHeight ? event.clientY - tip.offsetHeight - 12 : below) + 'px';
  };
  const nearest = (points, x) => points.reduce((a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a);
  for (const svg of document.querySelectorAll('svg[data-curves]')) {
    const curves = JSON.parse(svg.dataset.curves).filter(curve => curve[1].length);
    const cursor = svg.querySelector('.cursor');
    svg.addEventListener('pointermove', event => {
      const box = svg.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      const here = nearest(curves.map(curve => nearest(curve[1], x)), x);
      cursor.setAttribute('transform', `translate(${here[0]} 0)`);
      cursor.style.visibility = 'visible';
      show(event, ['step ' + here[1], ...curves.map(([label, points]) => {
        const point = nearest(points, here[0]);
        return label + ' ' + point[2] + (point[1] === here[1] ? '' : ' (at ' + point[1] + ')');
      })]);
    });
    svg.addEventListener('pointerleave', () => { cursor.style.visibility = 'hidden'; hide(); });
  }
  for (const image of document.querySelectorAll('img[data-matrix]')) {
    const [names, cells] = JSON.parse(image.dataset.matrix), size = names.length;
    image.addEventListener('pointermove', event => {
      const box = image.getBoundingClientRect();
      const at = (offset, length) => Math.max(0, Math.min(size - 1, Math.floor(offset / length * size)));
      const row = at(event.clientY - box.top, box.height), column = at(event.clientX - box.left, box.width);
      show(event, [names[row] + ' → ' + names[column], 'count ' + (cells[row * size + column] || 0)]);
    });
    image.addEventListener('pointerleave', hide);
  }
  for (const button of document.querySelectorAll('.sortable th button')) button.addEventListener('click', () => {
    const head = button.parentElement, body = head.closest('table').tBodies[0], column = head.cellIndex;
    const numeric = [...body.rows].some(row => row.cells[column].dataset.v);
    const order = head.ariaSort ? (head.ariaSort === 'ascending' ? 'descending' : 'ascending')
      : (numeric ? 'descending' : 'ascending');
    for (const other of head.parentElement.cells) other.removeAttribute('aria-sort');
    head.setAttribute('aria-sort', order);
    const sign = order === 'ascending' ? 1 : -1;
    body.append(...[...body.rows].sort((a, b) => {
      const left = a.cells[column], right = b.cells[column];
      if (!numeric) return sign * left.textContent.localeCompare(right.textContent, undefined, {numeric: true});
      if (!left.dataset.v || !right.dataset.v) return !left.dataset.v - !right.dataset.v;
      return sign * (left.dataset.v - right.dataset.v);
    }));
  });
  for (const button of document.querySelectorAll('.copy')) button.addEventListener('click', async () => {
    const code = button.parentElement.querySelector('code');
    getSelection().selectAllChildren(code);
    try { await navigator.clipboard.writeText(code.textContent); button.textContent = 'Copied'; }
    catch { button.textContent = 'Selected'; }
    setTimeout(() => { button.textContent = 'Copy'; }, 1500);
  });
  addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(d => { d.open = true; }));
})();
"""
