"""Synonyms from a table, or from the files of WordNet; data/README.md describes both.

Synonyms are a dict: casefolded word -> other words, the best first. A word is found as it is written: ``dogs`` is not
``dog``, so that what replaces a word has its form wherever the table has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from accelerando.base.errors import UserError
from accelerando.base.model_folder import read_json
from accelerando.data.table_formats import check_table, read_parquet, table_records, table_suffix

WORD = "word"  # the column of the words
PARTS = ("noun", "verb", "adj", "adv")  # the parts of speech of WordNet's files

Synonyms = dict[str, tuple[str, ...]]


def read_synonyms(source: str) -> Synonyms:
    """The synonyms in a table, or in a folder of WordNet (``data.noun``, ``index.noun``, ..., or ``dict/`` with them).

    A table is CSV, TSV, JSON, JSON lines or Parquet with the column ``word``; all other columns have synonyms, several
    in one separated by ``|`` (in JSON also as a list). A JSON object ``{"word": ["synonym", ...]}`` works too.

    Raises:
        UserError: there is no such file or folder, it is not such a table, a line or row is broken, or it is empty.
    """
    path = Path(source)
    if path.is_dir():
        pairs = _wordnet(path)
    elif table_suffix(path):
        check_table(path, "--synonyms")
        pairs = _table(path)
    else:
        kinds = "a table (.csv, .tsv, .json, .jsonl, .parquet) or a folder of WordNet"
        raise UserError(f"--synonyms {path}: {'not' if path.exists() else 'no such file:'} {kinds}")
    found: dict[str, dict[str, None]] = {}  # the inner dicts are ordered sets
    for word, others in pairs:
        kept = found.setdefault(word.casefold(), {})
        kept.update(dict.fromkeys(other for other in others if other.casefold() != word.casefold()))
    synonyms = {word: tuple(others) for word, others in found.items() if others}
    if not synonyms:
        raise UserError(f"{path}: no word with a synonym in it")
    return synonyms


# ---------------------------------------------------------------------------------------------------------------- table


def _table(path: Path) -> Iterator[tuple[str, list[str]]]:
    mapping = _mapping(path)
    if mapping is not None:
        for number, (word, others) in enumerate(mapping.items(), start=1):
            where = f"{path}: entry {number} ({word!r:.40})"
            yield _checked(word, where), _synonyms_in(others, where)
        return
    if table_suffix(path) == ".parquet":
        table = read_parquet(path)
        if WORD not in table.column_names:
            raise UserError(f"{path}: no column {WORD!r}; there are {', '.join(table.column_names)}")
        batches = (batch.to_pylist() for batch in table.to_batches())
        rows = (row for batch in batches for row in batch)
        records = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    else:
        records = table_records(path, [WORD])
    for place, record in records:
        where = f"{path}: {place}"
        if not isinstance(record, dict) or WORD not in record:
            raise UserError(f"{where}: expected {WORD!r} and synonyms, found {record!r:.60}")
        if len(record) < 2:
            raise UserError(f"{where}: no column of synonyms beside {WORD!r}")
        others = [other for name, cell in record.items() if name != WORD for other in _synonyms_in(cell, where)]
        yield _checked(record[WORD], where), others


def _mapping(path: Path) -> Mapping[str, object] | None:
    """The object in a JSON file that maps words to synonyms; None for any other table."""
    if path.suffix.lower() != ".json":
        return None
    try:
        content = read_json(path)
    except UserError:  # a list, JSON lines, or invalid, which the reader of tables says
        return None
    rows = [value for value in content.values() if isinstance(value, list) and any(isinstance(x, dict) for x in value)]
    return None if WORD in content or rows else content


def _checked(word: object, where: str) -> str:
    if not isinstance(word, str) or not word.strip():
        raise UserError(f"{where}: the word is {word!r:.40}" if word else f"{where}: the word is empty")
    return " ".join(word.split())


def _synonyms_in(cell: object, where: str) -> list[str]:
    """The synonyms in a cell: a text with ``|`` between them, a list of texts, or nothing."""
    parts = cell.split("|") if isinstance(cell, str) else [] if cell is None else cell
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        raise UserError(f"{where}: synonyms are texts, with | between them, or a list of texts; found {cell!r:.60}")
    return [" ".join(part.split()) for part in parts if part.strip()]


# -------------------------------------------------------------------------------------------------------------- WordNet


def _wordnet(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Words and synonyms in WordNet's files, as wndb(5WN) describes them: senses by their frequency."""
    place = next((place for place in (folder, folder / "dict") if (place / "data.noun").is_file()), folder)
    parts = [part for part in PARTS if (place / f"data.{part}").is_file()]
    if not parts:
        raise UserError(f"--synonyms {folder}: no data.noun in it; of WordNet, name the folder dict/")
    for part in parts:
        sets = dict(_synsets(place / f"data.{part}"))
        path = place / f"index.{part}"
        for line, fields in _fields(path):
            # lemma pos synset_cnt p_cnt [ptr_symbol ...] sense_cnt tagsense_cnt synset_offset [synset_offset ...]
            try:
                count = int(fields[2])
                offsets = fields[-count:]
                words = [word for offset in offsets for word in sets[offset]]
                if count < 1 or len(fields) < 6 + count:
                    raise ValueError
            except (ValueError, IndexError, KeyError):
                hint = f"expected a word and its sets in data.{part}"
                raise UserError(f"{path}: line {line}: {hint}, found {' '.join(fields)!r:.60}") from None
            yield fields[0].replace("_", " "), words


def _synsets(path: Path) -> Iterator[tuple[str, list[str]]]:
    """(offset, words) of each set of synonyms in a data file."""
    for line, fields in _fields(path):
        # synset_offset lex_filenum ss_type w_cnt word lex_id [word lex_id ...] p_cnt [ptr ...] [frames ...] | gloss
        try:
            count = int(fields[3], 16)
            words = fields[4 : 4 + 2 * count : 2]
            if not fields[0].isdigit() or len(words) < count:
                raise ValueError
        except (ValueError, IndexError):
            raise UserError(f"{path}: line {line}: not a set of WordNet's: {' '.join(fields)!r:.60}") from None
        # An adjective may have its position behind it: galore(ip).
        yield fields[0], [re.sub(r"\((?:a|p|ip)\)$", "", word).replace("_", " ") for word in words]


def _fields(path: Path) -> Iterable[tuple[int, list[str]]]:
    """(line number, fields) of a file of WordNet; the lines of its licence begin with a space."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip() and not line.startswith(" "):
                    yield number, line.split()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; unpack WordNet again") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason}); unpack WordNet again") from None
