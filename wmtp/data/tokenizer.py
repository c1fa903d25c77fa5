"""A byte-level BPE: every text has tokens, nothing is unknown, decoding gives the text back."""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from wmtp.data.corpus import DataError

# Stands between documents, so that the model sees where one ends.
END_OF_TEXT = "<|endoftext|>"
SMALLEST_VOCABULARY = 257
LARGEST_VOCABULARY = 2**31 - 1


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn `vocab_size` tokens (256 bytes, the end of text, and merges) from the texts.

    Raises:
        DataError: vocab_size below 257, or beyond what ids can be.
    """
    if not SMALLEST_VOCABULARY <= vocab_size <= LARGEST_VOCABULARY:
        raise DataError(
            f"vocab_size must be at least {SMALLEST_VOCABULARY} (every byte and the end of text) "
            f"and at most {LARGEST_VOCABULARY}, got {vocab_size}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(file: Path) -> Tokenizer:
    """Read a `tokenizer.json` of the tokenizers library.

    Raises:
        DataError: no such file, or not a tokenizer.
    """
    if not file.is_file():
        raise DataError(f"no tokenizer file {file}: pass a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise DataError(
            f"{file} is not a tokenizer.json of the tokenizers library: {error}"
        ) from error
    # Some files carry the padding and truncation of their model's inputs; a corpus wants neither.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    # A text that writes out a marker, the end of text for one, means its characters.
    tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(tokenizer: Tokenizer) -> int:
    """V, by the largest id: the ids of some tokenizers have holes."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_text_id(tokenizer: Tokenizer) -> int:
    """The id that separates documents: `<|endoftext|>` or a common name for it.

    Raises:
        DataError: the tokenizer has none of them.
    """
    names = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>", "[SEP]")
    for name in names:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    raise DataError(
        f"the tokenizer has none of {', '.join(names)} to put between documents: add one"
    )
