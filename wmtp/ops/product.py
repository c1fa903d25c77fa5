"""The product of the linear loss: what makes logits of hidden states, and in how many chunks.

B batch, S sequence, H heads, D hidden, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from wmtp.ops.plan import Asked, Kind
from wmtp.records import LinearInputs, LinearSettings, RowSettings

MIB = 1 << 20


class Wanted(NamedTuple):
    """Which gradients."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class Linear(NamedTuple):
    """The product, and how it is computed."""

    hidden: Tensor  # [B, S, H, D], any strides
    weight: Tensor  # [G, V, D], one matrix or a head's own: the rows that are tokens
    bias: Tensor | None  # [G, V]
    whole: torch.Size  # of the weight as it was given: the gradients have rows that are no tokens
    kinds: list[Kind]  # of the heads
    dtype: torch.dtype  # of x, logits and g
    accum_dtype: torch.dtype  # of grad_weight and grad_bias while they are summed up
    chunk_bytes: int | None
    rows: RowSettings  # of the chunks' logits, which have no padding
    positions: int  # of S, that may have a target
    weight_wanted: bool = True  # its gradient

    @classmethod
    def of(cls, inputs: LinearInputs, settings: LinearSettings) -> "Linear":
        weight, bias = inputs.weight, inputs.bias
        own = weight.dim() == 3
        if not own:
            weight, bias = weight[None], None if bias is None else bias[None]
        of_hidden, of_weight = settings.hidden_grad_heads, settings.weight_grad_heads
        return cls(
            hidden=inputs.hidden,
            weight=weight[:, : settings.vocab_size],
            bias=None if bias is None else bias[:, : settings.vocab_size],
            whole=inputs.weight.shape,
            kinds=[
                Kind(
                    k if own else 0,
                    of_hidden is None or k in of_hidden,
                    of_weight is None or k in of_weight,
                )
                for k in range(inputs.hidden.shape[2])
            ],
            dtype=settings.dtype,
            accum_dtype=settings.accum_dtype,
            chunk_bytes=settings.chunk_bytes,
            rows=RowSettings(
                ignore_index=settings.ignore_index,
                backend=settings.backend,
                numerics=settings.numerics,
                metrics=settings.metrics,
            ),
            positions=min(inputs.hidden.shape[1], inputs.target_ids.shape[1]),
            weight_wanted=Wanted(*settings.wanted).weight,
        )

    @property
    def row_bytes(self) -> int:
        """Of a row's logits, its x and its g @ weight, and of c times one of them in float32."""
        _, vocab_size, dim = self.weight.shape
        return vocab_size * self.dtype.itemsize + dim * (2 * self.dtype.itemsize + 4)

    @property
    def tokens(self) -> int:
        return len(self.hidden) * self.positions

    @property
    def most_chunk_bytes(self) -> int:
        """What a chunk may take: chunk_bytes, or the default; or all rows, if they take no more
        than the default and the float32 sum that several chunks need."""
        if self.chunk_bytes:
            return self.chunk_bytes
        default = default_chunk_bytes(self.row_bytes)
        spared = self.accum_dtype.itemsize - self.weight.dtype.itemsize
        spared *= self.weight.numel() if self.weight_wanted and self.dtype != torch.float16 else 0
        whole = self.tokens * self.hidden.shape[2] * self.row_bytes
        return max(default, whole) if whole <= default + spared else default

    @property
    def chunk_tokens(self) -> int:
        return max(1, self.most_chunk_bytes // (self.hidden.shape[2] * self.row_bytes))

    @property
    def sum_dtype(self) -> torch.dtype:
        """The dtype in which the chunks' parts of the weight's gradient are added up.

        One chunk adds up nothing: the weight's own dtype does, except float16, whose range the
        product of one chunk may exceed.
        """
        whole = self.tokens <= self.chunk_tokens and self.dtype != torch.float16
        dtype = self.weight.dtype if whole else self.accum_dtype
        return dtype if dtype in (self.dtype, torch.float32) else torch.float32

    def asked(self, together: int = 1) -> Asked:
        """What a plan follows from."""
        return Asked(
            self.hidden.shape[1],
            self.kinds,
            self.weight.shape[1],
            self.rows.ignore_index,
            self.chunk_tokens,
            together,
        )


def default_chunk_bytes(row_bytes: int) -> int:
    """2048 rows, but no more than 1 GiB.

    A chunk of n rows reads and writes the weight's float32 accumulator, 8 V D bytes, for 2 n V D
    operations. A GPU makes some 300 of them while it moves a byte, so that from 1200 rows on the
    product waits for its arithmetic and no longer for memory.
    """
    return min(2048 * row_bytes, 1024 * MIB)
