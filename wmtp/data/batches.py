"""Batches from a flat file of token ids, each a function of (seed, stream, step) alone.

Nothing is remembered between batches: a resumed run asks for the step it is at.
"""

import functools
import json
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor

from wmtp.data.corpus import DataError
from wmtp.labels import IGNORE_INDEX


class Batch(TypedDict):
    """What a trainer steps on.

    input_ids [B, S] int64; target_ids [B, S] int64, unshifted, -100 where padded;
    sequence_ids [B] int64, the number of each row's block or document, which what is known of it
    can be stored by; reward [B] fp32, when the data has rewards.
    """

    input_ids: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    reward: NotRequired[Tensor]


class TokenDataset:
    """The token file in `folder`, memory-mapped.

    Without rewards row i is the file's block i, tokens [i S, (i + 1) S), the last one padded. With
    rewards it is document i from its start, cut at or padded to S, because the reward is about it.

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

    def batch(
        self, step: int, *, batch_size: int, seq_len: int, seed: int, stream: int = 0
    ) -> Batch:
        """The batch of one step. The rows come in an order that is drawn anew for every epoch, each
        once; a batch may end one epoch and begin the next.

        Args:
            step: >= 0.
            batch_size: B.
            seq_len: S.
            seed: >= 0.
            stream: another sequence of batches for the same seed.

        Raises:
            DataError: fewer than S tokens, or with rewards no document.
        """
        count = self._row_count(seq_len)
        places = step * batch_size + np.arange(batch_size)
        orders = [_order(count, seed, stream, int(epoch)) for epoch in places // count]
        rows = [order[place] for order, place in zip(orders, places % count, strict=True)]
        return self._gather(np.array(rows), seq_len)

    def evaluation_batches(self, count: int, *, batch_size: int, seq_len: int) -> list[Batch]:
        """At most `count` batches of rows spread evenly over the file, the same every time."""
        available = self._row_count(seq_len)
        wanted = min(count * batch_size, available)
        rows = np.linspace(0, available - 1, wanted).astype(np.int64)
        return [
            self._gather(rows[start : start + batch_size], seq_len)
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

    def _gather(self, rows: np.ndarray, seq_len: int) -> Batch:
        ids = torch.full((len(rows), seq_len), self._end_id)
        target_ids = torch.full((len(rows), seq_len), IGNORE_INDEX)
        for row, number in enumerate(rows):
            tokens = torch.from_numpy(self._row(number, seq_len).astype(np.int64))
            ids[row, : len(tokens)] = target_ids[row, : len(tokens)] = tokens
        batch: Batch = {
            "input_ids": ids,
            "target_ids": target_ids,
            "sequence_ids": torch.from_numpy(rows),
        }
        if self.rewards is not None:
            batch["reward"] = torch.from_numpy(self.rewards[rows])
        return batch

    def _row(self, number: int, seq_len: int) -> np.ndarray:
        if self.rewards is None:
            return self._tokens[number * seq_len : (number + 1) * seq_len]
        begin, end = self._ends[number], self._ends[number + 1]
        return self._tokens[begin : min(end, begin + seq_len)]


@functools.lru_cache(maxsize=4)  # this epoch's and the next one's, of two streams
def _order(count: int, seed: int, stream: int, epoch: int) -> np.ndarray:
    """A permutation of `count` rows."""
    return np.random.default_rng([seed, stream, epoch]).permutation(count)
