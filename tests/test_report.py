"""The report is one self-contained page that shows every number; the images open and are not blank."""

from __future__ import annotations

import base64
import html
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from accelerando.report import page as report
from accelerando.report import plots
from accelerando.report.plots import Curve

NASTY = '<script>alert("x")</script>'
VOID = {"meta", "img", "br", "link", "input"}
HISTORY = [
    {"step": 10, "train_loss": 1.9},
    {"step": 20, "train_loss": 1.2, "eval_loss": 1.3, "eval_f1": 0.61},
    {"step": 30, "train_loss": float("nan")},
    {"step": 40, "train_loss": 0.7, "eval_loss": 0.8125, "eval_f1": 0.87},
    {"step": 60, "train_loss": float("inf"), "eval_loss": 0.9, "eval_f1": 0.8},
]
LOSS = Curve("Loss", {"train_loss": "train", "eval_loss": "validation"}, "nats", best="min")
F1 = Curve("Macro F1", {"eval_f1": "validation"}, best="max")


class Page(HTMLParser):
    """Checks the nesting of tags and keeps text, tags and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag: str, cls: str = "") -> list[dict[str, str | None]]:
        return [a for t, a in self.tags if t == tag and (not cls or cls in (a.get("class") or "").split())]


def counts(classes: int) -> np.ndarray:
    """Distinct counts, so that each can be found again."""
    return np.arange(1, classes * classes + 1).reshape(classes, classes) + 1000 * np.eye(classes, dtype=int)


def blocks(classes: int = 4) -> list[str]:
    names = [NASTY, *(f"class {number}" for number in range(1, classes))]
    scores = [0.5 + number / 1000 for number in range(classes)]
    return [
        report.headline([("macro F1", "0.87", NASTY)]),
        report.curves(HISTORY, [LOSS, F1, Curve(NASTY, {"eval_loss": NASTY}, NASTY, log_y=True, best="min")]),
        report.confusion(counts(classes), names),
        report.table([NASTY, "n"], [(NASTY, 12345), ("b", float("nan")), (None, 7)], note=NASTY, title=NASTY),
        report.per_class(names, scores, scores, scores, list(range(classes))),
        report.mistakes(
            [
                {"text": NASTY, "true": NASTY, "predicted": NASTY, "confidence": 0.98765},
                {"text": f"{NASTY} word " * 90, "true": "a", "predicted": "b", "confidence": 0.9},
            ]
        ),
        report.command(f"accelerate launch x.py --name '{NASTY}' && true"),
        report.settings({NASTY: {NASTY: NASTY, "lr": 2e-5, "tags": ["a", "b"], "run_name": None}}, {"lr"}),
    ]


def write(path: Path, classes: int = 4) -> str:
    report.write_report(path, NASTY, NASTY, blocks(classes))
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("classes", [4, 30])
def test_page_is_self_contained_balanced_escaped_and_deterministic(tmp_path: Path, classes: int) -> None:
    source = write(tmp_path / "new" / "report.html", classes)
    page = Page(source)
    assert len(page.of("script")) == 1, "a text became a script"
    assert "http:" not in source and "https:" not in source and "url(" not in source and "@import" not in source
    for _, attributes in page.tags:
        assert not {"href", "xlink:href", "srcset", "action"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:image/").startswith("data:image/")
    assert not page.of("link") and not page.of("iframe")
    assert source.count(NASTY) == 0 and "".join(page.text).count(NASTY) > 10
    assert "default-src 'none'" in page.of("meta")[-1]["content"]
    assert source == write(tmp_path / "again.html", classes)


def test_every_number_is_in_the_table() -> None:
    rows = [("a", 12345, 0.125, 3.2e-7), ("b", 7, 831.9, float("nan")), (None, 0, float("inf"), 5.0)]
    page = Page(report.table(["name", "count", "x", "y"], rows, heat=(2,)))
    text = page.text
    for shown in ("12,345", "0.125", "3.2e-7", "7", "831.9", "–", "0", "∞", "5.000"):
        assert shown in text
    assert [cell.get("class") for cell in page.of("th")] == ["l", "r", "r", "r"]
    assert len(page.of("i", "bar")) == 2
    assert {"12345.0", "0.125", "831.9"} <= {cell.get("data-v") for cell in page.of("td")}
    assert Page(report.table(["a"], [])).of("th") and Page(report.table(["a"], [[1]] * 31)).of("div", "tall")
    with pytest.raises(ValueError, match="row 0 of the table has 1 cells, but there are 2 headings"):
        report.table(["a", "b"], [(1,)])


def test_per_class_shows_all_columns() -> None:
    text = Page(report.per_class(["x"], [0.111], [0.222], [0.333], [444])).text
    assert {"x", "0.111", "0.222", "0.333", "444"} <= set(text)


def test_best_point_is_marked() -> None:
    assert plots.best_point(LOSS, HISTORY) == ("eval_loss", (40, 0.8125))
    assert plots.best_point(F1, HISTORY) == ("eval_f1", (40, 0.87))
    page = Page(report.curves(HISTORY, [LOSS]))
    assert len(page.of("circle", "best")) == 1
    assert "best: 0.812 at step 40" in page.text
    best, drawn = page.of("circle", "best")[0], page.of("circle", "dot")
    assert (best["cx"], best["cy"]) in [(dot["cx"], dot["cy"]) for dot in drawn if "c2" in dot["class"].split()]
    assert not Page(report.curves(HISTORY, [Curve("Loss", LOSS.keys)])).of("circle", "best")
    tied = [{"step": step, "eval_f1": 0.5} for step in (3, 1, 2)]
    assert plots.best_point(F1, tied) == ("eval_f1", (1, 0.5))
    with pytest.raises(ValueError, match="'max', 'min' or None"):
        plots.best_point(Curve("x", {"a": "a"}, best="maximum"), [])


def test_values_that_cannot_be_drawn_are_left_out_and_counted() -> None:
    assert plots.points(HISTORY, "train_loss") == ([(10, 1.9), (20, 1.2), (40, 0.7)], 2)
    odd = [{"step": 1, "a": -1.0}, {"step": 2, "a": 1e200}, {"step": 3, "a": "x"}, {"a": 1.0}, {"step": 3, "a": 2}]
    assert plots.points(odd, "a", log_y=True) == ([(3, 2.0)], 2)
    assert plots.points([{"step": 5, "a": 1}, {"step": 5, "a": np.float32(2)}], "a") == ([(5, 2.0)], 0), "last one wins"
    source = report.curves(HISTORY, [LOSS])
    assert "2 values not finite, left out" in source
    assert not re.search(r"\bnan\b|\binf\b", source)


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0], [2.0, 2.0], [-3.0, -3.0], [1e-9, 2e-9], [1e50, -1e50], [5.0, 5.0 + 1e-12], [1e6, 3e7]],
)
@pytest.mark.parametrize("log_y", [False, True])
def test_any_history_draws_inside_its_panel(values: list[float], log_y: bool, tmp_path: Path) -> None:
    history = [{"step": 7 * number, "a": value} for number, value in enumerate(values)]
    series = [Curve("A", {"a": "a", "absent": "absent"}, log_y=log_y, best="min")]
    page = Page(report.curves(history, series))
    for shape in page.of("text") + page.of("circle"):
        assert 0 <= float(shape.get("x") or shape["cx"]) <= report.WIDTH
        assert 0 <= float(shape.get("y") or shape["cy"]) <= report.HEIGHT
    drawable = [value for value in values if value > 0 or not log_y]
    assert len(page.of("svg")) == bool(drawable)
    if log_y or len(values) < 2:  # matplotlib is slow: some of the cases are enough
        plots.plot_curves(history, series, tmp_path / "a.png")
        assert_image(tmp_path / "a.png")


def test_ticks_are_few_round_and_distinct() -> None:
    for low, high in [(0, 1), (0.431, 0.93), (-5, 17), (0.99991, 0.99993), (0, 123456), (1e-6, 2e-5)]:
        names = report._tick_names(report._ticks(low, high, 5))
        assert 3 <= len(names) <= 7 and len(set(names)) == len(names), names
    assert report._tick_names(report._ticks(0, 20000, 5)) == ["0", "5k", "10k", "15k", "20k"]
    assert report._tick_names(report._ticks(0, 1, 5)) == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert report._tick_names(report._log_ticks(-4, 1)) == ["0.0001", "0.001", "0.01", "0.1", "1", "10"]


def test_a_long_line_is_thinned_but_keeps_its_peak() -> None:
    history = [{"step": step, "a": 99.0 if step == 12_345 else step % 7} for step in range(20_000)]
    page = Page(report.curves(history, [Curve("A", {"a": "a"})]))
    [[label, drawn]] = json.loads(page.of("svg")[0]["data-curves"])
    assert label == "a" and len(drawn) <= report.DRAWN_POINTS + 2
    assert any(point[1:] == ["12,345", "99.000"] for point in drawn)


def test_confusion_counts_appear() -> None:
    page = Page(report.confusion(counts(5), [f"c{number}" for number in range(5)]))
    assert {f"{count:,}" for count in counts(5).flat} <= set(page.text)
    assert len(page.of("td", "hit")) == 5 and len(page.of("td", "miss")) == 20
    with pytest.raises(ValueError, match="3 classes cannot have the shape"):
        report.confusion(counts(5), ["a", "b", "c"])


def test_confusion_of_many_classes_lists_the_worst_pairs() -> None:
    from PIL import Image

    matrix = np.diag(np.full(40, 50))
    matrix[3, 9], matrix[8, 2] = 31, 17
    matrix[5] = 0  # a class without rows
    page = Page(report.confusion(matrix, [f"c{number}" for number in range(40)]))
    text = page.text
    assert text.index("31") < text.index("17") and text[text.index("31") - 2 : text.index("31")] == ["c3", "c9"]
    [image] = page.of("img")
    names, cells = json.loads(image["data-matrix"])
    assert len(names) == 40 and cells[str(3 * 40 + 9)] == 31 and sum(cells.values()) == matrix.sum()
    with Image.open(io.BytesIO(base64.b64decode(image["src"].partition(",")[2]))) as opened:
        assert opened.size == (40, 40) and opened.mode == "RGBA" and opened.getpixel((9, 3))[3] > 0
    assert "No class was confused" in report.confusion(np.eye(21, dtype=int), [str(n) for n in range(21)])


def test_mistakes_fold_long_texts_and_carry_images() -> None:
    long = "word " * 200
    png = b"\x89PNG\r\n\x1a\n"
    rows = [{"text": long, "true": "a", "predicted": "b", "confidence": 0.9}, {"image": png, "true": 1, "predicted": 2}]
    page = Page(report.mistakes(rows))
    assert len(page.of("details")) == 1 and long in page.text and len(page.of("li")) == 2
    assert page.of("img")[0]["src"].startswith("data:image/png;base64,")
    assert "None." in report.mistakes([])


def test_thumbnails_show_what_the_model_saw() -> None:
    """What is transparent stands on white; a palette does not stop it."""
    from PIL import Image

    from accelerando.data.decode import thumbnail

    for mode, colour in (("RGBA", (0, 0, 0, 0)), ("LA", (0, 0)), ("RGB", (255, 255, 255)), ("P", 0)):
        buffer = io.BytesIO()
        image = Image.new(mode, (300, 150), colour)
        if mode == "P":
            image.putpalette([255, 255, 255])
        image.save(buffer, "PNG")
        with Image.open(io.BytesIO(thumbnail(buffer.getvalue()))) as small:
            assert small.size == (128, 64)
            assert np.asarray(small).min() >= 254, mode


def test_mistakes_with_heat_stand_in_pairs_under_a_legend() -> None:
    png = b"\x89PNG\r\n\x1a\n"
    rows = [{"image": png, "heat": png, "true": "a", "predicted": NASTY}, {"image": png, "true": 1, "predicted": 2}]
    page = Page(report.mistakes(rows))
    assert [item.get("class") for item in page.of("li")] == ["pair", None] and len(page.of("img")) == 3
    assert page.of("img")[1]["alt"] == f"saliency map for {NASTY}"
    [bar] = page.of("i", "scale")
    assert "#000004" in bar["style"] and "#fcffa4" in bar["style"], "from the first colour to the last"
    assert page.of("ol", "cards") and not Page(report.mistakes(rows[1:])).of("i", "scale")
    assert not Page(report.mistakes([{"text": "x", "true": 1, "predicted": 2}])).of("ol", "cards")


def test_settings_mark_what_was_changed() -> None:
    source = report.settings({"training": {"lr": 2e-5, "seed": 0}, "output": {"run_name": None}}, {"lr"})
    assert "3 settings, 1 changed from the default" in source and source.count('class="changed"') == 1
    assert "open" not in Page(source).of("details")[0] and "<dd>0</dd>" in source


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    write(path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            report.write_report(path, "other", "", [])
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    report.write_report(path, "lone \ud800 surrogate", "", [report.command("x")])
    assert "surrogate" in path.read_text(encoding="utf-8") and list(tmp_path.iterdir()) == [path]


def assert_image(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as opened:
        assert round(opened.info["dpi"][0]) == 150
        pixels = np.asarray(opened.convert("RGB"))
    assert pixels.std() > 2, "a blank image"
    return pixels


def test_images_are_not_blank_and_repeat(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        plots.plot_curves(HISTORY, [LOSS, F1, Curve("$x_$", {"eval_loss": "_$"}, log_y=True)], tmp_path / "p" / name)
    assert_image(tmp_path / "p" / "a.png")
    assert (tmp_path / "p" / "a.png").read_bytes() == (tmp_path / "p" / "b.png").read_bytes()
    plots.plot_curves([], [LOSS], tmp_path / "empty.png")
    assert_image(tmp_path / "empty.png")


@pytest.mark.parametrize("classes", [2, 20, 90])
def test_confusion_image(classes: int, tmp_path: Path) -> None:
    names = [f"{'long ' * 20}$_{number} 手" for number in range(classes)]
    pixels = plots.plot_confusion(counts(classes), names, tmp_path / "c.png")
    assert pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3
    assert np.array_equal(pixels, assert_image(tmp_path / "c.png"))


def test_a_plot_leaves_pyplot_alone() -> None:
    from matplotlib import _pylab_helpers

    plots.plot_confusion(np.zeros((2, 2), int), ["a", "b"])  # also: rows without a count
    assert not _pylab_helpers.Gcf.figs


def test_shorten_keeps_both_ends() -> None:
    assert plots.shorten("abc", 5) == "abc" and plots.shorten("a\n b", 5) == "a b"
    assert plots.shorten("beginning-middle-end", 10) == "beginn…end"
    assert html.escape(plots.shorten("x" * 99, 24)).count("x") == 23
