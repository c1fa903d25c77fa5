"""Tokenise a corpus once and keep the result: flat files of token ids, read through memory maps.

The cache is $WMTP_CACHE, or ~/.cache/wmtp. An entry is written under a temporary name and renamed
when it is whole, so a killed run leaves nothing that a later one would believe.
"""

import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer

from wmtp.data.batches import TokenDataset
from wmtp.data.corpus import Corpus, DataError, Document
from wmtp.data.tokenizer import end_of_text_id, load_tokenizer, train_tokenizer

FORMAT = "1"  # a part of every key: raise it when the files below change
DEFAULT_VOCABULARY = 8192
DOCUMENTS_AT_ONCE = 256


class PreparedData(NamedTuple):
    """A tokenised corpus.

    Attributes:
        train, validation: their batches.
        tokenizer: as used.
        fingerprint: of the corpus and the tokenizer together; equal means equal batches.
    """

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    fingerprint: str


def cache_folder() -> Path:
    """$WMTP_CACHE, or else ~/.cache/wmtp."""
    return Path(os.environ.get("WMTP_CACHE") or Path.home() / ".cache" / "wmtp")


def prepare_data(
    corpus: Corpus, *, vocab_size: int = DEFAULT_VOCABULARY, tokenizer_file: Path | None = None
) -> PreparedData:
    """Tokenise `corpus`, or find it tokenised in the cache.

    Args:
        corpus: from `find_corpus`.
        vocab_size: of the byte-level BPE that is trained on the training documents.
        tokenizer_file: a `tokenizer.json` to use instead.

    Raises:
        DataError: text or tokenizer unusable, or rewards on some documents and not on others.
    """
    cache = cache_folder()
    tokenizer_file = tokenizer_file or _trained_tokenizer(corpus, vocab_size, cache)
    tokenizer = load_tokenizer(tokenizer_file)
    key = _key("tokens", corpus.fingerprint(), tokenizer.to_str())
    folder = cache / f"tokens-{key}"
    if not folder.is_dir():
        _build(folder, lambda temporary: _tokenize(corpus, tokenizer, temporary))
    return PreparedData(
        TokenDataset(folder / "train"), TokenDataset(folder / "validation"), tokenizer, key
    )


def _trained_tokenizer(corpus: Corpus, vocab_size: int, cache: Path) -> Path:
    folder = cache / f"tokenizer-{_key('bpe', corpus.fingerprint(), str(vocab_size))}"
    file = folder / "tokenizer.json"
    if not file.is_file():
        training, _ = corpus.split()
        tokenizer = train_tokenizer((document.text for document in training), vocab_size)
        _build(folder, lambda temporary: tokenizer.save(str(temporary / file.name)))
    return file


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    for name, documents in zip(("train", "validation"), corpus.split(), strict=True):
        (folder / name).mkdir()
        _write_tokens(documents, tokenizer, folder / name)


def _write_tokens(documents: Iterable[Document], tokenizer: Tokenizer, folder: Path) -> None:
    """Token ids of all documents one after another, each closed by the end of text."""
    end_id = end_of_text_id(tokenizer)
    dtype = np.dtype(np.uint16 if tokenizer.get_vocab_size() <= 1 << 16 else np.uint32)
    ends, rewards = [0], []
    with open(folder / "tokens.bin", "wb") as file:
        for some in _batched(documents, DOCUMENTS_AT_ONCE):
            texts = [document.text for document in some]
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array([*encoding.ids, end_id], dtype=dtype)
                file.write(ids.tobytes())
                ends.append(ends[-1] + len(ids))
            rewards += [document.reward for document in some]
    np.save(folder / "document_ends.npy", np.array(ends, dtype=np.int64))
    rewarded = sum(reward is not None for reward in rewards)
    if rewarded not in (0, len(rewards)):
        raise DataError(
            f"{rewarded} of {len(rewards)} documents have a reward: give all of them one, or none"
        )
    if rewarded:
        np.save(folder / "rewards.npy", np.array(rewards, dtype=np.float32))
    meta = {"dtype": dtype.name, "end_id": end_id, "vocab_size": tokenizer.get_vocab_size()}
    (folder / "meta.json").write_text(json.dumps(meta))


def _build(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, and give it its name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        write(temporary)
        # Another process may have been faster: its entry has the same content.
        if not folder.is_dir():
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join((FORMAT, *parts)).encode()).hexdigest()[:20]


def _batched(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    iterator = iter(documents)
    while some := list(itertools.islice(iterator, size)):
        yield some
