"""Pack images and captions into WebDataset shards (tar files), split and mixed.

  python tools/make_shards.py --images photos --captions captions.csv \\
      --output_dir data/furniture
  python tools/make_shards.py --images photos --captions furniture.csv \\
      --output_dir data/furniture --caption_template "a {color} {kind}"
  python tools/make_shards.py --images photos --output_dir data/furniture

A table has a row for each caption, so several rows may name one image.
Without a table, a .txt beside each image is its caption, and a .json beside
it holds fields for templates ({caption} is the text of the .txt).

The split goes by content: copies of an image stay on one side, and an image
stays where it is when others are added. So the fractions hold approximately;
a side that would be empty is given one image. Rows whose --split_column is
blank are split like this too.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import re
import signal
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from accelerando.base.config import check_ranges, flat, parse_args
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import check_can_be_made, visible_files, whole_folder
from accelerando.base.log import with_progress
from accelerando.base.processes import map_in_processes
from accelerando.base.texts import one_line
from accelerando.inference.inputs import IMAGES
from accelerando.inference.outputs import print_first

SPLITS = ("train", "validation", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "validation": "validation", "val": "validation",
               "valid": "validation", "dev": "validation", "test": "test"}  # fmt: skip
MADE_BY = "tools/make_shards.py"
MB = 1_000_000  # bytes
NAMED = 10  # rows left out that are named on the console


@dataclass
class Args:
    # -- data --
    images: str  # folder of the images (JPEG, PNG, WebP)
    output_dir: str  # folder to make: train, validation, test, shards.json
    captions: str | None = None  # table: .csv, .tsv, .json, .jsonl or .parquet
    image_column: str = "image"  # column of the file name, relative to --images
    caption_column: str = "caption"  # column of the caption
    overwrite: bool = False  # replace output_dir where this tool made it
    # -- captions --
    caption_template: tuple[str, ...] = ()  # "a {color} {kind}": filled from a row's columns; one is drawn of several
    all_templates: bool = False  # a caption from every template
    metadata: bool = True  # a .json with the row's columns beside each image
    # -- split --
    validation_fraction: float = 0.1  # share of images for validation
    test_fraction: float = 0.1  # share of images for the test
    split_column: str | None = None  # column with train, validation (val) or test
    seed: int = 42  # of split, order and drawn templates
    # -- shards --
    max_shard_mb: float = 256.0  # largest shard in MB (10^6 bytes)
    max_shard_count: int = 10_000  # most samples in a shard
    # -- work --
    verify: bool = True  # decode every image; broken ones are left out
    num_workers: int = 4  # processes that read and decode; 0: this one
    config: tuple[str, ...] = ()  # YAML files with any of these settings


class Row(NamedTuple):
    """A line of the table, or an image with what lies beside it; ``where`` names it in messages."""

    where: str
    image: str  # relative to --images, with slashes
    fields: dict[str, Any]


class ImageFile(NamedTuple):
    """What is known of an image file once it was read: ``fault`` says why it cannot be used."""

    digest: str = ""
    size: int = 0  # bytes
    kind: str = ""  # jpg, png or webp, from the content
    fault: str = ""


class Sample(NamedTuple):
    key: str
    row: Row
    caption: str


LeftOut = Callable[[str, str], None]  # takes where and why


def draw(*parts: object) -> float:
    """A number in [0, 1) that is a function of ``parts`` alone."""
    text = "\0".join(map(str, parts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64


def key_of(image: str, number: int) -> str:
    """The key of caption ``number`` of an image: from its path alone, unique, ASCII, without dots and slashes.

    ``sofas/red 1.jpg`` gives ``sofas_red_1-5b0c9e12``; later captions end in ``_1``, ``_2``. At most 80 characters,
    because a member's name in a tar file ends at 100.
    """
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", image.rpartition(".")[0] or image)[-56:]
    digest = hashlib.sha256(image.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    return f"{stem}-{digest}" + (f"_{number}" if number else "")


# ------------------------------------------------------------------------------------------------- rows and captions


def template_columns(templates: Iterable[str]) -> list[str]:
    """The columns that templates name, in order.

    Raises:
        UserError: a brace without its partner, no name in the braces, or a format after the name.
    """
    columns: dict[str, None] = {}
    for template in templates:
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise UserError(f"--caption_template {template!r}: {error}; write {{{{ for a brace") from None
        if not template.strip():
            raise UserError("--caption_template is empty")
        for _, name, spec, conversion in parts:
            if name is not None and (not name.strip() or spec or conversion):
                raise UserError(
                    f'--caption_template {template!r}: only column names go into braces, as in "a {{color}}"'
                )
            if name is not None:
                columns[name] = None
    return list(columns)


def read_rows(args: Args, left_out: LeftOut) -> list[Row]:
    """The rows of the table, or of the files beside the images; images are not opened.

    Raises:
        UserError: folder or table missing, empty or broken; a column that no row has.
    """
    folder = Path(args.images)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: {'is a file, not a folder' if folder.exists() else 'no such folder'}")
    columns = template_columns(args.caption_template)
    if args.captions:
        columns = columns or [args.caption_column]
        columns += [args.image_column, *([args.split_column] if args.split_column else [])]
        rows = list(_table_rows(args, columns, left_out))
    else:
        columns += [args.split_column] if args.split_column else []
        rows = list(_rows_beside(args, left_out))
    known = dict.fromkeys(name for row in rows for name in row.fields)
    for name in columns:
        if rows and name not in known:
            listed = ", ".join(map(str, known)) or "none"
            raise UserError(f"{args.captions or folder}: no column {name!r}; there are {listed}")
    return rows


def _table_rows(args: Args, columns: list[str], left_out: LeftOut) -> Iterator[Row]:
    from accelerando.data.table_formats import SUFFIXES, check_table, table_records, table_suffix

    table = Path(args.captions or "")
    check_table(table, "--captions")
    if not table_suffix(table):
        raise UserError(f"--captions {table}: a table ends in {', '.join(SUFFIXES)}")
    parquet = table_suffix(table) == ".parquet"
    records = _parquet_records(table, columns) if parquet else table_records(table, columns)
    empty = True
    for where, record in records:
        empty = False
        if not isinstance(record, dict):
            raise UserError(f"{table}: {where}: expected an object with {', '.join(columns)}, found {record!r:.60}")
        where, name = f"{table.name} {where}", record.get(args.image_column)
        if args.image_column not in record:
            left_out(where, f"no {args.image_column!r} (it has {', '.join(record) or 'nothing'})")
        elif name is None or name == "":
            left_out(where, f"{args.image_column} is empty")
        elif not isinstance(name, str):
            left_out(where, f"{args.image_column} is {name!r:.40}, not a file name")
        else:
            path = Path(os.path.relpath(Path(args.images, name.strip().replace("\\", "/")), args.images))
            if path.parts[:1] == ("..",):
                left_out(where, f"{name} lies outside of {args.images}")
            else:
                yield Row(where, path.as_posix(), record)
    if empty:
        raise UserError(f"{table}: no rows in it")


def _parquet_records(table: Path, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow as pa

    from accelerando.data.table_formats import read_parquet

    content = read_parquet(table)
    for name in columns:
        if name not in content.column_names:
            raise UserError(f"{table}: no column {name!r}; there are {', '.join(content.column_names)}")
        kind = content.schema.field(name).type
        if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            raise UserError(f"{table}: column {name!r} holds {kind}, not text; images are files in the folder --images")
    number = 0
    for batch in content.to_batches(max_chunksize=1024):
        for record in batch.to_pylist():
            number += 1
            yield f"row {number}", record


def _rows_beside(args: Args, left_out: LeftOut) -> Iterator[Row]:
    folder, found = Path(args.images), 0
    for path in visible_files(folder, IMAGES):
        found += 1
        image, text, fields = path.relative_to(folder).as_posix(), path.with_suffix(".txt"), path.with_suffix(".json")
        content: dict[str, Any] = {}
        beside = fields
        try:
            if fields.is_file():
                content = json.loads(fields.read_text(encoding="utf-8-sig"))
                if not isinstance(content, dict):
                    raise ValueError(f"expected an object, found a {type(content).__name__}")
            beside = text
            if text.is_file():
                content = {**content, args.caption_column: text.read_text(encoding="utf-8-sig")}
        except (OSError, ValueError, RecursionError) as error:
            left_out(image, f"{beside.name} beside it: {first_line(error)}")
            continue
        if not content:
            left_out(image, f"no caption beside it ({text.name} or {fields.name})")
            continue
        yield Row(image, image, content)
    if not found:
        raise UserError(f"--images {folder}: no image in it (.jpg, .png, .webp)")


def captions_of(row: Row, number: int, args: Args) -> list[tuple[int, str]]:
    """(number within the image, caption) of one row, which is the image's row ``number``.

    Raises:
        ValueError: why there is none.
    """
    templates = args.caption_template
    if not templates:
        text = row.fields.get(args.caption_column)
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{args.caption_column} is {text!r:.40}, not a text")
        found, lacking = [(number, (text or "").strip())], args.caption_column
    else:
        values = {
            name: str(value).strip()
            for name in template_columns(templates)
            if isinstance(value := row.fields.get(name), str | int | float) and value == value  # nan is a hole
        }
        values = {name: value for name, value in values.items() if value}
        filled = [(index, _fill(template, values)) for index, template in enumerate(templates)]
        found = [(number * len(templates) + index, text) for index, text in filled if text is not None]
        if found and not args.all_templates:
            found = [(number, found[int(draw(args.seed, "template", row.image, number) * len(found))][1])]
        lacking = ", ".join(name for name in template_columns(templates) if name not in values)
    found = [(index, text) for index, text in found if text]
    if not found:
        raise ValueError(f"{lacking} is empty")
    for _, text in found:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError("the caption holds half a character (a lone surrogate)") from None
    return found


def _fill(template: str, values: dict[str, str]) -> str | None:
    """None where a column is blank. Not str.format, to which a dot in a column's name is an attribute."""
    parts = [(literal, name) for literal, name, _, _ in string.Formatter().parse(template)]
    if any(name is not None and name not in values for _, name in parts):
        return None
    return "".join(literal + (values[name] if name is not None else "") for literal, name in parts).strip()


def make_samples(rows: list[Row], files: dict[str, ImageFile], args: Args, left_out: LeftOut) -> list[Sample]:
    """A sample for each caption of each row whose image is sound."""
    samples: list[Sample] = []
    seen: Counter[str] = Counter()  # rows of each image, the empty ones too: mending one moves no other's key
    for row in rows:
        number = seen[row.image]
        seen[row.image] += 1
        if fault := files[row.image].fault:
            left_out(row.where, fault if row.where == row.image else f"{row.image}: {fault}")
            continue
        try:
            captions = captions_of(row, number, args)
        except ValueError as error:
            left_out(row.where, str(error))
            continue
        samples += [Sample(key_of(row.image, index), row, caption) for index, caption in captions]
    return samples


# --------------------------------------------------------------------------------------------------------- images


def check_image(path: str, verify: bool) -> ImageFile:
    """Reads one file whole: its SHA-256, size in bytes and kind; ``verify`` decodes every pixel."""
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        return ImageFile(fault="no such file")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        return ImageFile(fault=getattr(error, "strerror", None) or str(error))
    if data.startswith(b"\xff\xd8\xff"):
        kind = "jpg"
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        kind = "png"
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        kind = "webp"
    else:
        return ImageFile(fault="not a JPEG, PNG or WebP image" if data else "the file is empty")
    if verify:
        from accelerando.data.decode import decode_pixels

        try:
            decode_pixels(data)
        except ValueError as error:
            return ImageFile(fault=f"broken image ({first_line(error)})")
    return ImageFile(hashlib.sha256(data).hexdigest(), len(data), kind)


def check_images(images: list[str], args: Args) -> dict[str, ImageFile]:
    """:class:`ImageFile` of each path (relative to ``--images``), read by ``--num_workers`` processes."""
    check = functools.partial(check_image, verify=args.verify)
    paths = [f"{args.images}/{image}" for image in images]
    found = map_in_processes(check, paths, args.num_workers)
    return dict(zip(images, with_progress(found, len(paths), "checking", "images"), strict=True))


# ------------------------------------------------------------------------------------------------------------ split


def deal(digests: Iterable[str], args: Args) -> dict[str, str]:
    """digest -> split, by a draw from (seed, digest). A wanted side that stays empty gets the image nearest to it.

    Raises:
        UserError: fewer images than sides.
    """
    test, validation = args.test_fraction, args.validation_fraction
    bounds = {"test": (0.0, test), "validation": (test, test + validation), "train": (test + validation, 1.0)}
    bounds = {name: (low, high) for name, (low, high) in bounds.items() if high > low}
    place = {digest: draw(args.seed, "split", digest) for digest in sorted(digests)}
    split = {d: next((name for name, (_, high) in bounds.items() if u < high), "train") for d, u in place.items()}
    if args.split_column:
        return split
    for name, (low, high) in bounds.items():
        counts = Counter(split.values())
        if not counts[name]:
            spare = [digest for digest, side in split.items() if counts[side] > 1]
            if not spare:
                raise UserError(
                    f"{len(split)} different images for {', '.join(reversed(bounds))}: too few; "
                    "--validation_fraction 0 --test_fraction 0 packs all for training"
                )
            nearest = min(spare, key=lambda digest: max(low - place[digest], place[digest] - high))
            split[nearest] = name
    return split


def split_samples(
    samples: list[Sample], files: dict[str, ImageFile], args: Args, left_out: LeftOut
) -> dict[str, list[Sample]]:
    """Samples of each split, mixed by the seed. All samples of an image, by content, are on one side.

    A row whose split column contradicts another row of the same image is left out: test keeps it before validation,
    validation before train.

    Raises:
        UserError: a word in the split column that names no split.
    """
    given: dict[str, str] = {}  # key -> split
    chosen: dict[str, str] = {}  # digest -> split
    for sample in samples if args.split_column else ():
        word = str(sample.row.fields.get(args.split_column) or "").strip()
        if not word:
            continue
        if word.lower() not in SPLIT_NAMES:
            raise UserError(
                f"{sample.row.where}: {args.split_column} is {word!r:.40}; write train, validation (or val) or test"
            )
        name, digest = SPLIT_NAMES[word.lower()], files[sample.row.image].digest
        given[sample.key] = name
        chosen[digest] = max(name, chosen.get(digest, name), key=SPLITS.index)
    split = deal({files[sample.row.image].digest for sample in samples}, args) | chosen
    result: dict[str, list[Sample]] = {name: [] for name in SPLITS}
    for sample in samples:
        name = split[files[sample.row.image].digest]
        if given.get(sample.key, name) == name:
            result[name].append(sample)
        else:
            left_out(sample.row.where, f"{sample.row.image}: the same image is in {name} too")
    for part in result.values():
        part.sort(key=lambda sample: (draw(args.seed, "order", sample.key), sample.key))
    return {name: part for name, part in result.items() if part}


# ----------------------------------------------------------------------------------------------------------- shards


def texts_of(sample: Sample, args: Args) -> dict[str, bytes]:
    """The members of a sample beside the image: ``txt``, and ``json`` where wanted."""
    members = {"txt": sample.caption.encode()}
    if args.metadata:
        content = _plain({"image": sample.row.image, **sample.row.fields})
        members["json"] = json.dumps(content, ensure_ascii=False, default=str).encode("utf-8", "replace")
    return members


def _plain(value: object) -> object:
    """Without what JSON has no word for: nan, infinity, bytes."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not isinstance(item, bytes)}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plan_shards(samples: list[Sample], files: dict[str, ImageFile], args: Args) -> list[list[Sample]]:
    """Cuts ``samples`` so that no tar file is beyond the limits; a sample that alone is larger gets its own."""
    shards: list[list[Sample]] = []
    filled = 0
    for sample in samples:
        sizes = [files[sample.row.image].size, *map(len, texts_of(sample, args).values())]
        size = sum(512 + -(-size // 512) * 512 for size in sizes)  # a heading and full blocks for each member
        # A tar file ends with two empty blocks and is filled up to records of 10,240 bytes.
        full = not shards or -(-(filled + size + 1024) // 10_240) * 10_240 > args.max_shard_mb * MB
        if full or len(shards[-1]) == args.max_shard_count:
            shards.append([])
            filled = 0
        shards[-1].append(sample)
        filled += size
    return shards


def write_shard(path: Path, samples: list[Sample], files: dict[str, ImageFile], args: Args) -> int:
    """Writes one tar file whose bytes depend on ``samples`` alone; its size in bytes."""
    from webdataset import TarWriter

    fixed = {"mtime": 0, "user": "", "group": "", "mode": 0o644}
    with open(path, "wb") as file, TarWriter(file, encoder=False, compress=False, **fixed) as writer:
        for sample in samples:
            source, image = Path(args.images, sample.row.image), files[sample.row.image]
            data = source.read_bytes() if source.is_file() else b""
            if hashlib.sha256(data).hexdigest() != image.digest:
                raise UserError(f"{source}: changed while it was being packed; run it again")
            writer.write({"__key__": sample.key, image.kind: data, **texts_of(sample, args)})
    return path.stat().st_size


def write_all(
    draft: Path, splits: dict[str, list[Sample]], files: dict[str, ImageFile], args: Args
) -> dict[str, dict[str, int]]:
    """Writes the shards of every split under ``draft``; samples, images (by content), shards and bytes of each."""
    plan = {name: plan_shards(samples, files, args) for name, samples in splits.items()}
    counts: dict[str, dict[str, int]] = {}
    jobs = []
    for name, shards in plan.items():
        (draft / name).mkdir()
        jobs += [(name, draft / name / f"{number:05d}.tar", samples) for number, samples in enumerate(shards)]
        images = len({files[sample.row.image].digest for sample in splits[name]})
        counts[name] = {"samples": len(splits[name]), "images": images, "shards": len(shards), "bytes": 0}
    for name, path, samples in with_progress(jobs, len(jobs), "packing", "shards"):
        counts[name]["bytes"] += write_shard(path, samples, files, args)
    return counts


# ----------------------------------------------------------------------------------------------------------- output


def check_output(target: Path, args: Args) -> None:
    """UserError where ``target`` cannot be made, or holds something that this tool did not write."""
    flag = f"--output_dir {args.output_dir}"
    if target.exists() and not target.is_dir():
        raise UserError(f"{flag} is a file")
    check_can_be_made(target, "--output_dir")
    if target.is_mount():
        raise UserError(f"{flag} is the top of a disk: name a folder in it")
    images = Path(args.images).resolve()
    if target == images or target in images.parents:
        raise UserError(f"{flag} holds the images: choose another folder")
    names = {path.name for path in target.iterdir()} if target.is_dir() else set()
    if not names:
        return
    if not args.overwrite:
        raise UserError(f"{flag} is not empty: --overwrite replaces shards made by this tool")
    try:
        ours = json.loads((target / "shards.json").read_text(encoding="utf-8")).get("made_by") == MADE_BY
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise UserError(f"{flag} was not made by this tool (it has no shards.json of it): choose another folder")
    if others := sorted(names - {*SPLITS, "shards.json", "skipped.txt"}):
        raise UserError(f"{flag} also holds {others[0]}: move that away, or choose another folder")


def settings(args: Args, target: Path) -> dict[str, Any]:
    """The arguments that the output depends on, paths as seen from it."""
    values = {name: value for name, value in flat(args).items() if name not in ("output_dir", "num_workers")}
    for name in ("images", "captions"):
        if values[name]:
            values[name] = Path(os.path.relpath(values[name], target)).as_posix()
    return values


def report(counts: dict[str, dict[str, int]]) -> str:
    """An aligned table, a line for each split."""
    lines = [f"{'split':<12}{'samples':>10}{'images':>10}{'shards':>8}{'MB':>11}"]
    total = {name: sum(row[name] for row in counts.values()) for name in ("samples", "images", "shards", "bytes")}
    for name, row in {**counts, "total": total}.items():
        numbers = f"{row['samples']:>10,}{row['images']:>10,}{row['shards']:>8,}{row['bytes'] / MB:>11,.2f}"
        lines.append(f"{name:<12}{numbers}")
    return "\n".join(lines)


def main() -> None:
    args = parse_args(Args, {"val_fraction": "validation_fraction"})
    check_ranges(
        args, validation_fraction=(0, 1), test_fraction=(0, 1), max_shard_mb=(0.01, math.inf),
        max_shard_count=(1, 2**40),
    )  # fmt: skip
    if args.validation_fraction + args.test_fraction >= 1:
        raise UserError(
            f"--validation_fraction {args.validation_fraction} and --test_fraction {args.test_fraction}: "
            "below 1 together, so that something is left for training"
        )
    if args.all_templates and not args.caption_template:
        raise UserError("--all_templates needs --caption_template")
    target = Path(args.output_dir).resolve()
    check_output(target, args)

    skipped: list[str] = []

    def left_out(where: str, why: str) -> None:
        skipped.append(f"{where}: {why}")

    rows = read_rows(args, left_out)
    files = check_images(list(dict.fromkeys(row.image for row in rows)), args)
    samples = make_samples(rows, files, args, left_out)
    if not samples:
        raise UserError(f"nothing to pack: all {len(skipped):,} rows are left out, the first one is {skipped[0]}")
    try:
        splits = split_samples(samples, files, args, left_out)
    except UserError as error:
        hint = f"; {len(skipped):,} rows were left out, the first one is {skipped[0]}" if skipped else ""
        raise UserError(f"{error}{hint}") from None

    with whole_folder(target) as draft:
        try:
            draft.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--output_dir {args.output_dir}: {error.strerror} ({draft.parent})") from None
        counts = write_all(draft, splits, files, args)
        content = {"made_by": MADE_BY, "seed": args.seed, "splits": counts, "left_out": len(skipped)}
        content["arguments"] = settings(args, target)
        (draft / "shards.json").write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        if skipped:
            with open(draft / "skipped.txt", "w", encoding="utf-8", errors="backslashreplace") as file:
                file.writelines(one_line(line) + "\n" for line in skipped)

    print_first(skipped, "left out", NAMED)
    print(report(counts))
    if skipped:
        print(f"\n{len(skipped):,} left out, all named in {Path(args.output_dir) / 'skipped.txt'}")
    print(f"\nWritten to {args.output_dir}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
