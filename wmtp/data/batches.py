"""Batches from a flat file of token ids, each a function of (seed, stream, step) alone.

Nothing is remembered between batches: a resumed run asks for the step it is at.
"""

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
    sequence_ids [B] int64, where each row comes from (a token's position in the file, or the
    number of a document), for error messages; reward [B] fp32, when the data has rewards.
    """

    input_ids: Tensor
    target_ids: Tensor
    sequence_ids: Tensor
    reward: NotRequired[Tensor]


class TokenDataset:
    """The token file in `folder`, memory-mapped.

    Without rewards a row of a batch is any window of the file. With rewards a row is one document
    from its start, cut at or padded to the sequence length, because the reward is about it.

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
        # An empty file cannot be mapped.
        self._tokens: np.ndarray = (
            np.memmap(file, dtype=meta["dtype"], mode="r")
            if file.stat().st_size
            else np.empty(0, dtype=meta["dtype"])
        )
        rewards = folder / "rewards.npy"
        self.rewards = np.load(rewards) if rewards.exists() else None

    def __len__(self) -> int:
        """The number of tokens."""
        return len(self._tokens)

    def batch(
        self, step: int, *, batch_size: int, seq_len: int, seed: int, stream: int = 0
    ) -> Batch:
        """The batch of one step: B rows drawn with replacement, S tokens each.

        Args:
            step: >= 0.
            batch_size: B.
            seq_len: S.
            seed: >= 0.
            stream: another sequence of batches for the same seed.

        Raises:
            DataError: fewer than S tokens, or with rewards no document.
        """
        generator = np.random.default_rng([seed, stream, step])
        rows = generator.integers(self._row_count(seq_len), size=batch_size)
        return self._gather(rows, seq_len)

    def evaluation_batches(self, count: int, *, batch_size: int, seq_len: int) -> list[Batch]:
        """At most `count` batches spread evenly over the file, the same every time."""
        available = self._row_count(seq_len)
        apart = 1 if self.rewards is not None else seq_len
        wanted = min(count * batch_size, -(-available // apart))
        rows = np.linspace(0, available - 1, wanted).astype(np.int64)
        return [
            self._gather(rows[start : start + batch_size], seq_len)
            for start in range(0, wanted, batch_size)
        ]

    def _row_count(self, seq_len: int) -> int:
        rows = len(self) - seq_len + 1 if self.rewards is None else len(self.rewards)
        if rows < 1:
            raise DataError(
                f"{self._folder.name} text has {len(self)} tokens, fewer than one sequence of "
                f"{seq_len}: pass more text or a smaller --seq-len"
            )
        return rows

    def _gather(self, rows: np.ndarray, seq_len: int) -> Batch:
        sequence_ids = torch.from_numpy(rows)
        if self.rewards is None:
            windows = self._tokens[rows[:, None] + np.arange(seq_len)].astype(np.int64)
            ids = torch.from_numpy(windows)
            return {"input_ids": ids, "target_ids": ids, "sequence_ids": sequence_ids}
        ids = torch.full((len(rows), seq_len), self._end_id)
        targets = torch.full((len(rows), seq_len), IGNORE_INDEX)
        for row, document in enumerate(rows):
            tokens = self._tokens[self._ends[document] : self._ends[document + 1]][:seq_len]
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            targets[row, : len(tokens)] = ids[row, : len(tokens)]
        return {
            "input_ids": ids,
            "target_ids": targets,
            "sequence_ids": sequence_ids,
            "reward": torch.from_numpy(self.rewards[rows]),
        }
