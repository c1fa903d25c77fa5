"""Batches from a flat file of token ids, each a function of (seed, stream, step) alone.

Nothing is remembered between batches: a resumed run asks for the step it is at.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from wmtp.data.corpus import DataError
from wmtp.labels import IGNORE_INDEX

PADDING = -1  # the document of what is none


class Batch(TypedDict):
    """What a trainer steps on.

    input_ids [B, S] int64; target_ids [B, T] int64, unshifted, T >= S where the row goes on, -100
    where padded; sequence_ids [B] int64, the number of each row's block or document, which what is
    known of it can be stored by; reward [B] fp32, when the data has rewards; document_ids [B, T]
    int64, of packed rows.
    """

    input_ids: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    reward: NotRequired[Tensor]
    document_ids: NotRequired[Tensor]


@dataclass(frozen=True)
class Rows:
    """What a row holds.

    Attributes:
        seq_len: S.
        ahead: how many tokens the labels go on after the inputs, T - S.
        packed: say which document each token is of.
    """

    seq_len: int
    ahead: int = 0
    packed: bool = False


class TokenDataset:
    """The token file in `folder`, memory-mapped.

    Without rewards row i is the file's block i, tokens [i S, (i + 1) S), the last one padded. With
    rewards it is document i from its start, cut at or padded to S, because the reward is about it.
    Labels go on in the next block, or to the document's end.

    Attributes:
        vocab_size: V of the tokenizer that wrote the file.
        rewards: [documents] fp32, or None.
    """

    def __init__(self, folder: Path) -> None:
        meta = json.loads((folder / "meta.json").read_text())
        self.vocab_size: int = meta["vocab_size"]
        self._folder = folder
        self._end_id: int = meta["end_id"]
        self._ends = np.load(folder / "document_ends.npy")
        file = folder / "tokens.bin"
        dtype = np.dtype(meta["dtype"])
        # An empty file cannot be mapped.
        self._tokens: np.ndarray = (
            np.memmap(file, dtype=dtype, mode="r") if self._ends[-1] else np.empty(0, dtype=dtype)
        )
        rewards = folder / "rewards.npy"
        self.rewards = np.load(rewards) if rewards.exists() else None

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self._tokens)

    def batch(self, step: int, *, batch_size: int, rows: Rows, seed: int, stream: int = 0) -> Batch:
        """The batch of one step. The rows come in an order that is drawn anew for every epoch, each
        once; a batch may end one epoch and begin the next.

        Args:
            step: >= 0.
            batch_size: B.
            rows: what they hold.
            seed: >= 0.
            stream: another sequence of batches for the same seed.

        Raises:
            DataError: fewer than S tokens, or with rewards no document.
        """
        count = self._row_count(rows.seq_len)
        places = step * batch_size + np.arange(batch_size)
        orders = [_order(count, seed, stream, int(epoch)) for epoch in places // count]
        drawn = [order[place] for order, place in zip(orders, places % count, strict=True)]
        return self._gather(np.array(drawn), rows)

    def evaluation_batches(self, count: int, *, batch_size: int, rows: Rows) -> list[Batch]:
        """At most `count` batches of rows spread evenly over the file, the same every time."""
        available = self._row_count(rows.seq_len)
        wanted = min(count * batch_size, available)
        numbers = np.linspace(0, available - 1, wanted).astype(np.int64)
        return [
            self._gather(numbers[start : start + batch_size], rows)
            for start in range(0, wanted, batch_size)
        ]

    def _row_count(self, seq_len: int) -> int:
        if self.rewards is not None:
            rows = len(self.rewards)
        else:
            rows = -(-len(self) // seq_len) if len(self) >= seq_len else 0
        if rows < 1:
            raise DataError(
                f"{self._folder.name} text has {len(self)} tokens, fewer than one sequence of "
                f"{seq_len}: pass more text or a smaller --seq-len"
            )
        return rows

    def _gather(self, numbers: np.ndarray, rows: Rows) -> Batch:
        shape = (len(numbers), rows.seq_len + rows.ahead)
        ids = torch.full(shape, self._end_id)
        target_ids = torch.full(shape, IGNORE_INDEX)
        document_ids = torch.full(shape, PADDING)
        for row, number in enumerate(numbers):
            begin, end = self._span(number, rows)
            tokens = torch.from_numpy(self._tokens[begin:end].astype(np.int64))
            ids[row, : len(tokens)] = target_ids[row, : len(tokens)] = tokens
            if rows.packed:
                place = np.searchsorted(self._ends[1:], np.arange(begin, end), side="right")
                document_ids[row, : len(tokens)] = torch.from_numpy(place)
        batch: Batch = {
            "input_ids": ids[:, : rows.seq_len],
            "target_ids": target_ids,
            "sequence_ids": torch.from_numpy(numbers),
        }
        if rows.packed:
            batch["document_ids"] = document_ids
        if self.rewards is not None:
            batch["reward"] = torch.from_numpy(self.rewards[numbers])
        return batch

    def _span(self, number: int, rows: Rows) -> tuple[int, int]:
        """The tokens of a row, [begin, end) of the file."""
        length = rows.seq_len + rows.ahead
        if self.rewards is None:
            begin = int(number) * rows.seq_len
            return begin, min(begin + length, len(self))
        begin, end = int(self._ends[number]), int(self._ends[number + 1])
        return begin, min(end, begin + length)


@functools.lru_cache(maxsize=4)  # this epoch's and the next one's, of two streams
def _order(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """A permutation of `count` rows."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)
