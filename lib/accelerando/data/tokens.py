"""Tokenized text, packed into memory-mapped arrays and cached, without a Python object per text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.files import cache_folder, derived, whole_folder
from accelerando.base.log import log, progress_bar
from accelerando.data.digest import digest
from accelerando.data.windows import Windows, joined_windows, tokens_beyond

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

    from accelerando.data.tables import TextTable

CHUNK = 4096  # texts tokenized at a time


@dataclass(frozen=True)
class TokenTable:
    """Packed token ids of n texts; a map-style data set of ``{"input_ids", ("token_type_ids"), "label"}``.

    ``ids`` int32 [tokens] has the texts one after another, of a long text its windows (:mod:`data.windows`);
    ``offsets`` int64 [n + 1] says where they begin; ``types``
    uint8 [tokens] exists for pairs of texts, and for a tokenizer that gives single ones types other than 0; ``labels``
    int64 [n], or float32 [n, C] of several labels or numbers, may be None. ``columns``: additional columns, [n] each,
    in samples and batches under their names.
    """

    ids: np.ndarray
    offsets: np.ndarray
    types: np.ndarray | None = None
    labels: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    cut: tuple[int, int] = (0, 0)  # tokens beyond the longest length, and texts that have such
    unit: ClassVar[str] = "rows"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens of each text, in all of its windows, int64 [n]."""
        return np.diff(self.offsets)

    def __getitem__(self, row: int) -> dict[str, Any]:
        part = slice(self.offsets[row], self.offsets[row + 1])
        sample: dict[str, Any] = {"input_ids": self.ids[part]}
        if self.types is not None:
            sample["token_type_ids"] = self.types[part]
        if self.labels is not None:
            sample["label"] = self.labels[row]
        return sample | {name: values[row] for name, values in self.columns.items()}

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: another tokenizer makes other tokens of the same texts."""
        further = {name: digest(values) for name, values in self.columns.items()}
        return {"texts or tokens": digest(self.ids, self.offsets, self.types), "labels": digest(self.labels), **further}


def tokenize_table(
    table: TextTable,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    labels: np.ndarray | None = None,
    cache: Path | None = None,
    windows: Windows | None = None,
) -> TokenTable:
    """Tokenizes ``table``, or maps the result of an earlier run with the same texts and tokenizer from ``cache``.

    Texts of more than ``max_length`` tokens are cut off, or become ``windows`` of that size.

    Raises:
        UserError: ``cache`` cannot be written to, or has too little space; the windows cannot be made.
    """

    def read(folder: Path) -> TokenTable:
        types, cut = folder / "types.npy", folder / "cut.npy"
        found = TokenTable(
            ids=np.load(folder / "ids.npy", mmap_mode="r", allow_pickle=False),
            offsets=np.load(folder / "offsets.npy", allow_pickle=False),
            types=np.load(types, mmap_mode="r", allow_pickle=False) if types.is_file() else None,
            labels=labels,
            columns=table.columns,
            cut=tuple(np.load(cut, allow_pickle=False).tolist()) if cut.is_file() else (0, 0),
        )
        if len(found) != len(table) or len(found.ids) != found.offsets[-1]:
            raise ValueError("ids.npy and offsets.npy do not agree")
        return found

    target = (cache or cache_folder()) / "tokens" / _fingerprint(table, tokenizer, max_length, windows)
    return derived(target, read, lambda target: _write(target, table, tokenizer, max_length, windows))


def warn_of_cut_texts(tables: Mapping[str, TokenTable], max_length: int, windows: Windows | None = None) -> None:
    """Says which share of the tokens of each split is not seen, where it is at least one in a thousand."""
    what = f"--max_length {max_length} cuts" if windows is None else f"--max_windows {windows.most} cut"
    for split, table in tables.items():
        tokens, texts = table.cut
        seen = len(table.ids)
        if windows is not None:
            seen -= windows.repeated * int((-(-table.lengths // windows.size) - 1).sum())
        share = tokens / max(1, tokens + seen)
        if share >= 0.001:
            rows = 100 * texts / len(table)
            log.warning("%s off %.1f %% of the tokens of %s, in %.1f %% of its rows", what, 100 * share, split, rows)


def encode_texts(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None = None,
    *,
    max_length: int,
    windows: Windows | None = None,
) -> Mapping[str, list[list[int]]]:
    """``input_ids`` (and ``token_type_ids``) of each text, or pair of texts, as a :class:`TokenTable` has them.

    Raises:
        UserError: ``windows`` cannot be made.
    """
    encoded = _encoded(tokenizer, texts, pairs, max_length, windows)
    return encoded if windows is None else joined_windows(encoded, windows.most)


def _encoded(
    tokenizer: PreTrainedTokenizerBase,
    texts: list[str],
    pairs: list[str] | None,
    max_length: int,
    windows: Windows | None,
) -> BatchEncoding:
    how = {"truncation": True, "return_attention_mask": False}
    if windows is None:
        return tokenizer(texts, pairs, max_length=max_length, **how)
    if pairs is not None:
        raise UserError("--window_stride is for single texts: pairs of texts have no windows")
    return tokenizer(texts, max_length=windows.size, stride=windows.overlap(tokenizer), **how)


def _fingerprint(table: TextTable, tokenizer: PreTrainedTokenizerBase, max_length: int, windows: Windows | None) -> str:
    digest = hashlib.sha256()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        rules = json.loads(backend.to_str())
        # These are settings of the last call, not of the tokenizer.
        rules["truncation"] = rules["padding"] = None
        digest.update(json.dumps(rules).encode())
    else:
        digest.update(repr(tokenizer).encode())
    digest.update(json.dumps([max_length, tokenizer.model_input_names, table.pairs is not None]).encode())
    if windows is not None:
        digest.update(json.dumps(vars(windows)).encode())
    for texts, pairs in _chunks(table):
        digest.update(json.dumps([texts, pairs], ensure_ascii=False).encode())
    return digest.hexdigest()[:32]


def _write(
    target: Path, table: TextTable, tokenizer: PreTrainedTokenizerBase, max_length: int, windows: Windows | None
) -> None:
    lengths: list[np.ndarray] = []
    cut = np.zeros(2, np.int64)
    typed = False  # most tokenizers give single texts the type 0 alone
    with whole_folder(target) as draft:
        draft.mkdir()
        files = {name: draft / f"{name}.bin" for name in ("ids", "types")}
        with open(files["ids"], "wb") as ids_file, open(files["types"], "wb") as types_file:
            progress = progress_bar(len(table), 0, " texts", "tokenizing")
            for texts, pairs in _chunks(table):
                encoded = _encoded(tokenizer, texts, pairs, max_length, windows)
                cut += _cut_off(encoded) if windows is None else tokens_beyond(encoded, windows)
                encoded = encoded if windows is None else joined_windows(encoded, windows.most)
                lengths.append(np.array([len(row) for row in encoded["input_ids"]], dtype=np.int64))
                np.concatenate([np.asarray(row, dtype=np.int32) for row in encoded["input_ids"]]).tofile(ids_file)
                if "token_type_ids" in encoded:
                    types = np.concatenate([np.asarray(row, dtype=np.uint8) for row in encoded["token_type_ids"]])
                    typed = typed or pairs is not None or bool(types.any())
                    types.tofile(types_file)
                progress.update(len(texts))
            progress.close()
        for (name, file), dtype in zip(files.items(), (np.int32, np.uint8), strict=True):
            if file.stat().st_size and (name == "ids" or typed):
                np.save(draft / f"{name}.npy", np.memmap(file, dtype=dtype, mode="r"), allow_pickle=False)
            file.unlink()
        offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
        np.save(draft / "offsets.npy", offsets, allow_pickle=False)
        np.save(draft / "cut.npy", cut, allow_pickle=False)


def _cut_off(encoded: BatchEncoding) -> tuple[int, int]:
    """Tokens beyond the longest length, and texts that have such; 0 for a tokenizer that is written in Python."""
    cut = [row for row in encoded.encodings or [] if row.overflowing]
    tokens = 0
    for row in cut:
        if row.n_sequences == 1:
            tokens += sum(len(part.ids) - sum(part.special_tokens_mask) for part in row.overflowing)
        else:  # the rest of one text comes again with each part of the other
            kept = set(zip(row.sequence_ids, row.offsets, strict=True))
            rest = {place for part in row.overflowing for place in zip(part.sequence_ids, part.offsets, strict=True)}
            tokens += sum(sequence is not None for sequence, _ in rest - kept)
    return tokens, len(cut)


def _chunks(table: TextTable) -> Iterator[tuple[list[str], list[str] | None]]:
    for start in range(0, len(table), CHUNK):
        pairs = table.pairs.slice(start, CHUNK).to_pylist() if table.pairs is not None else None
        yield table.texts.slice(start, CHUNK).to_pylist(), pairs
