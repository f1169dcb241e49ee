"""Embed images and captions with CLIP or SigLIP, base or fine-tuned: vectors of unit length in a Parquet file.

  python tools/embed.py runs/x photos --output photos.parquet      a folder of images, with the weights in runs/x/best
  python tools/embed.py openai/clip-vit-base-patch32 'data/train/{00000..00009}.tar' --parts image
  python tools/embed.py MODEL captions.csv --image_folder photos --adapter runs/x/best/adapter
  python tools/embed.py runs/x --texts queries.txt --output queries.parquet

MODEL: a run, a model folder, a Hub name, or a LoRA adapter. INPUT: a folder of images (at any depth), shards
(a folder with .tar files, a brace pattern, a URL), or a table of captions (.csv .tsv .json .jsonl .parquet).

Columns: key (the image's path in its folder, shard:member, or file:line of --texts), caption, image_embedding and
text_embedding, where there are captions and images. Embeddings are lists of a fixed size, or, where --texts is given
with INPUT, lists and nulls. The schema's metadata holds the model, the dimension, the logit scale (the factor itself:
100 for CLIP) and the image size in pixels. Transparent images are put on white, as in training.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from accelerando.base.config import check_ranges, parse_args
from accelerando.base.errors import UserError, errors_in_one_line, first_line
from accelerando.base.files import cache_folder, visible_files
from accelerando.base.log import progress_bar, quiet_libraries
from accelerando.data.pairs import TablePairs
from accelerando.inference.inputs import IMAGES
from accelerando.inference.outputs import print_first, whole_file
from accelerando.inference.runs import model_folder
from accelerando.inference.saved import choose_device
from accelerando.models.clip import check_image_size, embed_in_forward, open_clip_model, open_preprocessing

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import torch
    from transformers import CLIPModel, SiglipModel

    from accelerando.data.collate import PairCollate
    from accelerando.data.shards import ShardPairs
    from accelerando.models.clip import Preprocessing

    ClipModel = CLIPModel | SiglipModel

ROW_GROUP = 4096  # rows that are held and written at once
NAMED = 10  # rows left out that are named on the console


@dataclass
class Args:
    # -- input --
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]  # run, folder, Hub name or LoRA adapter
    input: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[INPUT]")] = None  # images or pairs
    texts: str | None = None  # embed the lines of this file too, or alone; blank lines are skipped
    adapter: str | None = None  # LoRA adapter that is merged into MODEL first
    trust_remote_code: bool = False  # run Python files of the model's folder where it needs them
    image_folder: str | None = None  # tables: folder of the images (default: the table's own)
    image_column: str = "image"  # tables: column of the image file
    caption_column: str = "caption"  # tables: column of the caption
    cache_dir: str | None = None  # indexes and fetched shards (default: $ACCELERANDO_CACHE or ~/.cache/accelerando)
    cache_gb: float = 50.0  # fetched shards that are kept, in GB; 0: none, each pair is read in place
    # -- embedding --
    parts: Literal["both", "image", "text"] = "both"  # what is embedded, of what is there
    max_length: int | None = None  # tokens kept of a caption (default: what the model can take)
    batch_size: int = 64  # images or captions in one forward pass
    num_workers: int = 2  # processes that read and decode; 0: this one
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where it is computed
    amp: Literal["no", "bf16"] = "no"  # mixed precision; bf16 needs hardware that computes it to be fast
    # -- output --
    output: str = "embeddings.parquet"  # the file to write
    dtype: Literal["float32", "float16"] = "float32"  # of the embeddings in it
    overwrite: bool = False  # replace the file where it exists


# ------------------------------------------------------------------------------------------------------------ input


@dataclass
class Files:
    """Images in ``folder``, or ``lines`` of a text file; ``names`` [n] are keys, as the file system's bytes."""

    names: pa.Array
    folder: Path | None = None
    lines: pa.Array | None = None

    def __len__(self) -> int:
        return len(self.names)

    def key(self, row: int) -> str:
        """The path in the folder, or file:line."""
        return os.fsdecode(self.names[row].as_py())

    def read(self, row: int) -> tuple[bytes | None, bytes | None]:
        """The image's file and the caption, one of which is None."""
        if self.lines is not None:
            return None, self.lines[row].as_py()
        return (self.folder / self.key(row)).read_bytes(), None


if TYPE_CHECKING:
    Source = Files | TablePairs | ShardPairs  # of the rows that are embedded


def list_images(folder: Path) -> Files:
    """The image files in a folder and the folders in it, by path. UserError where there is none."""
    import pyarrow as pa

    found = [os.fsencode(path.relative_to(folder).as_posix()) for path in visible_files(folder, IMAGES)]
    if not found:
        raise UserError(f"{folder}: no image in it ({' '.join(IMAGES)}), nor shards (*.tar)")
    return Files(pa.array(sorted(found), pa.large_binary()), folder=folder)


def read_lines(path: Path) -> Files:
    """The lines of a text file that are not blank. UserError where there is none, or one is not UTF-8."""
    import pyarrow as pa

    keys, lines, number = [], [], 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if text := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():
                    keys.append(os.fsencode(f"{path.name}:{number}"))
                    lines.append(text.encode())
    except OSError as error:
        raise UserError(f"--texts {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--texts {path}, line {number}: not UTF-8 text ({error.reason})") from None
    if not lines:
        raise UserError(f"--texts {path}: no text in it")
    return Files(pa.array(keys, pa.large_binary()), lines=pa.array(lines, pa.large_binary()))


def open_sources(args: Args) -> list[Source]:
    """What INPUT and ``--texts`` name: ``read(row)`` gives the bytes of image and caption, or None for either.

    Raises:
        UserError: something is missing or broken, or there is nothing of what ``--parts`` asks for.
    """
    from accelerando.data.pairs import open_pairs
    from accelerando.data.shards import has_shards

    sources: list[Source] = []
    if args.input is not None:
        path = Path(args.input)
        if path.suffix.lower() == ".txt":
            raise UserError(f"{path}: texts are given with --texts; INPUT is for images, with or without captions")
        images = path.is_dir() and next(visible_files(path, IMAGES), None)
        if path.is_dir() and not any(path.glob("*.tar")) and (images or not has_shards(path)):
            sources.append(list_images(path))
        else:
            table = (args.image_folder, args.image_column, args.caption_column)
            sources.append(open_pairs(args.input, cache_folder(args.cache_dir), args.cache_gb, *table))
    if args.texts is not None:
        sources.append(read_lines(Path(args.texts)))
    for source in sources:
        if not chosen_parts(source, args.parts):
            there = "has no captions" if "image" in parts_of(source) else "has no images"
            name = args.input if "image" in parts_of(source) else f"--texts {args.texts}"
            raise UserError(f"--parts {args.parts}: {name} {there}")
    return sources


def parts_of(source: Source) -> list[str]:
    """Which of image and text a source has."""
    return ["image", "text"] if not isinstance(source, Files) else ["image" if source.lines is None else "text"]


def chosen_parts(source: Source, wanted: str) -> list[str]:
    """Which of them are embedded."""
    return [part for part in parts_of(source) if wanted in ("both", part)]


def key_of(source: Source) -> Callable[[int], str]:
    """A function from row to key; with shards, call it row by row, since it keeps the names of one shard alone."""
    import numpy as np

    if isinstance(source, Files):
        return source.key
    if isinstance(source, TablePairs):
        return lambda row: source.names[row].as_py()
    kept: dict[int, list[str]] = {}

    def key(row: int) -> str:
        shard = int(np.searchsorted(source.starts, row, side="right")) - 1
        if shard not in kept:
            kept.clear()
            kept[shard] = source.members(shard)
        return f"{source.name(shard)}:{kept[shard][row - int(source.starts[shard])]}"

    return key


@dataclass
class Samples:
    """Samples of ``source``, with ``fault`` in place of what cannot be read."""

    source: Source
    transform: Callable[[bytes], torch.Tensor]
    parts: list[str]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, row: int) -> dict[str, Any]:
        from accelerando.data.pairs import read_caption

        sample: dict[str, Any] = {"valid": 1.0, "image_id": 0, "text_id": 0, "words": None}
        try:
            file, text = self.source.read(row)
            if text is not None:
                with contextlib.suppress(*(() if "text" in self.parts else (ValueError,))):
                    sample["words"] = read_caption(text)
            if "text" in self.parts:
                sample["caption"] = sample["words"]
            if "image" in self.parts:
                sample["pixel_values"] = self.transform(file)
        except UserError:
            raise
        except Exception as error:  # each of Pillow's decoders has errors of its own
            return {"fault": " ".join(first_line(error).split())}
        return sample


@dataclass
class SampleCollate:
    """``faults`` [B] (None where a sample is sound); of the b sound ones ``captions`` [b] and what ``pairs`` makes."""

    pairs: PairCollate

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        sound = [sample for sample in samples if "fault" not in sample]
        batch = self.pairs(sound) if sound else {}
        captions = [sample["words"] for sample in sound]
        return {**batch, "faults": [sample.get("fault") for sample in samples], "captions": captions}


# ------------------------------------------------------------------------------------------------------------ model


def model_name(name: str) -> str:
    """The folder with the weights of a run or model folder, or ``name`` itself, which is then of the Hub.

    Raises:
        UserError: a path at which there is no model.
    """
    path = Path(name)
    if path.exists() or name.count("/") > 1 or (path.parent.name and path.parent.is_dir()):
        return str(model_folder(path, adapters=True))
    return name


def load_model(args: Args) -> tuple[ClipModel, Preprocessing]:
    """The model on its device, whose forward embeds, and its :class:`models.clip.Preprocessing`.

    Raises:
        UserError: no such model, or one of another kind; an adapter for another base model.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    name, device = model_name(args.model), choose_device(args.device)
    preprocessing = open_preprocessing(name, args.max_length, args.trust_remote_code)
    model = open_clip_model(name, args.adapter, trust_remote_code=args.trust_remote_code)
    check_image_size(model, preprocessing)
    embed_in_forward(model)
    return model.eval().to(device), preprocessing


def embed(model: ClipModel, batch: dict[str, Any], preprocessing: Preprocessing, amp: str) -> dict[str, np.ndarray]:
    """Embeddings of unit length, float32 [b, d], of the ``image`` and ``text`` in ``batch``.

    Raises:
        UserError: a token that the model does not know, or a result that is not finite.
    """
    import numpy as np
    import torch

    from accelerando.data.transforms import normalise

    device, inputs = model.logit_scale.device, {}
    for name in ("pixel_values", "input_ids", "attention_mask"):
        if name in batch:
            inputs[name] = batch[name].to(device, non_blocking=True)
    known = model.config.text_config.vocab_size
    if "input_ids" in batch and int(batch["input_ids"].max()) >= known:
        raise UserError(f"the tokenizer has more tokens than the model's {known}; they do not belong together")
    if "pixel_values" in inputs and inputs["pixel_values"].dtype == torch.uint8:
        inputs["pixel_values"] = normalise(inputs["pixel_values"], *preprocessing.colours)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp == "bf16"):
        output = model(**inputs)
    found = {name: output[name].float().cpu().numpy() for name in ("image", "text") if name in output}
    if not all(np.isfinite(values).all() for values in found.values()):
        raise UserError("the model returns NaN: its weights are corrupted")
    return found


def embedded(
    source: Source,
    model: ClipModel,
    preprocessing: Preprocessing,
    collate: SampleCollate,
    schema: pa.Schema,
    args: Args,
) -> Iterator[tuple[pa.Table, list[str]]]:
    """Batch by batch, in the order of the source: the rows that can be read, and a line for each that cannot."""
    import numpy as np

    from accelerando.train.batches import Plan, make_loader

    transform = preprocessing.transform()
    samples = Samples(source, transform, chosen_parts(source, args.parts))
    rows = np.arange(len(source))
    if hasattr(source, "prefetch"):
        source.prefetch([rows])
    plan = Plan([rows[start : start + args.batch_size] for start in range(0, len(rows), args.batch_size)])
    key = key_of(source)
    for batch in make_loader(samples, collate, plan, args.num_workers, model.logit_scale.device):
        rows = [(key(row), fault) for row, fault in zip(batch["index"].tolist(), batch["faults"], strict=True)]
        sound = [key for key, fault in rows if fault is None]
        found = embed(model, batch, preprocessing, args.amp) if sound else {}
        table = make_table(schema, sound, batch["captions"], found)
        yield table, [f"{key}: {fault}" for key, fault in rows if fault is not None]


# ----------------------------------------------------------------------------------------------------------- output


def make_schema(
    sources: list[Source], args: Args, model: ClipModel, preprocessing: Preprocessing, collate: SampleCollate
) -> pa.Schema:
    """The columns that there will be; the metadata describes the model."""
    import pyarrow as pa

    probe = collate([{"valid": 1.0, "image_id": 0, "text_id": 0, "words": "a", "caption": "a"}])
    dimension = embed(model, probe, preprocessing, "no")["text"].shape[1]
    number = pa.float16() if args.dtype == "float16" else pa.float32()
    fields = [pa.field("key", pa.string(), nullable=False)]
    if any("text" in parts_of(source) for source in sources):
        fields.append(pa.field("caption", pa.string()))
    for part in ("image", "text"):
        there = [part in chosen_parts(source, args.parts) for source in sources]
        # Arrow (to 25) reads no null among lists of a fixed size: https://github.com/apache/arrow/issues/35692
        vectors = pa.list_(number, dimension) if all(there) else pa.list_(number)
        fields += [pa.field(f"{part}_embedding", vectors)] if any(there) else []
    known = {"model": args.model, "dimension": dimension, "logit_scale": float(model.logit_scale.detach().exp()),
             "image_size": preprocessing.image_size, "max_length": preprocessing.max_length}  # fmt: skip
    if args.adapter:
        known["adapter"] = args.adapter
    if hasattr(model, "logit_bias"):
        known["logit_bias"] = float(model.logit_bias.detach())
    return pa.schema(fields, {name: str(value) for name, value in known.items()})


def make_table(
    schema: pa.Schema, keys: list[str], captions: list[str | None], found: dict[str, np.ndarray]
) -> pa.Table:
    """The rows of a batch; a column of ``schema`` of which there is nothing in it is null."""
    import pyarrow as pa

    # A file's name may be none in UTF-8.
    columns = {"key": pa.array([key.encode("utf-8", "backslashreplace").decode() for key in keys]),
               "caption": pa.array(captions, pa.string())}  # fmt: skip
    for part, values in found.items():
        kind = schema.field(f"{part}_embedding").type
        flat = pa.array(values.astype(kind.value_type.to_pandas_dtype()).reshape(-1))
        columns[f"{part}_embedding"] = pa.FixedSizeListArray.from_arrays(flat, values.shape[1]).cast(kind)
    arrays = [columns[field.name] if field.name in columns else pa.nulls(len(keys), field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema)


@contextlib.contextmanager
def open_parquet(target: Path, schema: pa.Schema) -> Iterator[Callable[[pa.Table], None]]:
    """A function that takes tables, for a file at ``target`` that appears when all of it is written and not before.

    Raises:
        UserError: nothing can be written there.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    pending: list[pa.Table] = []

    def write(table: pa.Table | None) -> None:
        pending.extend([] if table is None else [table])
        if pending and (table is None or sum(map(len, pending)) >= ROW_GROUP):
            writer.write_table(pa.concat_tables(pending).combine_chunks())
            pending.clear()

    # Vectors do not repeat: no dictionary.
    with whole_file(target, "wb") as file, pq.ParquetWriter(file, schema, use_dictionary=False) as writer:
        yield write
        write(None)


def check_args(args: Args) -> None:
    """UserError for what can be wrong before anything is loaded."""
    check_ranges(args, cache_gb=(0, 1e6))
    if args.input is None and args.texts is None:
        raise UserError("nothing to embed: name INPUT (images, shards or a table), or a text file with --texts")
    target = Path(args.output)
    if target.is_dir():
        raise UserError(f"--output {target}: is a folder; name a file")
    read = [Path(name) for name in (args.input, args.texts) if name and Path(name).exists()]
    if target.exists() and any(target.samefile(path) for path in read):
        raise UserError(f"--output {target}: would replace the file that is read; name another")
    if target.exists() and not args.overwrite:
        raise UserError(f"--output {target} exists: --overwrite replaces it")


def main() -> None:
    args = parse_args(Args, {})
    check_args(args)

    from accelerando.data.collate import PairCollate

    quiet_libraries()
    sources = open_sources(args)
    model, preprocessing = load_model(args)
    pairs = PairCollate(preprocessing.tokenizer, preprocessing.max_length, full_length=preprocessing.full_length)
    schema = make_schema(sources, args, model, preprocessing, SampleCollate(pairs))
    total, rows, left_out = sum(map(len, sources)), 0, 0
    named: list[str] = []
    started = reported = time.perf_counter()
    with open_parquet(Path(args.output), schema) as write, progress_bar(total, 0, " rows", "embedding") as bar:
        for source in sources:
            for table, faults in embedded(source, model, preprocessing, SampleCollate(pairs), schema, args):
                write(table)
                rows, left_out = rows + len(table), left_out + len(faults)
                named += faults[: NAMED - len(named)]
                bar.update(len(table) + len(faults))
                if bar.disable and time.perf_counter() - reported > 30:
                    reported = time.perf_counter()
                    speed = rows / (reported - started)
                    print(f"embedding: {rows + left_out:,} of {total:,} rows, {speed:,.0f} samples/s", flush=True)
        if not rows:
            raise UserError(f"{args.input}: none of its {total:,} rows can be read, the first one is {named[0]}")
    seconds = time.perf_counter() - started

    print_first(named, "left out", NAMED, left_out)
    missing = f", {left_out:,} left out" if left_out else ""
    dimension = int(schema.metadata[b"dimension"])
    print(f"{rows:,} rows{missing}, dimension {dimension}, {rows / seconds:,.1f} samples/s: {args.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the draft is cleared away
    with errors_in_one_line():
        main()
