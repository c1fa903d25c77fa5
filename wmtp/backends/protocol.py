"""What a backend offers: a module with these functions. Tensors come as its records say.

B batch, S sequence, H heads, V vocabulary, R rows; "acc" is float32, float64 for float64 logits.
Where settings name a vocab_size nothing is read, and nothing written, behind so many columns.
"""

from typing import Protocol

from torch import Tensor

from wmtp.records import Inputs, Outputs, RowInputs, RowOutputs, RowSettings, Settings


class Backend(Protocol):
    """Importing it loads neither a library nor Triton."""

    def unavailable(self) -> str | None:
        """Why it cannot run here, with the remedy; None where it can."""

    def fuses(self, rule: str) -> bool:
        """Whether it has a twin of the rule of this `Weighting.key`."""

    def weighted_loss(self, inputs: Inputs, settings: Settings) -> Outputs:
        """The loss and, in the same pass, its gradient.

        Raises, where it can look without waiting:
            IndexError: a target outside [0, V).
            ValueError: a weight where there is a target that is not finite, or negative where that
                is divided by.
        """

    def row_gradient(self, rows: RowInputs, settings: RowSettings) -> Tensor:
        """The gradient of sum row_scalar * f with respect to the logits.

        Returns:
            [B, S, H, V] contiguous, of the logits' dtype; shared heads (H > 1, stride 0 along
            them): their sum, [B, S, 1, V]. Rows without a target get exactly 0, unread.
        """

    def multiply_(self, grad: Tensor, factor: Tensor) -> Tensor:
        """grad [B, S, H, V] or [B, S, V] times factor [], in place, which is returned; nothing is
        read where that is 1, and 0 times NaN is 0."""

    def next_token_ce(self, logits: Tensor, target_ids: Tensor, settings: RowSettings) -> Tensor:
        """[B, S] acc, nats, of logits [B, S, V], each position predicting target_ids[b, t] of
        [B, L]; 0 where there is no target."""

    def new_rows(self, count: int, weight: Tensor) -> Tensor:
        """[count, V] of weight's dtype, for a chunk's logits."""

    def rows_ce_(
        self,
        logits: Tensor,
        target_ids: Tensor,
        row_scalar: Tensor | None,
        settings: RowSettings,
    ) -> RowOutputs:
        """The CE of each row; the row becomes row_scalar df/dlogits, if there is one.

        Args:
            logits: [R, V], last stride 1.
            target_ids: [R] int64, contiguous, in [0, V), `ignore_index` being none of them.
            row_scalar: [R] acc, contiguous, of any sign, or None: the logits stay.
            settings: whose vocab_size is None.
        """
