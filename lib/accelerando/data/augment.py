"""Texts with a few words replaced, inserted, moved or deleted (EDA: Wei and Zou 2019, arXiv:1901.11196).

What is changed depends only on a seed and a key (the row and its epoch, or the number of its copy): it is the same on
any number of processes, with any number of reading processes, and after a resume.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np

from accelerando.base.errors import UserError
from accelerando.data.digest import digest
from accelerando.data.tokens import TokenTable, encode_texts
from accelerando.data.windows import Windows
from accelerando.data.words import STOP_WORDS, Words, split_words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from accelerando.data.tables import TextTable

Technique = Literal["synonym", "insert", "swap", "delete"]
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)
NEED_SYNONYMS = ("synonym", "insert")


@dataclass(frozen=True)
class Change:
    """A changed text, the number of words of its source, and how many of them were changed (0: it is the source)."""

    text: str
    words: int
    changed: int


@dataclass(frozen=True)
class TextAugmentation:
    """Changes a share of a text's words by one of ``techniques``, drawn for each text and key.

    synonym: words are replaced by synonyms; insert: synonyms of words stand at random places; swap: words change
    places with each other; delete: words are left out, but never all. ``rate`` is the share of a text's words that are
    changed: ``max(1, round(rate * words))``, for swap at least 2, or as many as can be. A technique that cannot change
    a text gives way to the next of ``techniques``: so a text stays as it is only if none of them applies.

    Stop words and the words in ``keep`` are never replaced, deleted or inserted, and change places only where there
    are no two other words. Placeholders and the like (see :func:`data.words.split_words`) stay where they are.
    ``synonyms``: casefolded word -> its synonyms; ``insert`` and ``synonym`` draw from them evenly.

    Raises:
        UserError: no technique, or an unknown one; ``rate`` is not in (0, 1].
    """

    techniques: tuple[Technique, ...] = TECHNIQUES
    rate: float = 0.1
    synonyms: Mapping[str, Sequence[str]] = field(default_factory=dict, repr=False)
    seed: int = 0
    keep: Collection[str] = ()

    def __post_init__(self) -> None:
        if unknown := [name for name in self.techniques if name not in TECHNIQUES]:
            raise UserError(f"technique {unknown[0]!r} of augmentation: choose from {', '.join(TECHNIQUES)}")
        if not self.techniques:
            raise UserError(f"no technique of augmentation: choose from {', '.join(TECHNIQUES)}")
        if not 0 < self.rate <= 1:
            raise UserError(f"a rate of augmentation of {self.rate}: a share of the words, above 0 and at most 1")

    def __call__(self, text: str, *key: int) -> str:
        """``text`` as changed for ``key``; the text itself if no technique can change it."""
        return self.change(text, *key).text

    def change(self, text: str, *key: int) -> Change:
        """The text as changed for ``key``, with the number of its words, and of those that were changed."""
        words = split_words(text)
        total = len(words.words)
        rng = generator(self.seed, *key)
        number = max(1, round(self.rate * total))
        for technique in rng.permutation(np.array(self.techniques)):
            if changed := self._apply(str(technique), words, number, rng):
                return Change(words.joined(), total, changed)
        return Change(text, total, 0)

    def digest(self) -> str:
        """A digest of the synonyms."""
        return digest("\n".join(f"{word}:{'|'.join(others)}" for word, others in sorted(self.synonyms.items())))

    def _apply(self, technique: str, words: Words, number: int, rng: np.random.Generator) -> int:
        """Changes about ``number`` of ``words`` and says how many; 0 if the technique does not apply."""
        free = [place for place in words.words if not self._is_kept(words.tokens[place])]
        if technique == "swap":
            return self._swap(words, free, number, rng)
        if technique == "delete":
            chosen = rng.permutation(np.array(free, np.int64))[: min(number, len(words.words) - 1)].tolist()
            for place in sorted(chosen, reverse=True):
                words.delete(place)
            return len(chosen)
        others = {place: self._synonyms_of(words.tokens[place]) for place in free}
        known = [place for place in free if others[place]]
        if not known:
            return 0
        if technique == "synonym":
            chosen = rng.permutation(known)[:number].tolist()
            for place in chosen:
                words.tokens[place] = _capitalised_like(words.tokens[place], _one_of(others[place], rng))
            return len(chosen)
        sources = np.resize(rng.permutation(known), number).tolist()  # again from the first if there are too few
        inserted = [_one_of(others[place], rng) for place in sources]
        for place in sorted(rng.choice(words.words, number).tolist(), reverse=True):
            words.insert(place, inserted.pop())
        return number

    def _swap(self, words: Words, free: list[int], number: int, rng: np.random.Generator) -> int:
        """Moves words so that each of them takes the place of another one."""
        names = {place: words.tokens[place].casefold() for place in words.words}
        if len({names[place] for place in free}) < 2:
            always = {word.casefold() for word in self.keep}
            free = [place for place in words.words if names[place] not in always]
        number = max(2, number)
        # A word that stands on more than half of the places could not leave all of them.
        chosen: list[int] = []
        for most in range(number // 2, 0, -1):
            counts: Counter[str] = Counter()
            chosen = []
            for place in rng.permutation(np.array(free, np.int64)).tolist():
                if counts[names[place]] < most and len(chosen) < number:
                    counts[names[place]] += 1
                    chosen.append(place)
            if chosen and max(counts.values()) <= len(chosen) // 2:
                break
        else:
            return 0
        # Sorted by word, and moved on by the number of the most frequent one, no word meets itself.
        rank = {name: turn for turn, name in enumerate(rng.permutation(sorted(counts)).tolist())}
        chosen.sort(key=lambda place: rank[names[place]])
        shift = max(counts.values())
        moved = [words.tokens[place] for place in chosen]
        for place, word in zip(chosen, moved[shift:] + moved[:shift], strict=True):
            words.tokens[place] = word
        return len(chosen)

    def _is_kept(self, word: str) -> bool:
        return len(word) < 2 or word.casefold().replace("’", "'") in self._kept

    def _synonyms_of(self, word: str) -> list[str]:
        name = word.casefold()
        return [one for one in self.synonyms.get(name, ()) if one.casefold() != name and not self._is_kept(one)]

    @cached_property
    def _kept(self) -> frozenset[str]:
        return STOP_WORDS | {word.casefold() for word in self.keep}


def generator(seed: int, *key: int) -> np.random.Generator:
    """Random numbers that depend on ``seed`` and all numbers of ``key``, trailing zeros included."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _one_of(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _capitalised_like(old: str, new: str) -> str:
    """``new`` in capitals, or with a capital, where ``old`` is; otherwise as it stands."""
    if len(old) > 1 and old.isupper():
        return new.upper()
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


@dataclass
class AugmentedTexts:
    """The training rows of ``tokens``, of which a ``share`` is changed in each epoch; a data set that takes the epoch.

    A changed row is tokenized when it is drawn, all others come from ``tokens``. ``table`` has the texts of ``tokens``;
    of pairs both texts are changed.
    """

    table: TextTable
    tokens: TokenTable
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    augmentation: TextAugmentation
    share: float = 0.5
    windows: Windows | None = None  # of long texts
    unit: ClassVar[str] = "rows"

    def __len__(self) -> int:
        return len(self.tokens)

    def at(self, row: int, epoch: int, draw: int = 0) -> dict[str, Any]:
        """The sample ``row`` in ``epoch``, as :class:`TokenTable` has it, changed or not."""
        sample, changed = self.tokens[row], self.changed(row, epoch, draw)
        if changed is None:
            return sample
        how = {"max_length": self.max_length, "windows": self.windows}
        encoded = encode_texts(self.tokenizer, *([text] for text in changed), **how)
        sample["input_ids"] = np.asarray(encoded["input_ids"][0], np.int32)
        if self.tokens.types is not None:
            sample["token_type_ids"] = np.asarray(encoded["token_type_ids"][0], np.uint8)
        return sample

    def changed(self, row: int, epoch: int, draw: int = 0) -> list[str] | None:
        """The text of a row (and its pair) as changed in ``epoch``; None: it is as it was."""
        key = (row, epoch, draw)
        if generator(self.augmentation.seed, *key).random() >= self.share:
            return None
        columns = [self.table.texts, *([] if self.table.pairs is None else [self.table.pairs])]
        sources = [column[row].as_py() for column in columns]
        changed = [self.augmentation(text, *key, 1 + number) for number, text in enumerate(sources)]
        return changed if changed != sources else None

    def __getitem__(self, row: int) -> dict[str, Any]:
        """The sample ``row`` unchanged."""
        return self.tokens[row]

    def digest(self) -> dict[str, str]:
        """See :class:`data.digest.Digested`: that of the rows, and of the synonyms."""
        return {**self.tokens.digest(), "synonyms": self.augmentation.digest()}
