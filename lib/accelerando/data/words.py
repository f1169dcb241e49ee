"""A text as words and what stands between them, so that single words can be changed."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 65_536  # texts split at a time

# English words of grammar, negations and modal verbs among them, without which a sentence says something else.
_ENGLISH = """
a about above after again against ain't all also am an and any are aren't as at be because been before being below
between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each either else
ever every few for from further had hadn't has hasn't have haven't having he he'd he'll he's her here hers herself him
himself his how i i'd i'll i'm i've if in into is isn't it it'd it'll it's its itself just less let's may me might
mightn't more most must mustn't my myself needn't neither never no nobody none nor not nothing nowhere of off on once
only or other ought our ours ourselves out over own same shall shan't she she'd she'll she's should shouldn't so some
such than that that's the their theirs them themselves then there there's these they they'd they'll they're they've this
those through to too under until unless up upon us very was wasn't we we'd we'll we're we've were weren't what what's
when where which while who who's whom whose why will with within without won't would wouldn't yet you you'd you'll
you're you've your yours yourself yourselves
"""
STOP_WORDS = frozenset(_ENGLISH.split())

# Placeholders in brackets ([FIRST NAME], <url>, {x}) may contain spaces; what else stands between spaces is one piece.
_PIECE = re.compile(r"\[[^\[\]\n]{1,60}\]|<[^<>\n]{1,200}>|\{[^{}\n]{1,60}\}|[^\s\[<{]+|[\[<{]")
# What begins the name of a user or a variable; what addresses and numbers have in them.
_KEPT = re.compile(r"[@#$%&~]|.*[\d_@/\\=]")


@dataclass
class Words:
    """``tokens``, with ``gaps[i]`` before token i and one gap after the last; ``words`` are the places of words."""

    gaps: list[str]
    tokens: list[str]
    words: list[int]

    def joined(self) -> str:
        """The text."""
        return "".join(part for pair in zip(self.gaps, [*self.tokens, ""], strict=True) for part in pair)

    def insert(self, place: int, word: str) -> None:
        """Puts ``word`` before the token at ``place``; ``words`` no longer holds afterwards."""
        self.gaps[place] = self.gaps[place] or " " * (place > 0)
        self.tokens.insert(place, word)
        self.gaps.insert(place + 1, " ")

    def delete(self, place: int) -> None:
        """Leaves out the token at ``place`` and a space or comma next to it; ``words`` no longer holds afterwards."""
        del self.tokens[place]
        before, after = self.gaps[place], self.gaps.pop(place + 1)
        if not before.strip() and place == 0:
            after = after.lstrip(" \t\r\n,;:")
        elif after or place == len(self.tokens):  # otherwise the next token stands there
            before = before.rstrip(" \t\r\n,;:" if after[:1] in ".!?,;:" else None)
        self.gaps[place] = before + after


def split_words(text: str) -> Words:
    """``text`` as words and the rest; ``joined()`` gives it back unchanged.

    A word stands between spaces, less the punctuation around it, and consists of letters, apostrophes and hyphens. Not
    words, but tokens that nothing changes: placeholders in brackets, addresses, @names, #tags, numbers, and whatever
    has digits, slashes or punctuation within.
    """
    gaps, tokens, words, end = [], [], [], 0
    for found in _PIECE.finditer(text):
        piece, start = found[0], found.start()
        left, right = (0, len(piece)) if piece.isalpha() else _core(piece)
        if left == right or piece in "[<{":  # punctuation, a bracket that is not closed
            continue
        is_plain = piece[0] not in "[<{" and not _KEPT.match(piece, max(0, left - 1))
        if piece.isalpha() or (is_plain and _is_word(piece[left:right])):
            words.append(len(tokens))
        else:
            left, right = 0, len(piece)
        gaps.append(text[end : start + left])
        tokens.append(piece[left:right])
        end = start + right
    return Words([*gaps, text[end:]], tokens, words)


def distinct_words(*columns: pa.ChunkedArray | None) -> set[str]:
    """The casefolded words of all texts in columns of strings, as :func:`split_words` finds them."""
    import pyarrow.compute as pc

    pieces: set[str] = set()
    for column in columns:
        for start in range(0, len(column) if column is not None else 0, CHUNK):
            part = pc.utf8_split_whitespace(column.slice(start, CHUNK))
            pieces.update(pc.list_flatten(part).unique().to_pylist())
    return {word for piece in pieces for word in _words_in(piece)}


def _words_in(piece: str) -> Iterator[str]:
    found = split_words(piece)
    return (found.tokens[place].casefold() for place in found.words)


def _core(piece: str) -> tuple[int, int]:
    """Where a piece begins and ends without the punctuation around it."""
    left, right = 0, len(piece)
    while left < right and not _is_letter(piece[left]) and not piece[left].isdigit():
        left += 1
    while right > left and not _is_letter(piece[right - 1]) and not piece[right - 1].isdigit():
        right -= 1
    return left, right


def _is_word(core: str) -> bool:
    return core.isalpha() or all(_is_letter(sign) or sign in "'’-‐\u200c\u200d" for sign in core)


def _is_letter(sign: str) -> bool:
    return sign.isalpha() or unicodedata.category(sign)[0] == "M"
