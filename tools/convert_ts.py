"""Turn a set of the UEA time series archive (.ts) into clips that sign_train.py reads.

python tools/convert_ts.py NATOPS_TRAIN.ts --output_dir data/natops/train

Each series becomes an NPZ file with ``X`` float32 [T, channels]; labels.csv and gloss_names.csv stand beside. Classes
are numbered in the order in which the header names them. Train with ``--kp-key X --normalisation standard``.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from accelerando.base.config import parse_args
from accelerando.base.errors import UserError, errors_in_one_line
from accelerando.base.files import open_whole
from accelerando.data.table_formats import formula_safe

if TYPE_CHECKING:
    import numpy as np


@dataclass
class Args:
    # -- input --
    input: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE.ts")]  # a set of the UEA archive
    # -- output --
    output_dir: str = ""  # folder of the clips
    overwrite: bool = False  # replace the clips that are there


def read_ts(path: Path) -> tuple[list[str], Iterator[tuple[str, np.ndarray]]]:
    """The class names of the header, and (class name, series float32 [T, channels]) one after another.

    The format: lines of ``@name value``, then behind ``@data`` a line for each series, its channels separated by
    colons, their values by commas, the class behind the last colon (https://www.sktime.net, "ts file format").

    Raises:
        UserError: no such file, no ``@data``, no class labels.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.strip().lower() == "@data"), None)
    if start is None:
        raise UserError(f"{path}: no @data line: is it a .ts file?")
    header = [line.split() for line in lines[:start] if line.lower().startswith("@classlabel")]
    if not header or len(header[0]) < 4 or header[0][1].lower() != "true":
        raise UserError(f"{path}: no class labels in the header (@classLabel true ...)")
    return header[0][2:], _series(path, lines, start + 1)


def _series(path: Path, lines: list[str], start: int) -> Iterator[tuple[str, np.ndarray]]:
    import numpy as np

    for number, line in enumerate(lines[start:], start=start + 1):
        if not line.strip():
            continue
        *channels, name = line.strip().split(":")
        try:
            values = [np.array(channel.split(","), dtype=np.float32) for channel in channels]
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        if not values or len({len(channel) for channel in values}) != 1:
            raise UserError(f"{path}, line {number}: channels of unequal length")
        yield name, np.stack(values, axis=1)


def main() -> None:
    args = parse_args(Args)
    if not args.output_dir:
        raise UserError("--output_dir is missing: the folder that the clips go to")
    import numpy as np

    source, target = Path(args.input), Path(args.output_dir)
    names, series = read_ts(source)
    if (target / "labels.csv").exists() and not args.overwrite:
        raise UserError(f"{target / 'labels.csv'} exists: --overwrite replaces the clips there")
    target.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, (name, values) in enumerate(series):
        if name not in names:
            raise UserError(f"{source}: a series has the class {name!r}, which the header does not name")
        file = f"{source.stem}_{number:05d}"
        np.savez_compressed(target / f"{file}.npz", X=values)
        rows.append((file, names.index(name), 0))
    for path, head, content in (
        (
            target / "gloss_names.csv",
            ("gloss", "label", "cat", "category"),
            [(n, formula_safe(name), 0, "all") for n, name in enumerate(names)],
        ),
        (target / "labels.csv", ("file", "gloss", "cat"), rows),
    ):
        with open_whole(path, newline="") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(head)
            writer.writerows(content)
    print(f"{len(rows):,} clips of {len(names)} classes in {target}")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
