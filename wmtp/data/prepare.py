"""Tokenise a corpus once and keep the result: flat files of token ids, read through memory maps.

The cache is $WMTP_CACHE, or ~/.cache/wmtp. An entry is written under a temporary name and renamed
when it is whole, so a killed run leaves nothing that a later one would believe; its digests tell of
what was changed since, and it is made again.
"""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from wmtp.data.batches import TokenDataset
from wmtp.data.corpus import Corpus, DataError, Document
from wmtp.data.tokenizer import (
    end_of_text_id,
    load_tokenizer,
    train_tokenizer,
    vocabulary_size,
)
from wmtp.digests import what_is_wrong, write_digests
from wmtp.files import FREE, TEMPORARY, digest_of, discard, shown, writing

FORMAT = "3"  # a part of every key: raise it when the files below change
DEFAULT_VOCABULARY = 8192
DOCUMENTS_AT_ONCE = 256


class PreparedData(NamedTuple):
    """A tokenised corpus.

    Attributes:
        train, validation: their batches.
        tokenizer: as used.
        identity: the digests of the text files by their names, and of the tokenizer; what the
            batches follow from.
        notes: what was not as it should be, and was mended.
    """

    train: TokenDataset
    validation: TokenDataset
    tokenizer: Tokenizer
    identity: dict[str, Any]
    notes: tuple[str, ...] = ()


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
        FileError: the cache cannot be written.
    """
    cache, notes = cache_folder(), []
    if tokenizer_file is None:
        name = f"tokenizer-{_key('bpe', corpus.fingerprint(), str(vocab_size))}"
        tokenizer_file = cache / name / "tokenizer.json"
        notes += _make(tokenizer_file.parent, lambda place: _train(corpus, vocab_size, place))
    tokenizer = load_tokenizer(tokenizer_file)
    folder = cache / f"tokens-{_key('tokens', corpus.fingerprint(), tokenizer.to_str())}"
    notes += _make(folder, lambda place: _tokenize(corpus, tokenizer, place))
    train, validation = (TokenDataset(folder / name) for name in ("train", "validation"))
    identity = {
        "data": corpus.digests(),
        "tokenizer": {tokenizer_file.name: digest_of(tokenizer_file)},
        "vocab_size": train.vocab_size,
    }
    return PreparedData(train, validation, tokenizer, identity, tuple(notes))


def _train(corpus: Corpus, vocab_size: int, folder: Path) -> None:
    training, _ = corpus.split()
    tokenizer = train_tokenizer((document.text for document in training), vocab_size)
    tokenizer.save(str(folder / "tokenizer.json"))


def _tokenize(corpus: Corpus, tokenizer: Tokenizer, folder: Path) -> None:
    rewards = Rewards()
    for name, documents in zip(("train", "validation"), corpus.split(), strict=True):
        (folder / name).mkdir()
        filled = _write_tokens(documents, tokenizer, folder / name, rewards)
        if name == "train" and not filled:
            raise DataError(
                f"the training text of {corpus.place} is empty, or only white space: pass more text"
            )
    rewards.check(len(corpus.files))


class Rewards:
    """How many documents have one, over all files."""

    def __init__(self) -> None:
        self.count = {True: 0, False: 0}
        self.first_place: dict[bool, str] = {}

    def add(self, document: Document) -> None:
        has = document.reward is not None
        self.count[has] += 1
        self.first_place.setdefault(has, document.place)

    def check(self, files: int) -> None:
        """Raises:
        DataError: some have one and some have none; names the first of the fewer.
        """
        with_one, without = self.count[True], self.count[False]
        if with_one and without:
            has = with_one <= without
            said = "has a reward" if has else "has none"
            raise DataError(
                f"{with_one:,} of {with_one + without:,} documents in {files:,} files have a "
                f"reward ({self.first_place[has]} {said}): give all of them one, or none"
            )


def _write_tokens(
    documents: Iterable[Document], tokenizer: Tokenizer, folder: Path, rewards: Rewards
) -> bool:
    """Token ids of all documents one after another, each closed by the end of text.

    Returns:
        Whether any of them has a character that is not white space.
    """
    filled = False
    end_id, vocab_size = end_of_text_id(tokenizer), vocabulary_size(tokenizer)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    ends, values = [0], []
    with open(folder / "tokens.bin", "wb") as file:
        for some in _batched(documents, DOCUMENTS_AT_ONCE):
            texts = [document.text for document in some]
            filled = filled or any(map(str.strip, texts))
            for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
                ids = np.array([*encoding.ids, end_id], dtype=dtype)
                file.write(ids.tobytes())
                ends.append(ends[-1] + len(ids))
            for document in some:
                rewards.add(document)
                values.append(document.reward)
    np.save(folder / "document_ends.npy", np.array(ends, dtype=np.int64))
    if any(value is not None for value in values):
        np.save(folder / "rewards.npy", np.array(values, dtype=np.float32))
    meta = {"dtype": dtype.name, "end_id": end_id, "vocab_size": vocab_size}
    (folder / "meta.json").write_text(json.dumps(meta))
    return filled


def _make(folder: Path, write: Callable[[Path], object]) -> list[str]:
    """Have `write` fill a folder of the cache, unless it is there as it was written.

    Returns:
        What was wrong with it.
    """
    wrong = what_is_wrong(folder) if folder.is_dir() else None
    with writing(folder, f"{FREE}, or set WMTP_CACHE to another folder"):
        if wrong is not None:
            with contextlib.suppress(FileNotFoundError):  # another process has found it, too
                discard(folder)
        if not folder.is_dir():
            _build(folder, write)
    return [] if wrong is None else [f"{shown(folder)} is damaged ({wrong}): it was made again"]


def _build(folder: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder, and give it its name when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{folder.name}."
    temporary = Path(tempfile.mkdtemp(prefix=prefix, suffix=TEMPORARY, dir=folder.parent))
    try:
        write(temporary)
        write_digests(temporary)
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
