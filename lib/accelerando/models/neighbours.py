"""Words that are close to each other in a model's input embedding: synonyms where there is no table of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from accelerando.base.errors import UserError
from accelerando.base.files import cache_folder, derived, open_whole
from accelerando.base.log import log, progress_bar
from accelerando.data.augment import NEED_SYNONYMS
from accelerando.data.digest import file_stamps
from accelerando.data.synonyms import read_synonyms
from accelerando.data.tokenizer import open_tokenizer
from accelerando.data.words import STOP_WORDS, distinct_words
from accelerando.models.pretrained import open_config, open_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from accelerando.data.synonyms import Synonyms
    from accelerando.data.tables import TextTable

BLOCK = 512  # words whose neighbours are computed at a time
NUM_NEIGHBOURS = 8
# Below it, neighbours of BERT and its like are rarely related; of inflected forms it is far above.
MIN_COSINE = 0.5


def synonyms_of_texts(
    table: TextTable,
    techniques: Collection[str],
    source: str | None,
    model: str | None,
    min_cosine: float = MIN_COSINE,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> Synonyms:
    """The synonyms that ``techniques`` of augmentation need, of those words that ``table`` has.

    They come from ``source``, a table or a folder of WordNet, or else from the embedding of ``model``.

    Raises:
        UserError: there is no such source or model, or no technique can be used for want of synonyms.
    """
    needing = [name for name in techniques if name in NEED_SYNONYMS]
    if not needing:
        return {}
    words = distinct_words(table.texts, table.pairs)
    if source:
        found = read_synonyms(source)
    elif model:
        found = embedding_neighbours(model, words, NUM_NEIGHBOURS, min_cosine, cache, trust_remote_code)
    else:
        raise UserError(f"{' and '.join(needing)}: no synonyms; name a table or WordNet's folder with --synonyms")
    found = {word: found[word] for word in sorted(words) if word in found}
    origin = source or f"neighbours in the embedding of {model}"
    log.info("Synonyms: %s; %s of %s words have one", origin, f"{len(found):,}", f"{len(words):,}")
    if not found:
        message = f"{table.source}: no word of the texts has a synonym ({origin})"
        if len(needing) == len(techniques):
            raise UserError(f"{message}: name another source with --synonyms, or other techniques")
        log.warning("%s: %s without effect", message, " and ".join(needing))
    return found


def embedding_neighbours(
    model: str,
    words: Collection[str],
    num: int = NUM_NEIGHBOURS,
    min_cosine: float = MIN_COSINE,
    cache: Path | None = None,
    trust_remote_code: bool = False,
) -> Synonyms:
    """The ``num`` nearest neighbours, nearest first, of those ``words`` (casefolded) that are single tokens.

    ``model`` is a folder or a name on the Hub; what is found is kept in ``cache``. See :func:`neighbours_in`.

    Raises:
        UserError: the model cannot be opened, has no embedding of tokens, or its tokens are no words.
    """
    settings = [_stamp(model, trust_remote_code), num, min_cosine, sorted(words)]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:32]

    def read(path: Path) -> Synonyms:
        return {word: tuple(others) for word, others in json.loads(path.read_text(encoding="utf-8")).items()}

    def make(path: Path) -> None:
        tokenizer = open_tokenizer(model, trust_remote_code)
        found = neighbours_in(input_embedding(model, trust_remote_code), tokenizer, words, num, min_cosine)
        with open_whole(path) as file:
            json.dump(found, file, ensure_ascii=False)

    return derived((cache or cache_folder()) / "neighbours" / f"{key}.json", read, make)


def input_embedding(name: str, trust_remote_code: bool = False) -> np.ndarray:
    """The input embedding of the model ``name``, float32 [V, D].

    Raises:
        UserError: the model cannot be opened, or has none.
    """
    from transformers import AutoModel

    config, settings = open_config(name, trust_remote_code), {"trust_remote_code": trust_remote_code}
    model = open_model(AutoModel, name, config, new_head=False, new_pooler=True, **settings)
    try:
        weight = model.get_input_embeddings().weight
    except (NotImplementedError, AttributeError):
        weight = None
    if weight is None or weight.ndim != 2:
        raise UserError(f"{name}: no embedding of tokens to find similar words in: name a table with --synonyms")
    return weight.detach().numpy()


def neighbours_in(
    embedding: np.ndarray, tokenizer: PreTrainedTokenizerBase, words: Collection[str], num: int, min_cosine: float
) -> Synonyms:
    """The ``num`` nearest neighbours of each of ``words`` in ``embedding`` [V, D], by cosine, at least ``min_cosine``.

    Neighbours are other whole words of the vocabulary, see :func:`whole_words`, however rare. Words that are no single
    token, or have no such neighbour, are left out.
    """
    ids, names = whole_words(tokenizer, len(embedding))
    vectors = embedding[ids].astype(np.float32)
    vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    # Of tokens that differ in their capitals alone, the small one stands for the word.
    first: dict[str, int] = {}
    for number in sorted(range(len(names)), key=lambda number: (names[number] != names[number].casefold(), number)):
        first.setdefault(names[number].casefold(), number)
    asked = sorted(word for word in words if word in first)
    found: Synonyms = {}
    candidates = min(len(names), 4 * num + 4)  # more than are wanted: some are the word itself in capitals
    progress = progress_bar(len(asked), 0, " words", "similar words")
    for start in range(0, len(asked), BLOCK):
        part = asked[start : start + BLOCK]
        cosines = vectors[[first[word] for word in part]] @ vectors.T
        nearest = np.argpartition(-cosines, candidates - 1, axis=1)[:, :candidates]
        for row, (word, places) in enumerate(zip(part, nearest, strict=True)):
            places = places[np.lexsort((places, -cosines[row, places]))]
            kept = dict.fromkeys(names[first[names[place].casefold()]] for place in places
                                 if cosines[row, place] >= min_cosine)  # fmt: skip
            if others := [name for name in kept if name.casefold() != word][:num]:
                found[word] = tuple(others)
        progress.update(len(part))
    progress.close()
    return found


def whole_words(tokenizer: PreTrainedTokenizerBase, num_embeddings: int) -> tuple[np.ndarray, list[str]]:
    """Ids, int64 [n], and texts of the tokens that are whole words of two letters or more, without stop words.

    Of WordPiece those without ``##``, of BPE and SentencePiece those that begin with the sign for a space; special and
    added tokens are left out.

    Raises:
        UserError: the vocabulary has no such tokens, or does not tell words from their parts.
    """
    added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    vocabulary = {
        token: number
        for token, number in tokenizer.get_vocab().items()
        if token not in added and number < num_embeddings
    }
    # Ġ is a letter, too, and ## a sign of comments: the most frequent one counts.
    counts = {sign: sum(token.startswith(sign) for token in vocabulary) for sign in ("##", "Ġ", "▁")}
    sign = max(counts, key=lambda sign: counts[sign])
    tokens = [token for token in vocabulary if token.startswith(sign) != (sign == "##")] if counts[sign] else []
    sign = "" if sign == "##" else sign
    # The tokens of byte-level BPE are bytes, written as letters.
    texts = [tokenizer.convert_tokens_to_string([one]).strip() if sign == "Ġ" else one[len(sign) :] for one in tokens]
    found = sorted(
        (vocabulary[token], text)
        for token, text in zip(tokens, texts, strict=True)
        if len(text) > 1 and text.isalpha() and text.casefold() not in STOP_WORDS
    )
    if not found:
        raise UserError("the tokens are no whole words, of which similar ones could be found: name a table, --synonyms")
    return np.array([number for number, _ in found], np.int64), [text for _, text in found]


def _stamp(name: str, trust_remote_code: bool) -> str:
    """What changes with a model: the sizes and times of its files, or its revision on the Hub."""
    folder = Path(name)
    if folder.is_dir():
        kinds = (".safetensors", ".bin", ".json", ".txt", ".model")
        files = sorted(path.name for path in folder.iterdir() if path.suffix in kinds and path.is_file())
        return f"{folder.resolve()} {file_stamps(folder, files)}"
    return f"{name} {open_config(name, trust_remote_code)._commit_hash}"
