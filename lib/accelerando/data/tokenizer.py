"""A tokenizer trained on the training text: WordPiece or byte-level BPE, the same file for the same texts, always."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal

from accelerando.base.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # ids 0 to 4
# Without any of these transformers may make an empty tokenizer instead of an error.
VOCABULARY_FILES = (
    "tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
CHUNK = 4096  # texts that are Python strings at one time
NO_LIMIT = int(1e30)  # what transformers writes for a tokenizer that cuts nothing


def open_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or under a name on the Hub; UserError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {name}: {first_line(error)}") from None


def train_tokenizer(
    texts: Iterable[str],
    kind: Literal["wordpiece", "bpe"],
    vocab_size: int,
    lowercase: bool = True,
    max_length: int | None = None,
) -> PreTrainedTokenizerFast:
    """A WordPiece (Wu et al. 2016, arXiv:1609.08144) or byte-level BPE (Radford et al. 2019) tokenizer of ``texts``.

    ``texts`` is any iterable of strings, or a pyarrow (chunked) string array, of which only ``CHUNK`` strings exist at
    one time; an iterator that can be read only once is packed into such an array first. [PAD] has id 0; a text becomes
    ``[CLS] a [SEP]``, a pair ``[CLS] a [SEP] b [SEP]`` (with ``token_type_ids`` for "wordpiece"). The vocabulary is
    smaller than ``vocab_size`` where the texts give no more. The same texts give a byte-identical ``tokenizer.json``
    in every process. ``lowercase`` also strips accents for "wordpiece", as BERT does. ``max_length`` is kept as
    ``model_max_length``.

    Raises:
        UserError: no text, a ``vocab_size`` too small to hold more than the special tokens (and, for BPE, all bytes).
    """
    from transformers import PreTrainedTokenizerFast

    if kind not in ("wordpiece", "bpe"):
        raise UserError(f"tokenizer type {kind!r}: choose wordpiece or bpe")
    smallest = len(SPECIAL_TOKENS) + (256 if kind == "bpe" else 3)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small for a {kind} tokenizer: give at least {smallest}")
    texts = _readable_twice(texts)
    tokenizer = (_train_wordpiece if kind == "wordpiece" else _train_bpe)(texts, vocab_size, lowercase)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS},
        model_input_names=["input_ids", *(["token_type_ids"] if kind == "wordpiece" else []), "attention_mask"],
        model_max_length=max_length or NO_LIMIT,
    )


def _train_wordpiece(texts: Any, vocab_size: int, lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def bare(vocabulary: dict[str, int]) -> Tokenizer:
        tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        # Written out, since None ("as lowercase says") is lost when BertTokenizer rebuilds the normaliser.
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        return tokenizer

    # The library numbers the "##x" characters in the order of a hash map, which differs from process to process, and
    # equally frequent merges are taken in the order of those numbers. So they are named here, in a fixed order.
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
    # Rebuilt from the vocabulary alone, because the trainer made the "##x" special tokens of the first one.
    tokenizer = bare(scratch.get_vocab(with_added_tokens=True))
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return _with_template(tokenizer)


def _train_bpe(texts: Any, vocab_size: int, lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    if next(iter(_strings(texts)), None) is None:
        raise UserError("no text to train a tokenizer on: check the training file")
    tokenizer = Tokenizer(models.BPE())
    unicode_form = [normalizers.NFC()]
    tokenizer.normalizer = normalizers.Sequence(unicode_form + [normalizers.Lowercase()] * lowercase)
    # A space before the first word makes it the same token there as elsewhere.
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


def _alphabet(texts: Any, normalizer: Any, limit: int) -> list[str]:
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
    """Whether ``character`` can stand inside a word: not punctuation, no Chinese sign, each of which is a word."""
    normalised = tokenizer.normalizer.normalize_str("a" + character)
    words = tokenizer.pre_tokenizer.pre_tokenize_str(normalised)
    return len(words) == 1 and len(words[0][0]) > 1


def _readable_twice(texts: Any) -> Any:
    if iter(texts) is not texts:
        return texts
    import pyarrow as pa

    chunks: list[Any] = []
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == CHUNK:
            chunks.append(pa.array(batch, pa.large_string()))
            batch.clear()
    return pa.chunked_array([*chunks, pa.array(batch, pa.large_string())])


def _strings(texts: Any) -> Iterator[str]:
    """``texts`` one by one as str; of a pyarrow array only ``CHUNK`` of them at a time. Nulls are left out."""
    if hasattr(texts, "to_pylist"):
        for start in range(0, len(texts), CHUNK):
            yield from (text for text in texts.slice(start, CHUNK).to_pylist() if text is not None)
    else:
        yield from texts
