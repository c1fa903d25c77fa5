"""Whether a reference model reads the data's tokens: else its cross entropies are noise."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from wmtp.data.tokenizer import load_tokenizer
from wmtp.trainers.config import ConfigError

# Words, digits, code, white space, and bytes that few vocabularies have whole.
PROBE = "The first test: naïve café, 1234567 x_1 = f(y)\n\treturn None  # 你好 🙂"
PROBED = 2000  # tokens, at most


class Reader(NamedTuple):
    """What is compared of a tokenizer."""

    vocabulary: dict[str, int]
    encode: Callable[[str], list[int]]


def check_same_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Of the model in `folder`: its tokens must be those of the data, with the same ids.

    Raises:
        ConfigError: they are not, or there is no tokenizer to tell.
    """
    ours, theirs = _reader(tokenizer), _reader_in(folder)
    same_ids = ours.vocabulary.items() <= theirs.vocabulary.items()
    probe = PROBE + _of_its_own_tokens(tokenizer)
    if not same_ids or ours.encode(probe) != theirs.encode(probe):
        file = folder / "tokenizer.json"
        remedy = f"pass --tokenizer {file}" if file.is_file() else "pass its tokenizer.json"
        raise ConfigError(
            f"the reference in {folder} has another tokenizer than the training data: {remedy}"
        )


def _of_its_own_tokens(tokenizer: Tokenizer) -> str:
    """Text that the merges of this vocabulary say something about."""
    ids = sorted(tokenizer.get_vocab().values())
    return tokenizer.decode(ids[:: 1 + len(ids) // PROBED])


def _reader(tokenizer: Tokenizer) -> Reader:
    return Reader(
        tokenizer.get_vocab(with_added_tokens=True),
        lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
    )


def _reader_in(folder: Path) -> Reader:
    file = folder / "tokenizer.json"
    if file.is_file():
        return _reader(load_tokenizer(file))
    try:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (ImportError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(
            f"the reference in {folder} has no tokenizer that could be compared with the training "
            "data's: put its tokenizer.json there"
        ) from error
    return Reader(
        tokenizer.get_vocab(), lambda text: tokenizer.encode(text, add_special_tokens=False)
    )
