"""A tokenizer trained on the training texts: WordPiece or byte-level BPE; the same texts always give the same file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from accelerando.base.errors import UserError
from accelerando.base.model_folder import opening

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    Texts = Iterable[str] | pa.Array | pa.ChunkedArray

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
CHUNK = 4096  # texts held as Python strings at a time
NO_LIMIT = int(1e30)  # transformers' model_max_length for a tokenizer that does not truncate


def open_tokenizer(name: str, trust_remote_code: bool = False, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or under a name on the Hub.

    Raises:
        UserError: there is none, which transformers replaces by one that knows no word; or it is broken.
    """
    from transformers import AutoTokenizer

    with opening(name, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        tokenizer("a")  # which meets settings of a wrong kind
        words = tokenizer.get_vocab().keys() - {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    files = tokenizer.vocab_files_names  # none for a tokenizer of bytes
    there = {kind for kind, file in files.items() if (Path(name) / file).is_file()}
    whole = "tokenizer_file" in there or (there and {"merges_file"} & files.keys() <= there)
    if not words or (Path(name).is_dir() and files and not whole):
        wanted = " or ".join(files.values()) or "a vocabulary"
        raise UserError(f"{name}: no tokenizer beside the model ({wanted}); copy it from the base model")
    if isinstance(tokenizer.model_max_length, bool) or not isinstance(tokenizer.model_max_length, int):
        raise UserError(f"{name}: model_max_length in tokenizer_config.json is not a whole number")
    return tokenizer


def train_tokenizer(
    texts: Iterable[str],
    kind: Literal["wordpiece", "bpe"],
    vocab_size: int,
    lowercase: bool = True,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """A WordPiece (Wu et al. 2016, arXiv:1609.08144) or byte-level BPE (Radford et al. 2019) tokenizer of ``texts``.

    ``texts`` is any iterable of strings, or a pyarrow (chunked) string array, of which only ``CHUNK`` are converted to
    Python strings at a time; an iterator that can be read only once is packed into such an array first. [PAD] has id 0;
    a text becomes ``[CLS] a [SEP]``, a pair ``[CLS] a [SEP] b [SEP]`` (with ``token_type_ids`` for "wordpiece"). The
    vocabulary is smaller than ``vocab_size`` if the texts have too few distinct tokens. The same texts give a
    byte-identical ``tokenizer.json`` in every process. ``lowercase`` also strips accents for "wordpiece", as in BERT.
    ``max_length`` is saved as ``model_max_length``.

    Raises:
        UserError: no text, or ``vocab_size`` has no room beyond the special tokens (and, for BPE, all bytes).
    """
    from transformers import PreTrainedTokenizerFast

    if kind not in ("wordpiece", "bpe"):
        raise UserError(f"tokenizer type {kind!r}: choose wordpiece or bpe")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 3)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: use at least {smallest}")
    texts = _readable_twice(texts)
    tokenizer = (_train_wordpiece if kind == "wordpiece" else _train_bpe)(texts, vocab_size, lowercase)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        model_input_names=["input_ids", *(["token_type_ids"] if kind == "wordpiece" else []), "attention_mask"],
        model_max_length=max_length or NO_LIMIT,
    )


def _train_wordpiece(texts: Texts, vocab_size: int, lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def bare(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        # Explicit, since the default None (the same as lowercase) is lost when BertTokenizer rebuilds the normaliser.
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    # The library numbers the "##x" characters in the order of a hash map, which differs between processes, and breaks
    # ties between merges by these numbers. Listing them as special tokens fixes their order.
    scratch = bare({})
    alphabet = _alphabet(texts, scratch.normalizer, (vocab_size - len(SPECIAL_TOKENS)) // 3)
    continuing = ["##" + character for character in alphabet if _continues_words(character, scratch)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + continuing,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    scratch.train_from_iterator(_strings(texts), trainer)
    # Rebuilt from the vocabulary, because in the trained one the "##x" are special tokens.
    tokenizer = bare(scratch.get_vocab(with_added_tokens=True))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _with_template(tokenizer)


def _train_bpe(texts: Texts, vocab_size: int, lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if next(iter(_strings(texts)), None) is None:
        raise UserError("no text to train a tokenizer on: check the training file")
    tokenizer = Tokenizer(models.BPE())
    unicode_form = [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence(unicode_form + [normalizers.Lowercase()] * lowercase)
    # With a leading space, the first word of a text is tokenized like any other.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_strings(texts), trainer)
    return _with_template(tokenizer)


def _with_template(tokenizer: Tokenizer) -> Tokenizer:
    from tokenizers import processors

    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def _alphabet(texts: Texts, normalizer: Normalizer, limit: int) -> list[str]:
    """The ``limit`` most frequent characters after normalisation, in order of their code points."""
    counts: Counter[str] = Counter()
    found_text = False
    batch: list[str] = []
    for text in _strings(texts):
        found_text = True
        batch.append(text)
        if len(batch) == CHUNK:
            counts.update(normalizer.normalize_str("\n".join(batch)))
            batch.clear()
    counts.update(normalizer.normalize_str("\n".join(batch)))
    if not found_text:
        raise UserError("no text to train a tokenizer on: check the training file")
    kept = [character for character in counts if not character.isspace()]
    kept.sort(key=lambda character: (-counts[character], character))
    return sorted(kept[:limit])


def _continues_words(character: str, tokenizer: Tokenizer) -> bool:
    """True if ``character`` can be inside a word; punctuation marks and Chinese characters are words by themselves."""
    normalised = tokenizer.normalizer.normalize_str("a" + character)
    words = tokenizer.pre_tokenizer.pre_tokenize_str(normalised)
    return len(words) == 1 and len(words[0][0]) > 1


def _readable_twice(texts: Texts) -> Texts:
    if iter(texts) is not texts:
        return texts
    import pyarrow as pa

    chunks: list[pa.Array] = []
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == CHUNK:
            chunks.append(pa.array(batch, pa.large_string()))
            batch.clear()
    return pa.chunked_array([*chunks, pa.array(batch, pa.large_string())])


def _strings(texts: Texts) -> Iterator[str]:
    """``texts`` one by one as str, without nulls; a pyarrow array is converted in chunks of ``CHUNK``."""
    if hasattr(texts, "to_pylist"):
        for start in range(0, len(texts), CHUNK):
            yield from (text for text in texts.slice(start, CHUNK).to_pylist() if text is not None)
    else:
        yield from texts
