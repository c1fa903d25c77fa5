"""What the kernels here do not know yet."""

from wmtp.numerics import PLAIN
from wmtp.records import RowSettings


def refuse_options(settings: RowSettings) -> None:
    if settings.numerics != PLAIN or settings.vocab_size is not None or settings.metrics:
        raise NotImplementedError(
            "the Triton kernels know no logit_scale, caps, z_loss, label_smoothing, vocab_size or "
            "metrics yet: pass backend='eager'"
        )
