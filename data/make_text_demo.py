"""Make the demo's text set: which library does a docstring come from?

Source files of installed packages are parsed, never imported. Docstrings of one file stay in one split, names that
give the library away are cut out, and near copies are dropped.

  python data/make_text_demo.py --output_dir data/demo_text
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import write_text

# Topic -> packages. The standard library is cut by subject.
TOPICS = {
    "arrays": ("numpy",),
    "data frames": ("pandas",),
    "machine learning": ("sklearn",),
    "plotting": ("matplotlib",),
    "networks and tensors": ("torch",),
    "language models": ("transformers",),
    "web and mail": ("http", "email", "urllib", "aiohttp", "requests"),
    "experiment tracking": ("mlflow",),
}
GIVEAWAYS = re.compile(
    r"\b(numpy|np|ndarray|pandas|pd|dataframe|sklearn|scikit-learn|scikit|matplotlib|mpl|pyplot|torch|pytorch|"
    r"transformers|hugging\s?face|aiohttp|requests|mlflow|scipy)\b",
    re.IGNORECASE,
)


@dataclass
class Args:
    # -- output --
    output_dir: str = "data/demo_text"  # folder to write train.json, validation.json and test.json to
    rows_per_class: int = 400  # training rows of each topic; a fifth as many for validation and for test
    seed: int = 0  # of the choice of files
    config: tuple[str, ...] = ()  # YAML files with any of these settings


def package_folder(name: str) -> Path | None:
    """Where a package's sources lie, without importing it."""
    for base in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
        if (Path(base) / name).is_dir():
            return Path(base) / name
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else None


def doc_strings(path: Path) -> Iterator[str]:
    """The description of each doc string in a file, with what gives the library away cut out."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module | ast.AsyncFunctionDef):
            text = description(ast.get_docstring(node) or "")
            text = re.sub(r":\w+:`[~.]?([^`]*)`|`{1,2}([^`]*)`{1,2}", r"\1\2", text)
            text = " ".join(GIVEAWAYS.sub("", text).split())
            if 40 <= len(text) <= 400 and ">>>" not in text and text.count(" ") >= 6:
                yield text


def description(doc: str) -> str:
    """The first paragraphs up to about 200 characters, without lists of parameters or examples."""
    kept: list[str] = []
    for paragraph in doc.split("\n\n"):
        stop = re.match(
            r"\s*([A-Z]\w+\s*\n\s*-{3,}|Args|Arguments|Returns?:|Parameters|Examples?|Raises|Note|See|\.\.|:)",
            paragraph,
        )
        if stop or ">>>" in paragraph or len(" ".join(kept)) > 200:
            break
        kept.append(paragraph)
    return "\n".join(kept)


def order_of(path: str, seed: int) -> str:
    return hashlib.sha256(f"{seed}:{path}".encode()).hexdigest()


def collect(packages: tuple[str, ...], wanted: int, seed: int, seen: set[str]) -> dict[str, list[str]]:
    """Texts of one topic by split; whole files go to one split, in an order that depends on the seed alone."""
    files = []
    for name in packages:
        folder = package_folder(name)
        if folder is not None:
            found = [path for path in folder.rglob("*.py") if "test" not in str(path.relative_to(folder))]
            files += [(f"{name}/{path.relative_to(folder)}", path) for path in found]
    files.sort(key=lambda item: order_of(item[0], seed))
    sizes = {"test": max(1, wanted // 5), "validation": max(1, wanted // 5), "train": wanted}
    splits: dict[str, list[str]] = {name: [] for name in sizes}
    for _, path in files:
        split = next((name for name, size in sizes.items() if len(splits[name]) < size), None)
        if split is None:
            break
        taken = 0
        for text in doc_strings(path):
            likeness = re.sub(r"[\W\d_]+", "", text.lower())[:80]
            # At most 8 of a file: a few long files would otherwise be the whole class.
            if likeness not in seen and taken < 8 and len(splits[split]) < sizes[split]:
                seen.add(likeness)
                splits[split].append(text)
                taken += 1
    if len(splits["train"]) < min(50, wanted):
        raise UserError(f"too few doc strings found for {', '.join(packages)}: are the packages installed?")
    return splits


def main() -> None:
    from tqdm import tqdm

    args = parse_args(Args)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {"train": [], "validation": [], "test": []}
    seen: set[str] = set()
    for topic, packages in tqdm(TOPICS.items(), "reading doc strings", delay=2, disable=None, leave=False):
        for split, texts in collect(packages, args.rows_per_class, args.seed, seen).items():
            rows[split] += [{"text": text, "label": topic} for text in texts]
    for split, content in rows.items():
        content.sort(key=lambda row: order_of(row["text"], args.seed))
        lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in content)
        write_text(folder / f"{split}.json", f"[\n{lines}\n]\n")
    width = max(map(len, TOPICS))
    print(f"{'topic':<{width}}" + "".join(f"{split:>12}" for split in rows))
    for topic in TOPICS:
        counts = [sum(row["label"] == topic for row in content) for content in rows.values()]
        print(f"{topic:<{width}}" + "".join(f"{count:>12,}" for count in counts))
    print(f"\nWritten to {folder}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
