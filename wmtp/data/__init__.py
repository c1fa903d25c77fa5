"""From text on disk to token batches: corpus -> tokenizer -> token file -> batches."""

from wmtp.data.batches import Batch, TokenDataset
from wmtp.data.corpus import Corpus, DataError, Document, find_corpus
from wmtp.data.prepare import PreparedData, cache_folder, prepare_data

__all__ = [
    "Batch",
    "Corpus",
    "DataError",
    "Document",
    "PreparedData",
    "TokenDataset",
    "cache_folder",
    "find_corpus",
    "prepare_data",
]
